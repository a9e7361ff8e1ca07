"""Packages, checks and upstream's tests in; one file out, for a machine with Python, torch and a GPU.

:mod:`.write` makes it here; :mod:`.main` runs there, where nothing of the rest exists.
"""
