"""What a target machine has (virtual packages), and what channels and platforms are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import rattler
import rattler.exceptions
from rattler import Channel, GenericVirtualPackage
from rattler.package import PackageName
from rattler.version import Version

from ssm_forge.base.platforms import LINUX_64, PLATFORMS


@dataclass(frozen=True, order=True)
class VirtualPackage:
    """A property of the target machine that packages may require, such as ``__cuda=13.0``."""

    name: str
    version: str
    build: str = ""

    def __str__(self) -> str:
        return f"{self.name}={self.version}" + (f"={self.build}" if self.build else "")

    @classmethod
    def parse(cls, text: str) -> VirtualPackage:
        """Read ``__name=version`` or ``__name=version=build``."""
        name, _, rest = text.partition("=")
        version, _, build = rest.partition("=")
        return cls(name, version, build)

    def to_rattler(self) -> GenericVirtualPackage:
        """The engine's object for it."""
        build: Any = self.build or "0"
        # py-rattler 0.28 wants its own type here; 0.25 (conda-forge, August 2026) knows only str.
        if hasattr(rattler, "BuildString"):
            build = rattler.BuildString(build)
        return GenericVirtualPackage(PackageName(self.name), Version(self.version), build)


def virtual_packages(
    *,
    cuda: str | None = None,
    cuda_arch: str | None = None,
    glibc: str = "2.28",
    linux: str = "4.18",
    subdir: str = LINUX_64.subdir,
) -> tuple[VirtualPackage, ...]:
    """What a Linux machine offers; the defaults are those that pixi assumes for a bare platform name."""
    declared = [
        VirtualPackage("__unix", "0", "0"),
        VirtualPackage("__linux", linux),
        VirtualPackage("__glibc", glibc),
    ]
    declared += [VirtualPackage("__archspec", "0", known.machine) for known in PLATFORMS if known.subdir == subdir]
    if cuda:
        declared.insert(0, VirtualPackage("__cuda", cuda))
        if cuda_arch:
            declared.insert(1, VirtualPackage("__cuda_arch", cuda_arch))
    return tuple(declared)


def channel_url(channel: str) -> str:
    """The canonical base URL of a channel given by name or URL, ending in a slash."""
    return Channel(channel).base_url.rstrip("/") + "/"


def subdir_type(name: str) -> Any:
    """py-rattler's object for a subdir; it was called Platform before 0.28."""
    return rattler.Subdir(name) if hasattr(rattler, "Subdir") else rattler.Platform(name)
