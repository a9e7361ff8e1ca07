"""Newer releases of everything that is pinned here, and the tiers of this repository's tests.

In: package indexes and upstream's archives. Out: changed recipes, patches and locks, all or nothing. For maintainers;
no task of a user's comes here.
"""
