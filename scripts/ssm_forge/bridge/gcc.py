"""Debian's g++ as relocatable conda packages: a host compiler for machines that have none nvcc accepts.

``x86_64-conda-linux-gnu/`` of the prefix holds the programs (``tool``), their shared libraries (``lib``,
found through RPATH, so that no loader path is needed) and the C library they compile for (``sysroot``). GCC
finds its own parts relative to where it is; launchers (see :mod:`.gnu`) give it ``--sysroot`` and ``-B``. A cross
compiler is made likewise, of Debian's: its programs are for one architecture, its sysroot is of another.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ssm_forge.base import platforms
from ssm_forge.base.errors import MachineError
from ssm_forge.base.fetch import checked
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import Platform
from ssm_forge.bridge import gnu
from ssm_forge.bridge.deb_file import unpack
from ssm_forge.bridge.debian import Deb
from ssm_forge.bridge.package import BridgePackage, link

# No run of the compiler needs these; half the size.
_UNUSED = (
    "usr/share/locale",
    "usr/share/man",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/share/gcc",
    "usr/share/gdb",
    "usr/lib/bfd-plugins",
    "usr/bin/*lto-dump*",
    "usr/bin/*gcov*",
    "usr/bin/*gp-*",
    "usr/bin/*gprof*",
    "usr/bin/*gold",
    "usr/bin/*dwp",
    "usr/lib/gcc/*/*/lto1",
    "usr/lib/gcc/*/*/lib?san*",
    "usr/lib/gcc/*/*/plugin",
    "usr/lib/*/gconv",
    "usr/lib/*/audit",
    "usr/sbin",
    "sbin",
    "etc",
)

# Whose files go with the compiler, of each kind; what is left goes with the linker.
_CROSS = r"(-aarch64-linux-gnu|-arm64-cross)?"
_GXX = re.compile(rf"g\+\+-\d+{_CROSS}|libstdc\+\+-\d+-dev{_CROSS}")
_GCC = re.compile(
    rf"gcc-\d+{_CROSS}(-base)?|cpp-\d+{_CROSS}|libgcc-\d+-dev{_CROSS}|libgmp\d+|libisl\d+|libmpc\d+|libmpfr\d+"
)
# ld and its kinds, of what the packages of binutils hold.
_LINKER = ("usr/bin/*ld", "usr/bin/*ld.*")


@dataclass(frozen=True)
class BundledCompiler:
    """A g++ that the bridge brings.

    Attributes:
        debs: the packages it is made of.
    """

    debs: tuple[Deb, ...]

    @property
    def runs_on(self) -> Platform:
        """Where its programs run."""
        return platforms.of_debian(self._deb(rf"g\+\+-\d+{_CROSS}").architecture)

    @property
    def target(self) -> Platform:
        """What it compiles for."""
        return platforms.of_debian(self._deb("libc6-dev").architecture)

    @property
    def version(self) -> str:
        """Full version, ``11.3.0``."""
        return self.upstream(rf"g\+\+-\d+{_CROSS}")

    @property
    def major(self) -> int:
        """``11`` of ``11.3.0``."""
        return int(self.version.split(".")[0])

    @property
    def glibc(self) -> str:
        """The C library it compiles for, ``2.36``."""
        return self.upstream("libc6-dev")

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        cross = "" if self.runs_on == self.target else f" for {self.target.people}"
        return f"g++{cross} of Debian {self.debs[0].suite}"

    def upstream(self, pattern: str) -> str:
        """Upstream's version of the package that has this name."""
        return self._deb(pattern).upstream

    def _deb(self, pattern: str) -> Deb:
        return next(d for d in self.debs if re.fullmatch(pattern, d.package))


def bundled_packages(compiler: BundledCompiler, workspace: Workspace) -> list[BridgePackage]:
    """The packages of a bundled compiler; they are made of its .deb files when they are staged."""
    parts = _parts(compiler.debs)
    # The programs come from the same release as the sysroot, and run on the machine's C library.
    runs_on = (f"__glibc >={compiler.glibc}",)
    sizes = {
        "ld_impl": parts.shared,
        "binutils_impl": parts.binutils,
        "gcc_impl": parts.gcc,
        "gxx_impl": parts.gxx,
        "sysroot": parts.sysroot,
    }
    return gnu.packages(
        gnu.Toolchain(
            target=compiler.target,
            runs_on=compiler.runs_on,
            version=compiler.version,
            binutils=compiler.upstream(rf"binutils{_CROSS}"),
            glibc=compiler.glibc,
            kernel=compiler.upstream("linux-libc-dev"),
            inputs=(*_digests(compiler.debs), *_UNUSED),
            commands=_commands(compiler),
            specs=lambda folder: _builtin_specs(folder, compiler, parts.shared, workspace),
            stage=_stages(compiler, parts, workspace),
            depends=dict.fromkeys(("ld_impl", "binutils_impl", "gcc_impl"), runs_on),
            runtime={name: (deb.upstream, (deb.sha256,)) for name, deb in parts.runtime.items()},
            origin=compiler.origin,
            sizes={name: sum(deb.size for deb in debs) for name, debs in sizes.items()},
        )
    )


class _Parts(NamedTuple):
    """A compiler's .deb files by what they are for; ``sysroot`` includes the kernel's headers."""

    gcc: tuple[Deb, ...]
    gxx: tuple[Deb, ...]
    binutils: tuple[Deb, ...]
    shared: tuple[Deb, ...]
    sysroot: tuple[Deb, ...]
    kernel: tuple[Deb, ...]
    runtime: dict[str, Deb]


def _parts(debs: Sequence[Deb]) -> _Parts:
    tools, sysroot = _only(debs, "tool", "lib"), _only(debs, "sysroot")
    gxx = tuple(deb for deb in tools if _GXX.fullmatch(deb.package))
    gcc = tuple(deb for deb in tools if _GCC.fullmatch(deb.package))
    rest = tuple(deb for deb in tools if deb not in (*gxx, *gcc))
    runtime = {
        name: next(deb for deb in sysroot if deb.package == package)
        for name, package in (("libstdcxx", "libstdc++6"), ("libgcc", "libgcc-s1"))
    }
    kernel = tuple(deb for deb in sysroot if deb.package == "linux-libc-dev")
    return _Parts(gcc, gxx, _only(rest, "tool"), _only(rest, "lib"), sysroot, kernel, runtime)


def _stages(compiler: BundledCompiler, parts: _Parts, workspace: Workspace) -> dict[str, Callable[[Path], None]]:
    """Package name, without what it compiles for -> what puts its files below a prefix."""
    home = compiler.target.triple

    def programs(debs: Sequence[Deb], keep: Callable[[Path], None] = lambda home: None) -> Callable[[Path], None]:
        return lambda folder: _stage_programs(folder / home, debs, compiler.runs_on, parts.sysroot, keep, workspace)

    def library(name: str, file: str) -> Callable[[Path], None]:
        return lambda folder: _stage_library(folder, parts.runtime[name], file, workspace)

    def headers(debs: Sequence[Deb]) -> Callable[[Path], None]:
        return lambda folder: _stage_sysroot(folder / home / "sysroot", debs, workspace)

    return {
        "ld_impl": programs((*parts.binutils, *parts.shared), _keep_linkers),
        "binutils_impl": programs(parts.binutils, _drop_linkers),
        "gcc_impl": programs(parts.gcc),
        "gxx_impl": programs(parts.gxx),
        "kernel-headers": headers(parts.kernel),
        "sysroot": headers(tuple(deb for deb in parts.sysroot if deb not in parts.kernel)),
        "libstdcxx": library("libstdcxx", "libstdc++.so.6"),
        "libgcc": library("libgcc", "libgcc_s.so.1"),
    }


def _commands(compiler: BundledCompiler) -> dict[str, str]:
    home = f"$prefix/{compiler.target.triple}"
    folder = f'"{home}/tool/usr/bin/{compiler.target.multiarch}'
    options = f' --sysroot="{home}/sysroot" -B"{home}/tool/usr/bin"'
    options += f' -B"$prefix/{gnu.specs_folder(compiler.target, compiler.version)}/"'
    commands = {name: f'{folder}-{name}-{compiler.major}"{options}' for name in ("gcc", "g++", "cpp")}
    commands |= {name: f'{folder}-{name}-{compiler.major}"' for name in ("gcc-ar", "gcc-nm", "gcc-ranlib")}
    commands |= {name: f'{folder}-{name}"' for name in (*gnu.LINKER_PROGRAMS, *gnu.BINUTILS_PROGRAMS)}
    return commands


def _only(debs: Iterable[Deb], *parts: str) -> tuple[Deb, ...]:
    return tuple(deb for deb in debs if deb.part in parts)


def _digests(debs: Iterable[Deb]) -> tuple[str, ...]:
    return tuple(deb.sha256 for deb in debs)


def _stage_library(folder: Path, deb: Deb, library: str, workspace: Workspace) -> None:
    scratch = folder / ".unpacked"
    unpack(checked(deb.artifact(), workspace), scratch)
    source = next(path for path in sorted(scratch.rglob(library)))
    (folder / "lib").mkdir()
    shutil.copy(source.resolve(), folder / "lib" / library)
    shutil.rmtree(scratch)


def _stage_programs(
    home: Path,
    debs: Sequence[Deb],
    runs_on: Platform,
    sysroot: Sequence[Deb],
    keep: Callable[[Path], None],
    workspace: Workspace,
) -> None:
    for deb in _only(debs, "tool"):
        unpack(checked(deb.artifact(), workspace), home / "tool")
    _drop_unused(home / "tool")
    _collect_libraries(_only(debs, "lib"), runs_on, home, workspace)
    # Those of a cross linker's that are its alone; its other programs find them beside those of the linker, too.
    for library in sorted((home / "tool/usr/lib" / runs_on.multiarch).glob("*.so*")):
        if (home / "lib").is_dir():
            shutil.move(library, home / "lib" / library.name)
        else:
            library.unlink()
    keep(home / "tool")
    for file in [*_elf_files(home / "tool"), *_elf_files(home / "lib")]:
        _find_libraries_beside(file, home / "lib")
    _point_into_sysroot(home, sysroot, workspace)


def _linkers(tool: Path) -> set[Path]:
    return {path for pattern in _LINKER for path in tool.glob(pattern)}


def _keep_linkers(tool: Path) -> None:
    kept = _linkers(tool)
    for path in sorted(tool.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()


def _drop_linkers(tool: Path) -> None:
    for path in _linkers(tool):
        path.unlink()


def _builtin_specs(folder: Path, compiler: BundledCompiler, shared: Sequence[Deb], workspace: Workspace) -> str:
    """What the compiler answers, run where it lies, beside the libraries that come with the linker."""
    home = folder / compiler.target.triple
    scratch = home / ".shared"
    scratch.mkdir()
    _collect_libraries(shared, compiler.runs_on, scratch, workspace)
    folders = os.pathsep.join(str(folder / "lib") for folder in (home, scratch))
    answer = subprocess.run(
        [home / f"tool/usr/bin/{compiler.target.multiarch}-gcc-{compiler.major}", "-dumpspecs"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": folders},
    )
    shutil.rmtree(scratch)
    if answer.returncode:
        raise MachineError(
            f"Debian's GCC {compiler.major} does not run here: {answer.stderr.strip()}.",
            fix="Install a C++ compiler of this system's own, and use --host-compiler system.",
        )
    return answer.stdout


def _collect_libraries(debs: Sequence[Deb], runs_on: Platform, home: Path, workspace: Workspace) -> None:
    """The programs' own libraries, in a folder that holds nothing else."""
    if not debs:
        return
    scratch = home / ".unpacked"
    (home / "lib").mkdir()
    for deb in debs:
        unpack(checked(deb.artifact(), workspace), scratch)
    for library in sorted(scratch.glob(f"**/{runs_on.multiarch}/*.so*")):
        shutil.move(library, home / "lib" / library.name)
    shutil.rmtree(scratch)


def _elf_files(folder: Path) -> list[Path]:
    """Programs and shared libraries; objects and archives that get linked are not touched."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.suffix not in (".o", ".a") and _is_elf(path)
    ]


def _is_elf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"\x7fELF"


def _find_libraries_beside(file: Path, libraries: Path) -> None:
    tool = shutil.which("patchelf")
    if tool is None:
        raise MachineError("patchelf is missing from the tools.", fix="Delete .pixi/tools and run again.")
    up = "/".join([".."] * len(file.parent.relative_to(libraries.parent).parts))
    done = subprocess.run(
        [tool, "--force-rpath", "--set-rpath", f"$ORIGIN/{up}/lib", file], capture_output=True, text=True
    )
    if done.returncode:
        raise MachineError(f"patchelf can't set the library path of {file.name}: {done.stderr.strip()}")


def _point_into_sysroot(home: Path, sysroot: Sequence[Deb], workspace: Workspace) -> None:
    """GCC's own folder links to runtime libraries (``libstdc++.so``), which are in the sysroot here."""
    own = next((folder for name in ("gcc", "gcc-cross") if (folder := home / "tool/usr/lib" / name).is_dir()), None)
    if own is None:
        return
    scratch = home / ".sysroot"
    _stage_sysroot(scratch, sysroot, workspace)
    for name in sorted(own.rglob("*.so")):
        if not name.is_symlink() or name.exists():
            continue
        library = next(iter(sorted(scratch.rglob(name.readlink().name))), None)
        name.unlink()
        if library is not None:
            up = "/".join([".."] * len(name.parent.relative_to(home).parts))
            link(f"{up}/sysroot/{library.relative_to(scratch)}", name)
    shutil.rmtree(scratch)


def _stage_sysroot(target: Path, debs: Sequence[Deb], workspace: Workspace) -> None:
    for deb in debs:
        unpack(checked(deb.artifact(), workspace), target)
    _drop_unused(target)


def _drop_unused(root: Path) -> None:
    for pattern in dict.fromkeys(p.replace("/gcc/", folder) for p in _UNUSED for folder in ("/gcc/", "/gcc-cross/")):
        for path in root.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    _keep_copyrights(root / "usr/share/doc")


def _keep_copyrights(docs: Path) -> None:
    for path in sorted(docs.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name != "copyright":
            path.unlink()
