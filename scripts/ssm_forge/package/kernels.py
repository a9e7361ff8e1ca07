"""Which kernels a package has, this project's or upstream's as they are: by its build string, and by its library.

The build string of a package with upstream's begins with ``upstream_``, so that a requirement can name it. To a solver
its build number is 0, below that of every package with ours; the number of its recipe ends its build string.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kernels = Literal["forge", "upstream"]
KERNELS: tuple[Kernels, ...] = ("forge", "upstream")
# The first is what everybody gets who asks for none.
DEFAULT: Kernels = "forge"

# As recipes/*/recipe.yaml write it.
_PREFIX = "upstream_"
# Words that only our patches put into the libraries: the name of a variable, and of an error.
_OURS = {
    "causal_conv1d_cuda": b"only supports sequences shorter than 2^31 - 1025",
    "selective_scan_cuda": b"SSM_FORGE_KERNELS",
}


def claimed(build: str) -> Kernels:
    """The kernels that a build string names."""
    return "upstream" if build.startswith(_PREFIX) else "forge"


def found(library: Path, extension: str) -> Kernels:
    """The kernels that the library of an extension holds."""
    return "forge" if _OURS[extension] in library.read_bytes() else "upstream"


def revision(build: str) -> int:
    """The build number of the recipe, which ends a build string of ours; 0 where it has none."""
    number = build.rpartition("_")[2]
    return int(number) if number.isdecimal() else 0
