"""What a CUDA toolkit is made from, and how one package of it is described.

A toolkit's wheels and Debian packages go in, and patterns of the files to take; a description of a package comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.bridge.debian import Deb
from ssm_forge.bridge.metadata import project
from ssm_forge.bridge.nvidia import LICENSE, Moves, file_names, find_libraries_beside, place
from ssm_forge.bridge.package import BridgePackage
from ssm_forge.bridge.pylock import LockedWheel


@dataclass(frozen=True)
class ToolkitParts:
    """What a toolkit is made from.

    Attributes:
        cuda: CUDA release, ``11.8``.
        wheels: headers and libraries; from CUDA 13 on everything.
        debs: Debian's nvidia-cuda-toolkit; empty from CUDA 13 on.
        newest_gcc: major of the newest GCC that nvcc takes.
        ptxas: of a newer toolkit, for GPUs that this one's nvcc does not know; None where none of them is asked for.
        target: what it compiles for.
        tools: the wheels whose programs are run, where they are others: for a cross compiler.
        runs_on: where these run.
    """

    cuda: str
    wheels: tuple[LockedWheel, ...]
    debs: tuple[Deb, ...] = ()
    newest_gcc: int = 99
    ptxas: LockedWheel | None = None
    target: Platform = LINUX_64
    tools: tuple[LockedWheel, ...] = ()
    runs_on: Platform = LINUX_64

    @property
    def major(self) -> int:
        """``12`` of ``12.4``."""
        return int(self.cuda.split(".")[0])

    @property
    def compiler(self) -> list[LockedWheel]:
        """The wheels that nvcc and its parts are in; one of all up to CUDA 12."""
        return self.take("cuda-nvcc", "nvvm", "cuda-crt")

    @property
    def programs(self) -> list[LockedWheel]:
        """The wheels that have nvcc's programs, and what these load."""
        return replace(self, wheels=self.tools).compiler if self.tools else self.compiler

    def called(self, name: str) -> str:
        """Name of a package for what is compiled for, ``cuda-nvcc_linux-64``."""
        return f"{name}_{self.target.subdir}"

    def take(self, *names: str) -> list[LockedWheel]:
        """The wheels of these projects (``cuda-nvcc`` for ``nvidia-cuda-nvcc-cu11``) that the lock has."""
        by_name = {project(wheel.name): wheel for wheel in self.wheels}
        return [by_name[name] for name in names if name in by_name]


@dataclass(frozen=True)
class Maker:
    """Describes packages of one toolkit."""

    parts: ToolkitParts
    workspace: Workspace

    def __call__(
        self,
        name: str,
        wheels: Sequence[LockedWheel],
        moves: Moves = (),
        *,
        debs: Sequence[Deb] = (),
        depends: Sequence[str] = (),
        constrains: Sequence[str] = (),
        run_exports: dict[str, list[str]] | None = None,
        texts: dict[str, str] | None = None,
        links: Callable[[Path], None] = lambda folder: None,
        license_name: str = LICENSE,
        summary: str = "",
    ) -> BridgePackage:
        """A package of the files of ``wheels`` that ``moves`` names, with the texts and links given."""
        texts = texts or {}

        def stage(folder: Path) -> None:
            if moves:
                place(folder, moves, wheels, self.workspace, name=name, debs=debs)
                find_libraries_beside(folder / "lib")
            for path, text in texts.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text)
            links(folder)

        return BridgePackage(
            name=name,
            version=wheels[0].version.partition(".post")[0],
            inputs=(
                *(wheel.artifact.sha256 for wheel in wheels),
                *(deb.sha256 for deb in debs),
                *(f"{pattern} {target}" for pattern, target in moves),
                *(f"{path} {text}" for path, text in texts.items()),
            ),
            stage=stage,
            depends=tuple(depends),
            constrains=tuple(constrains),
            run_exports=run_exports or {},
            license=license_name,
            summary=summary,
            size=sum(w.artifact.size for w in wheels if moves) + sum(deb.size for deb in debs),
            platform=self.parts.runs_on,
        )

    def names(self, wheel: LockedWheel, pattern: str) -> list[str]:
        """Names of a wheel's files whose path in the toolkit has this pattern."""
        return file_names(wheel, pattern, self.workspace)
