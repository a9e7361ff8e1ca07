"""The torch of pip's that a package was made for: what a wheel's version and the name of its index say of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ssm_forge.base.errors import BuildError
from ssm_forge.base.paths import launcher
from ssm_forge.package.kernels import claimed

# Start of the build string of a torch that comes as a wheel: the bridge's, or that of an environment.
_PIPS_TORCH = re.compile(r"(?:bridge|there)_cuda(\d+)(\d)_")


@dataclass(frozen=True)
class Torch:
    """The torch of pip's that a package was made for.

    Attributes:
        version: its minor, ``2.11``.
        cuda: of its build, ``13.0``.
    """

    version: str
    cuda: str

    @property
    def local(self) -> str:
        """The local version of wheels for it: ``cu130torch2.11``."""
        return f"cu{self.cuda.replace('.', '')}torch{self.version}"

    @property
    def page(self) -> str:
        """The index that has the wheels for it: ``cu130-torch211``."""
        return f"cu{self.cuda.replace('.', '')}-torch{self.version.replace('.', '')}"


def torch_of(index: Mapping[str, Any]) -> Torch:
    """The torch that a package with this ``index.json`` was made for.

    Raises:
        BuildError: when that is none of pip's.
    """
    specs = [spec.split() for spec in index["depends"] if spec.startswith("pytorch ")]
    builds = {spec[2]: spec[1] for spec in specs if len(spec) == 3}
    for build, version in builds.items():
        if found := _PIPS_TORCH.match(build):
            return Torch(version.removesuffix(".*"), f"{found.group(1)}.{found.group(2)}")
    made_for = f"the torch of a conda channel ({', '.join(builds)})" if builds else "no particular torch"
    raise BuildError(
        f"{index['name']} {index['build']} was made for {made_for}, and pip's torch differs in what it links to.",
        fix=f"Make one for pip's torch with '{launcher()} build --source bridge --format wheel'.",
    )


# What a wheel is of, and what sets its index apart.
Of = Literal["release", "tree", "upstream"]
_PAGES: dict[Of, str] = {"release": "", "tree": "-trees", "upstream": "-upstream"}


def page(torch: Torch, of: Of) -> str:
    """The index that a wheel belongs to.

    Those of source trees have one of their own: a fork has the name and often the version of the project that it is a
    fork of, and must not be taken for it. So have those with upstream's kernels: whoever asks for neither gets ours.
    """
    return f"{torch.page}{_PAGES[of]}"


def pages(torch: Torch) -> list[str]:
    """Every index that has wheels for it."""
    return [page(torch, of) for of in _PAGES]


def page_of(where: str) -> Of:
    """What the wheels of an index of this name are of."""
    return next((of for of, ending in _PAGES.items() if ending and where.endswith(ending)), "release")


def torch_of_page(where: str) -> Torch:
    """The torch that the wheels of an index are for, by its name."""
    cuda, torch = where.removesuffix(_PAGES[page_of(where)]).removeprefix("cu").split("-torch")
    return Torch(f"{torch[0]}.{torch[1:]}", f"{cuda[:-1]}.{cuda[-1]}")


def local_version(version: str, torch: Torch, more: str) -> str:
    """``1.7.0+cu130torch2.11``; that of a source tree, or with upstream's kernels, says more.

    Args:
        more: as :func:`local_part` gives it.
    """
    return f"{version}{'.' if '+' in version else '+'}{torch.local}{more}"


def local_part(build: str, tree: str) -> str:
    """What follows the torch in a local version: ``.upstream``, or the beginning of a source tree's hash.

    Args:
        build: the conda package's build string.
        tree: sha256 of the source tree; empty for a release.
    """
    return f".tree{tree[:8]}" if tree else ".upstream" if claimed(build) == "upstream" else ""
