"""Debian's g++ as relocatable conda packages: a host compiler for machines that have none nvcc accepts.

``x86_64-conda-linux-gnu/`` of the prefix holds the programs (``tool``), their shared libraries (``lib``,
found through RPATH, so that no loader path is needed) and the C library they compile for (``sysroot``). GCC
finds its own parts relative to where it is; launchers under ``bin/`` give it ``--sysroot`` and ``-B``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.bridge.debian import Deb, unpack
from ssm_forge.bridge.package import BridgePackage, link
from ssm_forge.errors import MachineError
from ssm_forge.fetch import checked
from ssm_forge.paths import Workspace

_TRIPLET = "x86_64-conda-linux-gnu"
_HOME = Path(_TRIPLET)
_DEBIAN = "x86_64-linux-gnu"
_LICENSE = "GPL-3.0-only WITH GCC-exception-3.1"

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

_LAUNCHER = """\
#!/bin/sh
home="$(dirname "$(readlink -f "$0")")/../{triplet}"
exec "$home/tool/usr/bin/{program}" {options}"$@"
"""
_COMPILER_OPTIONS = '--sysroot="$home/sysroot" -B"$home/tool/usr/bin" '
_BINUTILS = ("ar", "as", "ld", "nm", "objcopy", "objdump", "ranlib", "readelf", "strip")

_ACTIVATE_GCC = f"""\
export CC="$CONDA_PREFIX/bin/{_TRIPLET}-gcc" AR="$CONDA_PREFIX/bin/{_TRIPLET}-ar"
"""
_ACTIVATE_GXX = f"""\
export CXX="$CONDA_PREFIX/bin/{_TRIPLET}-g++"
export NVCC_PREPEND_FLAGS="${{NVCC_PREPEND_FLAGS:+$NVCC_PREPEND_FLAGS }}-ccbin=$CXX"
"""


@dataclass(frozen=True)
class BundledCompiler:
    """A g++ that the bridge brings.

    Attributes:
        debs: the packages it is made of.
    """

    debs: tuple[Deb, ...]

    @property
    def version(self) -> str:
        """Full version, ``11.3.0``."""
        return self._upstream(r"g\+\+-\d+")

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    @property
    def glibc(self) -> str:
        """The C library it compiles for, ``2.36``."""
        return self._upstream("libc6-dev")

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        return f"g++ of Debian {self.debs[0].suite}"

    def _upstream(self, pattern: str) -> str:
        deb = next(d for d in self.debs if re.fullmatch(pattern, d.package))
        return re.split(r"[-+]", deb.version.partition(":")[2] or deb.version)[0]


def bundled_packages(compiler: BundledCompiler, workspace: Workspace) -> list[BridgePackage]:
    """The packages of a bundled compiler, with conda-forge's names."""
    version, major = compiler.version, compiler.major
    programs = _only(compiler.debs, "tool", "lib")
    sysroot = _only(compiler.debs, "sysroot")
    return [
        BridgePackage(
            name="gcc_impl_linux-64",
            version=version,
            inputs=(*_digests(programs), _LAUNCHER, _COMPILER_OPTIONS, *_UNUSED),
            stage=lambda folder: _stage_programs(folder, programs, sysroot, major, workspace),
            # The programs come from the same release as the sysroot, and run on the machine's C library.
            depends=(f"sysroot_linux-64 =={compiler.glibc}", f"__glibc >={compiler.glibc}"),
            license=_LICENSE,
            summary=f"GCC {version} and binutils, relocatable, from Debian {compiler.debs[0].suite}",
            size=sum(deb.size for deb in programs),
        ),
        _activation("gcc_linux-64", version, _ACTIVATE_GCC, ("CC", "AR"), (f"gcc_impl_linux-64 =={version}",)),
        _activation(
            "gxx_linux-64",
            version,
            _ACTIVATE_GXX,
            ("CXX", "NVCC_PREPEND_FLAGS"),
            (f"gcc_linux-64 =={version}",),
            run_exports={"strong": [f"libstdcxx >={major}", f"libgcc >={major}"]},
        ),
        BridgePackage(
            name="sysroot_linux-64",
            version=compiler.glibc,
            inputs=(*_digests(sysroot), *_UNUSED),
            stage=lambda folder: _stage_sysroot(folder / _HOME / "sysroot", sysroot, workspace),
            license="LGPL-2.1-or-later",
            summary=f"glibc {compiler.glibc} headers and libraries to compile for, from Debian",
            size=sum(deb.size for deb in sysroot),
        ),
        _runtime("libstdcxx", "libstdc++6", "libstdc++.so.6", compiler, workspace),
        _runtime("libgcc", "libgcc-s1", "libgcc_s.so.1", compiler, workspace),
    ]


def _only(debs: Iterable[Deb], *parts: str) -> tuple[Deb, ...]:
    return tuple(deb for deb in debs if deb.part in parts)


def _digests(debs: Iterable[Deb]) -> tuple[str, ...]:
    return tuple(deb.sha256 for deb in debs)


def _activation(
    name: str,
    version: str,
    script: str,
    variables: Sequence[str],
    depends: tuple[str, ...],
    run_exports: dict[str, list[str]] | None = None,
) -> BridgePackage:
    def stage(folder: Path) -> None:
        for step, text in (("activate", script), ("deactivate", f"unset {' '.join(variables)}\n")):
            file = folder / f"etc/conda/{step}.d/{step}-{name}.sh"
            file.parent.mkdir(parents=True)
            file.write_text(text)

    return BridgePackage(
        name=name,
        version=version,
        inputs=(script,),
        stage=stage,
        depends=depends,
        run_exports=run_exports or {},
        summary=f"Sets {' and '.join(variables)} to the compiler of this environment",
    )


def _runtime(name: str, package: str, library: str, compiler: BundledCompiler, workspace: Workspace) -> BridgePackage:
    deb = next(d for d in compiler.debs if d.package == package)
    version = re.split(r"[-+]", deb.version)[0]

    def stage(folder: Path) -> None:
        scratch = folder / ".unpacked"
        unpack(checked(deb.artifact(), workspace), scratch)
        found = next(path for path in sorted(scratch.rglob(library)))
        (folder / "lib").mkdir()
        shutil.copy(found.resolve(), folder / "lib" / library)
        shutil.rmtree(scratch)

    return BridgePackage(
        name=name,
        version=version,
        inputs=(deb.sha256,),
        stage=stage,
        license=_LICENSE,
        summary=f"{library} of GCC {version}, from Debian {deb.suite}",
        size=deb.size,
    )


def _stage_programs(
    folder: Path, programs: Sequence[Deb], sysroot: Sequence[Deb], major: int, workspace: Workspace
) -> None:
    home = folder / _HOME
    for deb in _only(programs, "tool"):
        unpack(checked(deb.artifact(), workspace), home / "tool")
    _drop_unused(home / "tool")
    _collect_libraries(_only(programs, "lib"), home, workspace)
    for file in [*_elf_files(home / "tool"), *_elf_files(home / "lib")]:
        _find_libraries_beside(file, home / "lib")
    _point_into_sysroot(home, sysroot, workspace)
    _write_launchers(folder / "bin", major)


def _collect_libraries(debs: Sequence[Deb], home: Path, workspace: Workspace) -> None:
    """The programs' own libraries, in a folder that holds nothing else."""
    scratch = home / ".unpacked"
    (home / "lib").mkdir()
    for deb in debs:
        unpack(checked(deb.artifact(), workspace), scratch)
    for library in sorted(scratch.glob(f"**/{_DEBIAN}/*.so*")):
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
    scratch = home / ".sysroot"
    _stage_sysroot(scratch, sysroot, workspace)
    for name in sorted((home / "tool/usr/lib/gcc").rglob("*.so")):
        if not name.is_symlink() or name.exists():
            continue
        found = next(iter(sorted(scratch.rglob(name.readlink().name))), None)
        name.unlink()
        if found is not None:
            up = "/".join([".."] * len(name.parent.relative_to(home).parts))
            link(f"{up}/sysroot/{found.relative_to(scratch)}", name)
    shutil.rmtree(scratch)


def _stage_sysroot(target: Path, debs: Sequence[Deb], workspace: Workspace) -> None:
    for deb in debs:
        unpack(checked(deb.artifact(), workspace), target)
    _drop_unused(target)


def _drop_unused(root: Path) -> None:
    for pattern in _UNUSED:
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


def _write_launchers(folder: Path, major: int) -> None:
    folder.mkdir()
    launchers: dict[str, tuple[str, str]] = {
        name: (f"{_DEBIAN}-{program}-{major}", _COMPILER_OPTIONS)
        for name, program in (("gcc", "gcc"), ("cc", "gcc"), ("g++", "g++"), ("c++", "g++"), ("cpp", "cpp"))
    }
    launchers |= {name: (f"{_DEBIAN}-{name}", "") for name in _BINUTILS}
    for name, (program, options) in launchers.items():
        path = folder / f"{_TRIPLET}-{name}"
        path.write_text(_LAUNCHER.format(triplet=_TRIPLET, program=program, options=options))
        path.chmod(0o755)
