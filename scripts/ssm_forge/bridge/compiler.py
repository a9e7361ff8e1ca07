"""The host compiler as conda packages: a thin package that points at one of this machine's.

It has conda-forge's names (``gxx_linux-64``, ``sysroot_linux-64``, ``libstdcxx``, ``libgcc``), so that
``compiler('cxx')`` and ``stdlib('c')`` of the recipes mean the same for both sources of packages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.bridge.package import BridgePackage, hash_text
from ssm_forge.errors import MachineError
from ssm_forge.machine import glibc

_ACTIVATE_GCC = """\
export CC="{cc}"
"""

_ACTIVATE_GXX = """\
export CXX="{cxx}"
export NVCC_PREPEND_FLAGS="${{NVCC_PREPEND_FLAGS:+$NVCC_PREPEND_FLAGS }}-ccbin={cxx}"
"""

_DEACTIVATE_GCC = "unset CC\n"
_DEACTIVATE_GXX = "unset CXX NVCC_PREPEND_FLAGS\n"


@dataclass(frozen=True)
class HostCompiler:
    """A C++ compiler of this machine.

    Attributes:
        cxx: the g++ executable.
        cc: the gcc beside it.
        version: full version, ``12.2.0``.
    """

    cxx: Path
    cc: Path
    version: str

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    @property
    def glibc(self) -> str:
        """The C library it compiles for: the machine's."""
        return glibc()

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        return str(self.cxx)


def find(allowed: range, cuda: str, explicit: str | None = None) -> HostCompiler:
    """The newest g++ of this machine that nvcc accepts.

    Args:
        allowed: major versions that this nvcc's ``crt/host_config.h`` accepts.
        cuda: CUDA release, for the message.
        explicit: a path the user gave.

    Raises:
        MachineError: when there is none, saying what was found and what is allowed.
    """
    names = [explicit] if explicit else [f"g++-{major}" for major in reversed(allowed)] + ["g++"]
    found: list[str] = []
    for name in names:
        compiler = _probe(name)
        if compiler is None:
            if explicit:
                found.append(f"{explicit}, which is no g++ that runs")
            continue
        if compiler.major in allowed:
            return compiler
        found.append(f"{compiler.cxx} {compiler.version}")
    raise MachineError(
        f"no C++ compiler that nvcc {cuda} accepts was found (found: {', '.join(found) or 'none'}; it accepts g++ "
        f"{allowed.start} to {allowed.stop - 1}).",
        fix=f"Install one, e.g. 'apt install g++-{min(12, allowed.stop - 1)}', or use --host-compiler bridge.",
    )


def _probe(name: str) -> HostCompiler | None:
    path = shutil.which(name)
    if path is None:
        return None
    path = os.path.abspath(path)  # noqa: PTH100 - builds run in other folders; links stay links
    try:
        version = subprocess.run(
            [path, "-dumpfullversion"], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    if not re.fullmatch(r"\d+(\.\d+)*", version):
        return None
    cxx = Path(path)
    cc = cxx.with_name(cxx.name.replace("g++", "gcc"))
    return HostCompiler(cxx, cc if cc.exists() else cxx, version)


def system_compiler_packages(compiler: HostCompiler) -> list[BridgePackage]:
    """Packages that point at ``compiler``, plus copies of the runtime libraries it links to."""
    identity = hash_text(compiler.cxx, compiler.version, glibc())
    runtime = {name: _library(compiler, name) for name in ("libstdc++.so.6", "libgcc_s.so.1")}
    version = compiler.version
    major = compiler.major

    def stage_activation(name: str, activate: str, deactivate: str) -> Callable[[Path], None]:
        def stage(folder: Path) -> None:
            for step, text in (("activate", activate), ("deactivate", deactivate)):
                script = folder / f"etc/conda/{step}.d/{step}-{name}.sh"
                script.parent.mkdir(parents=True)
                script.write_text(text)

        return stage

    def stage_library(name: str) -> object:
        def stage(folder: Path) -> None:
            (folder / "lib").mkdir()
            shutil.copy(runtime[name], folder / "lib" / name)

        return stage

    def library(package: str, name: str) -> BridgePackage:
        return BridgePackage(
            name=package,
            version=version,
            inputs=(identity, str(runtime[name].stat().st_size)),
            stage=stage_library(name),  # type: ignore[arg-type]
            license="GPL-3.0-only WITH GCC-exception-3.1",
            summary=f"{name} of g++ {version}, copied from this machine",
        )

    return [
        BridgePackage(
            name="gcc_linux-64",
            version=version,
            inputs=(identity, _ACTIVATE_GCC),
            stage=stage_activation("gcc_linux-64", _ACTIVATE_GCC.format(cc=compiler.cc), _DEACTIVATE_GCC),
            depends=("sysroot_linux-64",),
            run_exports={"strong": [f"libgcc >={major}"]},
            summary=f"Activates {compiler.cc} of this machine",
        ),
        BridgePackage(
            name="gxx_linux-64",
            version=version,
            inputs=(identity, _ACTIVATE_GXX),
            stage=stage_activation("gxx_linux-64", _ACTIVATE_GXX.format(cxx=compiler.cxx), _DEACTIVATE_GXX),
            depends=(f"gcc_linux-64 =={version}",),
            run_exports={"strong": [f"libstdcxx >={major}", f"libgcc >={major}"]},
            summary=f"Activates {compiler.cxx} of this machine",
        ),
        BridgePackage(
            name="sysroot_linux-64",
            version=glibc(),
            inputs=(identity,),
            stage=lambda folder: None,
            summary="Stands for the C library of this machine",
        ),
        library("libstdcxx", "libstdc++.so.6"),
        library("libgcc", "libgcc_s.so.1"),
    ]


def _library(compiler: HostCompiler, name: str) -> Path:
    answer = subprocess.run(
        [compiler.cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(answer) or not Path(answer).exists():  # noqa: PTH117 - the compiler answers text
        raise MachineError(
            f"{compiler.cxx} has no {name}.", fix="Install the C++ runtime, e.g. 'apt install libstdc++6'."
        )
    return Path(answer).resolve()
