"""Packages in a folder or at an URL, with their index, their signed statements and the policy on them.

In: finished packages; questions. Out: a channel that is whole at every moment, and what is in it. Nothing here knows
how a package was built, or into which prefix it goes.
"""
