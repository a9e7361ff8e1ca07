"""The words of the planner: what somebody asks for, what that comes to, and what will be done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssm_forge.base.arch import ArchList
from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.bridge import parts as bridge_parts
from ssm_forge.build.request import BuildRequest
from ssm_forge.channel import policy
from ssm_forge.manifest import variants
from ssm_forge.manifest.variants import Variant
from ssm_forge.package import kernels as package_kernels
from ssm_forge.package.kernels import Kernels
from ssm_forge.solve.lock import LockedEnvironment

State = Literal["installed", "in channel", "to build"]


@dataclass(frozen=True)
class Options:
    """What the user asked for; None where the default is wanted.

    Attributes:
        variant: row of the build matrix, such as ``cu130``.
        python: minor, such as ``3.12``.
        cuda_arch: compute capabilities, as ``--cuda-arch`` takes them.
        prefix: environment to install into.
        jobs: compilers that run side by side.
        host_compiler: ``auto``, ``system``, ``bridge`` or the path of a g++.
        channels: folders, URLs or names of channels to take built packages from, the first that has one wins.
        trust: policy file on signed statements.
        for_this_machine: whether the packages are to run here, and not only to be built here.
        kernels: ours, or upstream's as they are.
        platform: conda's name of what the packages are for, ``linux-aarch64``; None for this machine's.
    """

    variant: str = variants.DEFAULT_VARIANT
    python: str | None = None
    cuda_arch: str | None = None
    source: Literal["auto", "conda", "bridge"] = "auto"
    prefix: Path | None = None
    jobs: int | None = None
    host_compiler: str = "auto"
    channels: tuple[str, ...] = ()
    trust: Path | None = None
    for_this_machine: bool = True
    kernels: Kernels = package_kernels.DEFAULT
    platform: str | None = None


@dataclass(frozen=True)
class PlannedPackage:
    """One of our packages, and what has to be done for it.

    Attributes:
        state: whether it is installed, only in the channel, or has to be built.
        request: how it is built, or was.
        channel: URL of the channel that it was found in, where that is not the local one.
    """

    state: State
    request: BuildRequest
    channel: str = ""

    @property
    def name(self) -> str:
        """The package's name, which is its recipe's too."""
        return self.request.rendered.name

    @property
    def version(self) -> str:
        """The package's version."""
        return self.request.rendered.version

    @property
    def build(self) -> str:
        """The package's build string."""
        return self.request.rendered.build

    @property
    def filename(self) -> str:
        """``NAME-VERSION-BUILD.conda``."""
        return self.request.filename

    @property
    def spec(self) -> str:
        """What the solver is asked for, to get exactly this package."""
        return f"{self.name} =={self.version} {self.build}"


@dataclass(frozen=True)
class Plan:
    """An installation, ready to be carried out.

    Attributes:
        channels: where packages come from, ours first.
        parts: what the bridge is assembled from, None for source conda.
        locked: the environment of pixi.lock that the kernels are put on, where it has one for this variant and Python.
        jobs: compilers that run side by side; 0 when nothing is built.
        download_bytes: still to download.
        disk_bytes: disk still needed.
        memory_bytes: what the builds may take at most; 0 when nothing is built.
        trust: what packages of which channels must prove.
        platform: what the packages are for.
    """

    variant: Variant
    python: str
    archs: ArchList
    prefix: Path
    channels: tuple[str, ...]
    packages: tuple[PlannedPackage, ...]
    parts: bridge_parts.Parts | None
    jobs: int = 0
    download_bytes: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    trust: tuple[policy.Rule, ...] = ()
    locked: LockedEnvironment | None = None
    platform: Platform = LINUX_64

    @property
    def kernels(self) -> Kernels:
        """Whose kernels the packages have."""
        return next((package.request.key.kernels for package in self.packages), package_kernels.DEFAULT)

    @property
    def nothing_to_do(self) -> bool:
        """Whether all packages are installed already."""
        return all(package.state == "installed" for package in self.packages)

    @property
    def to_build(self) -> tuple[PlannedPackage, ...]:
        """The packages that have to be built."""
        return tuple(package for package in self.packages if package.state == "to build")

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for --json."""
        return {
            "variant": self.variant.name,
            "source": self.variant.source,
            "platform": self.platform.subdir,
            "python": self.parts.interpreter.version if self.parts else self.python,
            "cuda": self.variant.cuda,
            "torch": self.variant.torch,
            "host_compiler": f"{self.parts.compiler.origin} {self.parts.compiler.version}" if self.parts else None,
            "cuda_arch": str(self.archs),
            "kernels": self.kernels,
            "prefix": str(self.prefix),
            "channels": list(self.channels),
            "packages": [
                {
                    "name": p.name,
                    "version": p.version,
                    "build": p.build,
                    "state": p.state,
                    **({"channel": p.channel} if p.channel else {}),
                }
                for p in self.packages
            ],
            "jobs": self.jobs,
            "download_bytes": self.download_bytes,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
        }


@dataclass(frozen=True)
class Choice:
    """The row of the build matrix, the Python minor and the platform that options come to."""

    variant: Variant
    python: str
    platform: Platform
