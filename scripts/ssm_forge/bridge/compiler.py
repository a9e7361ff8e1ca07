"""The host compiler of this machine as conda packages (see :mod:`.gnu`), whose programs start the machine's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base import platforms
from ssm_forge.base.errors import MachineError
from ssm_forge.base.machine import glibc
from ssm_forge.bridge import gnu
from ssm_forge.bridge.package import BridgePackage, hash_text


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
        """``11`` of ``11.3.0``."""
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
    rejected: list[str] = []
    for name in names:
        compiler = _probe(name)
        if compiler is None:
            if explicit:
                rejected.append(f"{explicit}, which is no g++ that runs")
            continue
        if compiler.major in allowed:
            return compiler
        rejected.append(f"{compiler.cxx} {compiler.version}")
    raise MachineError(
        f"no C++ compiler that nvcc {cuda} accepts was found (found: {', '.join(rejected) or 'none'}; it accepts g++ "
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
    """Packages whose programs start ``compiler``, plus copies of the runtime libraries it links to."""
    identity = hash_text(compiler.cxx, compiler.version, glibc())
    libraries = {
        package: _library(compiler, name)
        for package, name in (("libstdcxx", "libstdc++.so.6"), ("libgcc", "libgcc_s.so.1"))
    }

    def copy(name: str, source: Path) -> Callable[[Path], None]:
        def stage(folder: Path) -> None:
            (folder / "lib").mkdir()
            shutil.copy(source, folder / "lib" / name)

        return stage

    return gnu.packages(
        gnu.Toolchain(
            target=platforms.here(),
            runs_on=platforms.here(),
            version=compiler.version,
            binutils=_binutils_version(compiler),
            glibc=glibc(),
            # Its headers are where the machine has them.
            kernel="0",
            inputs=(identity,),
            commands=_commands(compiler),
            specs=lambda folder: _answer(compiler.cxx, "-dumpspecs"),
            stage={
                "libstdcxx": copy("libstdc++.so.6", libraries["libstdcxx"]),
                "libgcc": copy("libgcc_s.so.1", libraries["libgcc"]),
            },
            depends={},
            runtime={
                name: (compiler.version, (identity, str(path.stat().st_size))) for name, path in libraries.items()
            },
            origin=f"{compiler.cxx} of this machine",
            sizes={},
        )
    )


def _commands(compiler: HostCompiler) -> dict[str, str]:
    """What starts each program of the compiler, as far as the machine has it."""
    # GCC looks for its specs, and for files it is asked for, in such a folder first.
    options = f' "-B$prefix/{gnu.specs_folder(platforms.here(), compiler.version)}/"'
    commands = {"gcc": f'"{compiler.cc}"{options}', "g++": f'"{compiler.cxx}"{options}'}
    commands["cpp"] = f'"{compiler.cc}" -E'
    for name in ("cpp", "gcc-ar", "gcc-nm", "gcc-ranlib"):
        beside = compiler.cc.with_name(compiler.cc.name.replace("gcc", name))
        if beside != compiler.cc and beside.exists():
            commands[name] = f'"{beside}"'
    for name in (*gnu.LINKER_PROGRAMS, *gnu.BINUTILS_PROGRAMS):
        program = shutil.which(_answer(compiler.cxx, f"-print-prog-name={name}").strip())
        if program:
            commands[name] = f'"{program}"'
    return commands


def _binutils_version(compiler: HostCompiler) -> str:
    """Version of the linker that the compiler starts; 0 for one that does not tell."""
    try:
        answer = _answer(Path(_answer(compiler.cxx, "-print-prog-name=ld").strip()), "--version")
    except (OSError, subprocess.SubprocessError):
        return "0"
    digits = re.search(r"(\d+(?:\.\d+)+)", answer.partition("\n")[0])
    return digits.group(1) if digits else "0"


def _answer(program: Path, option: str) -> str:
    return subprocess.run([program, option], capture_output=True, text=True, timeout=20, check=True).stdout


def _library(compiler: HostCompiler, name: str) -> Path:
    answer = subprocess.run(
        [compiler.cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(answer) or not Path(answer).exists():  # noqa: PTH117 - the compiler answers text
        raise MachineError(
            f"{compiler.cxx} has no {name}.", fix="Install the C++ runtime, e.g. 'apt install libstdc++6'."
        )
    return Path(answer).resolve()
