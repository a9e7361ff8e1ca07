"""What people wrote, as typed values: pixi.toml, the build matrix, recipes, patches and upstream's sources.

In: the files of the checkout. Out: environments, variants, rendered recipes and their digests. Nothing here knows which
packages exist, or what is installed.
"""
