"""The torch of pip's that a package was made for: what a wheel's version and the name of its index say of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssm_forge.base.errors import BuildError
from ssm_forge.base.paths import launcher

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


def page(torch: Torch, *, tree: bool) -> str:
    """The index that a wheel belongs to.

    Those of source trees have one of their own: a fork has the name and often the version of the project that it is a
    fork of, and must not be taken for it.
    """
    return f"{torch.page}-trees" if tree else torch.page


def local_version(version: str, torch: Torch, tree: str) -> str:
    """``1.7.0+cu130torch2.11``; that of a source tree ends with the beginning of its hash.

    Args:
        tree: sha256 of the source tree; empty for a release.
    """
    parts = [torch.local, *([f"tree{tree[:8]}"] if tree else [])]
    return f"{version}{'.' if '+' in version else '+'}{'.'.join(parts)}"
