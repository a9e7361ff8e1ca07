"""A request in; a finished package with its provenance out, the same bytes each time.

Each recipe runs in a process of its own, which can be stopped with everything that it started. Nothing here knows why a
package is wanted, nor where it will be installed.
"""
