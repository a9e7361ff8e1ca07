"""What to build: one package, from what, and with which compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rattler import RepoDataRecord

from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.recipe import Rendered
from ssm_forge.solve.lock_sources import SourcePackage


@dataclass(frozen=True)
class BuildRequest:
    """One package that is to be built, and all that this takes.

    Attributes:
        rendered: the recipe, rendered for the build.
        key: what it is built for.
        channels: URLs to take build and host packages from, first wins.
        compiler: what a compiler of this machine says it is; empty where packages bring it.
        compiler_lock: the lock of Debian packages that a compiler of the bridge is made of.
        locked: what recipes/pixi.lock says that it is built with; None where the channels are solved.
        beside: the packages of the locked environment that it is for.
        root: the checkout that has its recipe, where that is not the workspace.
        finish: makes the finished package of the built one, where :func:`ssm_forge.build.finalize.finalize` does not.
    """

    rendered: Rendered
    key: BuildKey
    channels: tuple[str, ...]
    compiler: str = ""
    compiler_lock: Path | None = None
    locked: SourcePackage | None = None
    beside: tuple[RepoDataRecord, ...] = ()
    root: Path | None = None
    finish: Callable[[Path], Path] | None = None

    @property
    def project(self) -> str:
        """The recipe's name, which is the package's too."""
        return self.rendered.name

    @property
    def filename(self) -> str:
        """The file name of the package that it gives."""
        return self.rendered.filename

    @property
    def built_with(self) -> tuple[RepoDataRecord, ...]:
        """The packages that recipes/pixi.lock has for the build; none where the channels are solved."""
        return (*self.locked.build, *self.locked.host) if self.locked is not None else ()
