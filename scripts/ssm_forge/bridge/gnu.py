"""A C and C++ compiler as conda packages, named, laid out and activated as conda-forge's.

``gcc_impl`` and ``gxx_impl`` hold ``bin/x86_64-conda-linux-gnu-g++`` and so on: launchers of programs that are on the
machine (:mod:`.compiler`) or in the package (:mod:`.gcc`). Beside GCC's own specs (``builtin.specs``) lies a ``specs``
file that adds ``PREFIX/lib`` to the rpath of everything that is linked, as conda-forge's GCC has one; the launchers
make GCC read it. ``gcc_linux-64`` and ``gxx_linux-64`` activate: bare names of the compilers, flags, the sysroot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base.errors import BuildError
from ssm_forge.bridge.package import PREFIX, BridgePackage, hash_text, link

TRIPLE = "x86_64-conda-linux-gnu"
LICENSE = "GPL-3.0-only WITH GCC-exception-3.1"

# Name of the program after the triple, by the package that brings it.
GCC_PROGRAMS = ("gcc", "cpp", "gcc-ar", "gcc-nm", "gcc-ranlib")
GXX_PROGRAMS = ("g++",)
LINKER_PROGRAMS = ("ld",)
BINUTILS_PROGRAMS = (
    *("addr2line", "ar", "as", "c++filt", "nm", "objcopy", "objdump", "ranlib", "readelf", "size", "strings", "strip"),
)
# As conda-forge has them: the compile cache tells a GCC by the name of the file that a link leads to.
_ALIASES = {"gcc": "cc", "g++": "c++"}

_LAUNCHER = """\
#!/bin/sh
# {identity}
prefix="$(dirname "$(dirname "$(readlink -f "$0")")")"
exec {command} "$@"
"""

_OPTIMISATION = (
    "-march=nocona -mtune=haswell -ftree-vectorize -fPIC -fstack-protector-strong -fno-plt -O2 -ffunction-sections "
    "-pipe"
)
_LINKING = (
    "-Wl,-O2 -Wl,--sort-common -Wl,--as-needed -Wl,-z,relro -Wl,-z,now -Wl,--disable-new-dtags -Wl,--gc-sections "
    "-Wl,--allow-shlib-undefined -Wl,-rpath,$_forge_prefix/lib -Wl,-rpath-link,$_forge_prefix/lib -L$_forge_prefix/lib"
)
# In a build, flags are about the environment that the result runs in, and no folder of the build may show.
_FLAGS = """\
if [ "${CONDA_BUILD:-0}" = 1 ]; then
    _forge_prefix="$PREFIX"
    _forge_maps=" -fdebug-prefix-map=$SRC_DIR=/usr/local/src/conda/${PKG_NAME:-package}-${PKG_VERSION:-0}"
    _forge_maps="$_forge_maps -fdebug-prefix-map=$PREFIX=/usr/local/src/conda-prefix"
else
    _forge_prefix="$CONDA_PREFIX"
    _forge_maps=""
fi
"""
_FLAGS_END = "unset _forge_prefix _forge_maps\n"


@dataclass(frozen=True)
class Toolchain:
    """What the packages of a compiler are made of.

    Attributes:
        version: GCC's, in full.
        binutils: version of assembler and linker.
        glibc: version of the C library that is compiled for.
        kernel: version of the Linux headers.
        inputs: what the programs are, for the build strings.
        commands: program -> the words that start it in a shell, where ``$prefix`` is the environment.
        specs: the specs that GCC was built with, asked for when its package is made.
        stage: package name -> puts the files there that are more than launchers.
        depends: package name -> requirements beside those of every compiler.
        runtime: package name -> its version, and what it is made from.
        origin: for people.
        sizes: package name -> bytes.
    """

    version: str
    binutils: str
    glibc: str
    kernel: str
    inputs: tuple[str, ...]
    commands: Mapping[str, str]
    specs: Callable[[Path], str]
    stage: Mapping[str, Callable[[Path], None]]
    depends: Mapping[str, tuple[str, ...]]
    runtime: Mapping[str, tuple[str, tuple[str, ...]]]
    origin: str
    sizes: Mapping[str, int]

    @property
    def major(self) -> int:
        """``11`` of ``11.3.0``."""
        return int(self.version.split(".")[0])

    @property
    def specs_folder(self) -> str:
        """Where this GCC's specs lie below the prefix."""
        return specs_folder(self.version)


def specs_folder(version: str) -> str:
    """Where GCC's specs lie below the prefix."""
    return f"lib/gcc/{TRIPLE}/{version}"


def packages(tools: Toolchain) -> list[BridgePackage]:
    """The packages of a compiler, from what its programs are and where they come from."""
    kernel, sysroot = _c_library(tools)
    ld_impl, binutils_impl, binutils = _binutils(tools, sysroot)
    needs = (binutils.spec, sysroot.spec)
    gcc_impl, gxx_impl = _compilers(tools, binutils_impl, sysroot)
    text = {name: _activation(name, variables) for name, variables in _variables(tools).items()}
    gcc = _package(
        tools,
        "gcc_linux-64",
        tools.version,
        _writes(text["gcc_linux-64"]),
        inputs=tuple(text["gcc_linux-64"].values()),
        depends=(gcc_impl.spec, *needs),
        run_exports={"strong": [f"libgcc >={tools.major}"]},
        summary="Sets CC and the flags of C to those of this environment",
    )
    gxx = _package(
        tools,
        "gxx_linux-64",
        tools.version,
        _writes(text["gxx_linux-64"]),
        inputs=tuple(text["gxx_linux-64"].values()),
        depends=(gxx_impl.spec, gcc.spec, *needs),
        run_exports={"strong": [f"libstdcxx >={tools.major}", f"libgcc >={tools.major}"]},
        summary="Sets CXX and the flags of C++ to those of this environment",
    )
    impls = [ld_impl, binutils_impl, binutils, gcc_impl, gxx_impl]
    return [*impls, gcc, gxx, kernel, sysroot, *_runtime_libraries(tools)]


def _package(
    tools: Toolchain,
    name: str,
    version: str,
    stage: Callable[[Path], None],
    *,
    summary: str,
    inputs: Sequence[str] = (),
    depends: Sequence[str] = (),
    run_exports: dict[str, list[str]] | None = None,
    prefixed: tuple[str, ...] = (),
) -> BridgePackage:
    return BridgePackage(
        name=name,
        version=version,
        inputs=(*tools.inputs, *inputs),
        stage=stage,
        depends=(*depends, *tools.depends.get(name, ())),
        run_exports=run_exports or {},
        prefixed=prefixed,
        license=LICENSE,
        summary=summary,
        size=tools.sizes.get(name, 0),
    )


def _launched(tools: Toolchain) -> tuple[str, ...]:
    """What launchers are made from. By build, for one channel may hold the same version from two places."""
    return (_LAUNCHER, *(f"{name} {command}" for name, command in sorted(tools.commands.items())))


def _programs(tools: Toolchain, name: str, programs: Sequence[str]) -> Callable[[Path], None]:
    """Puts the files of package ``name`` and the launchers of its programs there."""

    def stage(folder: Path) -> None:
        tools.stage.get(name, _nothing)(folder)
        write_launchers(folder / "bin", programs, tools)

    return stage


def _c_library(tools: Toolchain) -> tuple[BridgePackage, BridgePackage]:
    """The Linux headers, and the C library to compile for."""
    kernel = _package(
        tools,
        "kernel-headers_linux-64",
        tools.kernel,
        tools.stage.get("kernel-headers_linux-64", _nothing),
        summary=f"Linux headers of {tools.origin}",
    )
    sysroot = _package(
        tools,
        "sysroot_linux-64",
        tools.glibc,
        tools.stage.get("sysroot_linux-64", _nothing),
        depends=(kernel.spec,),
        run_exports={"strong": [f"__glibc >={tools.glibc},<3.0.a0"]},
        summary=f"glibc {tools.glibc} to compile for: {tools.origin}",
    )
    return kernel, sysroot


def _binutils(tools: Toolchain, sysroot: BridgePackage) -> tuple[BridgePackage, BridgePackage, BridgePackage]:
    """The linker, the other programs of binutils, and what activates both."""
    ld_impl = _package(
        tools,
        "ld_impl_linux-64",
        tools.binutils,
        _programs(tools, "ld_impl_linux-64", LINKER_PROGRAMS),
        inputs=_launched(tools),
        summary=f"The linker of {tools.origin}",
    )
    binutils_impl = _package(
        tools,
        "binutils_impl_linux-64",
        tools.binutils,
        _programs(tools, "binutils_impl_linux-64", BINUTILS_PROGRAMS),
        inputs=_launched(tools),
        depends=(ld_impl.spec, sysroot.spec),
        summary=f"Assembler and archiver of {tools.origin}",
    )
    scripts = _activation("binutils_linux-64", _variables(tools)["binutils_linux-64"])
    binutils = _package(
        tools,
        "binutils_linux-64",
        tools.binutils,
        _writes(scripts),
        inputs=tuple(scripts.values()),
        depends=(binutils_impl.spec,),
        summary="Sets AR, AS, LD and so on to those of this environment",
    )
    return ld_impl, binutils_impl, binutils


def _compilers(
    tools: Toolchain, binutils_impl: BridgePackage, sysroot: BridgePackage
) -> tuple[BridgePackage, BridgePackage]:
    """The C compiler with its specs, and the C++ compiler; neither activates anything."""

    def stage_gcc(folder: Path) -> None:
        _programs(tools, "gcc_impl_linux-64", GCC_PROGRAMS)(folder)
        target = folder / tools.specs_folder
        target.mkdir(parents=True, exist_ok=True)
        builtin = tools.specs(folder)
        (target / "builtin.specs").write_text(builtin)
        (target / "specs").write_text(with_rpath(builtin))

    gcc_impl = _package(
        tools,
        "gcc_impl_linux-64",
        tools.version,
        stage_gcc,
        inputs=_launched(tools),
        depends=(binutils_impl.spec, f"libgcc >={tools.major}", f"libstdcxx >={tools.major}", sysroot.spec),
        prefixed=(f"{tools.specs_folder}/specs",),
        summary=f"GCC {tools.version}: {tools.origin}",
    )
    gxx_impl = _package(
        tools,
        "gxx_impl_linux-64",
        tools.version,
        _programs(tools, "gxx_impl_linux-64", GXX_PROGRAMS),
        inputs=_launched(tools),
        depends=(gcc_impl.spec, sysroot.spec),
        summary=f"G++ {tools.version}: {tools.origin}",
    )
    return gcc_impl, gxx_impl


def _runtime_libraries(tools: Toolchain) -> list[BridgePackage]:
    """libstdc++ and libgcc, which what was compiled needs when it runs."""
    return [
        BridgePackage(
            name=name,
            version=version,
            inputs=inputs,
            stage=tools.stage[name],
            license=LICENSE,
            summary=f"GCC's runtime library of {tools.origin}",
            size=tools.sizes.get(name, 0),
        )
        for name, (version, inputs) in tools.runtime.items()
    ]


def with_rpath(specs: str) -> str:
    """GCC's specs with ``PREFIX/lib`` in the rpath of each link that is not static.

    Raises:
        BuildError: when the specs have no command for links.
    """
    changed, count = re.subn(r"(?m)^(\*link_command:\n.*)$", rf"\1 %{{!static:-rpath {PREFIX}/lib}}", specs)
    if count != 1:
        raise BuildError("the compiler's -dumpspecs names no link_command.")
    return changed


def write_launchers(folder: Path, names: Sequence[str], tools: Toolchain) -> None:
    """Write into ``folder`` a script for each of these programs that the toolchain has a command for."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = f"{tools.version} of {tools.origin}, {hash_text(*tools.inputs)[:16]}"
    for name in names:
        if name not in tools.commands:
            continue
        path = folder / f"{TRIPLE}-{name}"
        path.write_text(_LAUNCHER.format(identity=identity, command=tools.commands[name]))
        path.chmod(0o755)
        if name in _ALIASES:
            link(path.name, folder / f"{TRIPLE}-{_ALIASES[name]}")


def _nothing(folder: Path) -> None:
    pass


def _writes(files: Mapping[str, str]) -> Callable[[Path], None]:
    def stage(folder: Path) -> None:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return stage


def _variables(tools: Toolchain) -> dict[str, list[tuple[str, str]]]:
    """What each package activates: variables and their values, in the shell's words."""
    binutils = [
        (name.upper().replace("C++FILT", "CXXFILT"), f"{TRIPLE}-{name}")
        for name in (*LINKER_PROGRAMS, *BINUTILS_PROGRAMS)
        if name in tools.commands
    ]
    own = [(name.upper().replace("-", "_"), f"{TRIPLE}-{name}") for name in GCC_PROGRAMS if name in tools.commands]
    c = [
        ("HOST", TRIPLE),
        ("BUILD", TRIPLE),
        ("CONDA_TOOLCHAIN_HOST", TRIPLE),
        ("CONDA_TOOLCHAIN_BUILD", TRIPLE),
        ("CC", f"{TRIPLE}-cc"),
        ("CC_FOR_BUILD", f"{TRIPLE}-cc"),
        *own,
        ("CPPFLAGS", "-DNDEBUG -D_FORTIFY_SOURCE=2 -O2 -isystem $_forge_prefix/include${CPPFLAGS:+ $CPPFLAGS}"),
        ("CFLAGS", f"{_OPTIMISATION} -isystem $_forge_prefix/include$_forge_maps${{CFLAGS:+ $CFLAGS}}"),
        ("LDFLAGS", f"{_LINKING}${{LDFLAGS:+ $LDFLAGS}}"),
        ("CONDA_BUILD_SYSROOT", f'$(root=$("$CONDA_PREFIX/bin/{TRIPLE}-gcc" -print-sysroot); echo "${{root:-/}}")'),
    ]
    cxx = [
        ("CXX", f"{TRIPLE}-c++"),
        ("CXX_FOR_BUILD", f"{TRIPLE}-c++"),
        ("GXX", f"{TRIPLE}-g++"),
        (
            "CXXFLAGS",
            f"-fvisibility-inlines-hidden -fmessage-length=0 {_OPTIMISATION} -isystem $_forge_prefix/include"
            "$_forge_maps${CXXFLAGS:+ $CXXFLAGS}",
        ),
    ]
    return {"binutils_linux-64": binutils, "gcc_linux-64": c, "gxx_linux-64": cxx}


def _activation(name: str, variables: Sequence[tuple[str, str]]) -> dict[str, str]:
    flags = any("_forge_" in value for _, value in variables)
    return activation_scripts(f"{{step}}-{name}.sh", variables, _FLAGS if flags else "", _FLAGS_END if flags else "")


def activation_scripts(
    file: str, variables: Sequence[tuple[str, str]], before: str = "", after: str = ""
) -> dict[str, str]:
    """Scripts that set variables, and that put back what was there: path below the prefix -> text.

    Args:
        file: name of the scripts, with ``{step}`` for activate or deactivate.
        variables: names, and values in the words of a shell within double quotes.
    """
    set_all, put_back = [], []
    for name, value in variables:
        set_all += [
            f'if [ -n "${{{name}+x}}" ]; then export SSM_FORGE_BACKUP_{name}="${name}"; fi',
            f'export {name}="{value}"',
        ]
        put_back += [
            f'if [ -n "${{SSM_FORGE_BACKUP_{name}+x}}" ]; then',
            f'    export {name}="$SSM_FORGE_BACKUP_{name}"; unset SSM_FORGE_BACKUP_{name}',
            f"else unset {name}; fi",
        ]
    return {
        f"etc/conda/{step}.d/{file.format(step=step)}": text
        for step, text in (
            ("activate", before + "\n".join(set_all) + "\n" + after),
            ("deactivate", "\n".join(put_back) + "\n"),
        )
    }
