"""What knows nothing of packages: errors, paths, output, downloads, credentials, locks, and what this machine is.

In: files, URLs and variables of anyone's. Out: typed values, or one of the errors of :mod:`.errors`. Nothing here knows
what a recipe, a channel or a prefix is.
"""
