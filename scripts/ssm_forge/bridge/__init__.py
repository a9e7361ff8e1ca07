"""The bridge: a local conda channel assembled from PyPI wheels and Debian packages.

For machines that reach no conda channel. Package names are conda-forge's, so that the same recipes, solver
and installer serve both sources.
"""

from __future__ import annotations
