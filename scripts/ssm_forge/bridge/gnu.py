"""A C and C++ compiler as conda packages, named, laid out and activated as conda-forge's.

``gcc_impl`` and ``gxx_impl`` hold ``bin/x86_64-conda-linux-gnu-g++`` and so on: launchers of programs that are on the
machine (:mod:`.compiler`) or in the package (:mod:`.gcc`). Beside GCC's own specs (``builtin.specs``) lies a ``specs``
file that adds ``PREFIX/lib`` to the rpath of everything that is linked, as conda-forge's GCC has one; the launchers
make GCC read it. ``gcc_linux-64`` and ``gxx_linux-64`` activate: bare names of the compilers, flags, the sysroot. The
names say what is compiled for, which is another platform than the package's where a compiler is a cross compiler.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base.errors import BuildError
from ssm_forge.base.platforms import Platform
from ssm_forge.bridge.package import PREFIX, BridgePackage, hash_text, link

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

# By the machine that is compiled for; conda-forge's for each.
_OPTIMISATION = {
    "x86_64": "-march=nocona -mtune=haswell -ftree-vectorize -fPIC -fstack-protector-strong -fno-plt -O2 "
    "-ffunction-sections -pipe",
    "aarch64": "-ftree-vectorize -fPIC -fstack-protector-strong -fno-plt -O3 -pipe",
}
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
        target: what is compiled for.
        runs_on: where the programs run; another platform for a cross compiler.
        version: GCC's, in full.
        binutils: version of assembler and linker.
        glibc: version of the C library that is compiled for.
        kernel: version of the Linux headers.
        inputs: what the programs are, for the build strings.
        commands: program -> the words that start it in a shell, where ``$prefix`` is the environment.
        specs: the specs that GCC was built with, asked for when its package is made.
        stage: package name, without what is compiled for -> puts the files there that are more than launchers.
        depends: package name likewise -> requirements beside those of every compiler.
        runtime: package name -> its version, and what it is made from.
        origin: for people.
        sizes: package name likewise -> bytes.
    """

    target: Platform
    runs_on: Platform
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


def specs_folder(target: Platform, version: str) -> str:
    """Where the specs of a GCC that compiles for ``target`` lie below the prefix."""
    return f"lib/gcc/{target.triple}/{version}"


def packages(tools: Toolchain) -> list[BridgePackage]:
    """The packages of a compiler, from what its programs are and where they come from."""
    kernel, sysroot = _c_library(tools)
    ld_impl, binutils_impl, binutils = _binutils(tools, sysroot)
    needs = (binutils.spec, sysroot.spec)
    gcc_impl, gxx_impl = _compilers(tools, binutils_impl, sysroot)
    text = _activations(tools)
    gcc = _package(
        tools,
        "gcc",
        tools.version,
        _writes(text["gcc"]),
        inputs=tuple(text["gcc"].values()),
        depends=(gcc_impl.spec, *needs),
        run_exports={"strong": [f"libgcc >={tools.major}"]},
        summary="Sets CC and the flags of C to those of this environment",
    )
    gxx = _package(
        tools,
        "gxx",
        tools.version,
        _writes(text["gxx"]),
        inputs=tuple(text["gxx"].values()),
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
        name=f"{name}_{tools.target.subdir}",
        version=version,
        inputs=(*tools.inputs, *inputs),
        stage=stage,
        depends=(*depends, *tools.depends.get(name, ())),
        run_exports=run_exports or {},
        prefixed=prefixed,
        license=LICENSE,
        summary=summary,
        size=tools.sizes.get(name, 0),
        platform=tools.runs_on,
    )


def _launched(tools: Toolchain) -> tuple[str, ...]:
    """What launchers are made from. By build, for one channel may hold the same version from two places."""
    return (_LAUNCHER, *(f"{name} {command}" for name, command in sorted(tools.commands.items())))


def _programs(tools: Toolchain, name: str, programs: Sequence[str]) -> Callable[[Path], None]:
    """Puts the files of package ``name`` and the launchers of its programs there."""

    def stage(folder: Path) -> None:
        if name in tools.stage:
            tools.stage[name](folder)
        write_launchers(folder / "bin", programs, tools)

    return stage


def _c_library(tools: Toolchain) -> tuple[BridgePackage, BridgePackage]:
    """The Linux headers, and the C library to compile for."""
    kernel = _package(
        tools,
        "kernel-headers",
        tools.kernel,
        tools.stage.get("kernel-headers", lambda folder: None),
        summary=f"Linux headers of {tools.origin}",
    )
    sysroot = _package(
        tools,
        "sysroot",
        tools.glibc,
        tools.stage.get("sysroot", lambda folder: None),
        depends=(kernel.spec,),
        run_exports={"strong": [f"__glibc >={tools.glibc},<3.0.a0"]},
        summary=f"glibc {tools.glibc} to compile for: {tools.origin}",
    )
    return kernel, sysroot


def _binutils(tools: Toolchain, sysroot: BridgePackage) -> tuple[BridgePackage, BridgePackage, BridgePackage]:
    """The linker, the other programs of binutils, and what activates both."""
    ld_impl = _package(
        tools,
        "ld_impl",
        tools.binutils,
        _programs(tools, "ld_impl", LINKER_PROGRAMS),
        inputs=_launched(tools),
        summary=f"The linker of {tools.origin}",
    )
    binutils_impl = _package(
        tools,
        "binutils_impl",
        tools.binutils,
        _programs(tools, "binutils_impl", BINUTILS_PROGRAMS),
        inputs=_launched(tools),
        depends=(ld_impl.spec, sysroot.spec),
        summary=f"Assembler and archiver of {tools.origin}",
    )
    scripts = _activations(tools)["binutils"]
    binutils = _package(
        tools,
        "binutils",
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
    specs = specs_folder(tools.target, tools.version)

    def stage_gcc(folder: Path) -> None:
        _programs(tools, "gcc_impl", GCC_PROGRAMS)(folder)
        target = folder / specs
        target.mkdir(parents=True, exist_ok=True)
        builtin = tools.specs(folder)
        (target / "builtin.specs").write_text(builtin)
        (target / "specs").write_text(with_rpath(builtin))

    # A cross compiler's own libraries are for another platform.
    newer = f" >={tools.major}" if tools.runs_on == tools.target else ""
    gcc_impl = _package(
        tools,
        "gcc_impl",
        tools.version,
        stage_gcc,
        inputs=_launched(tools),
        depends=(binutils_impl.spec, *(f"{name}{newer}" for name in ("libgcc", "libstdcxx")), sysroot.spec),
        prefixed=(f"{specs}/specs",),
        summary=f"GCC {tools.version}: {tools.origin}",
    )
    gxx_impl = _package(
        tools,
        "gxx_impl",
        tools.version,
        _programs(tools, "gxx_impl", GXX_PROGRAMS),
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
            platform=tools.target,
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
        path = folder / f"{tools.target.triple}-{name}"
        path.write_text(_LAUNCHER.format(identity=identity, command=tools.commands[name]))
        path.chmod(0o755)
        if name in _ALIASES:
            link(path.name, folder / f"{tools.target.triple}-{_ALIASES[name]}")


def _writes(files: Mapping[str, str]) -> Callable[[Path], None]:
    def stage(folder: Path) -> None:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return stage


def _variables(tools: Toolchain) -> dict[str, list[tuple[str, str]]]:
    """What each package activates: variables and their values, in the shell's words."""
    triple, own_triple, optimisation = tools.target.triple, tools.runs_on.triple, _OPTIMISATION[tools.target.machine]
    binutils = [
        (name.upper().replace("C++FILT", "CXXFILT"), f"{triple}-{name}")
        for name in (*LINKER_PROGRAMS, *BINUTILS_PROGRAMS)
        if name in tools.commands
    ]
    own = [(name.upper().replace("-", "_"), f"{triple}-{name}") for name in GCC_PROGRAMS if name in tools.commands]
    c = [
        ("HOST", triple),
        ("BUILD", own_triple),
        ("CONDA_TOOLCHAIN_HOST", triple),
        ("CONDA_TOOLCHAIN_BUILD", own_triple),
        ("CC", f"{triple}-cc"),
        ("CC_FOR_BUILD", f"{own_triple}-cc"),
        *own,
        ("CPPFLAGS", "-DNDEBUG -D_FORTIFY_SOURCE=2 -O2 -isystem $_forge_prefix/include${CPPFLAGS:+ $CPPFLAGS}"),
        ("CFLAGS", f"{optimisation} -isystem $_forge_prefix/include$_forge_maps${{CFLAGS:+ $CFLAGS}}"),
        ("LDFLAGS", f"{_LINKING}${{LDFLAGS:+ $LDFLAGS}}"),
        ("CONDA_BUILD_SYSROOT", f'$(root=$("$CONDA_PREFIX/bin/{triple}-gcc" -print-sysroot); echo "${{root:-/}}")'),
    ]
    cxx = [
        ("CXX", f"{triple}-c++"),
        ("CXX_FOR_BUILD", f"{own_triple}-c++"),
        ("GXX", f"{triple}-g++"),
        (
            "CXXFLAGS",
            f"-fvisibility-inlines-hidden -fmessage-length=0 {optimisation} -isystem $_forge_prefix/include"
            "$_forge_maps${CXXFLAGS:+ $CXXFLAGS}",
        ),
    ]
    return {"binutils": binutils, "gcc": c, "gxx": cxx}


def _activations(tools: Toolchain) -> dict[str, dict[str, str]]:
    """Which scripts activate each package."""
    found = {}
    for name, variables in _variables(tools).items():
        flags = any("_forge_" in value for _, value in variables)
        file = f"{{step}}-{name}_{tools.target.subdir}.sh"
        found[name] = activation_scripts(file, variables, *((_FLAGS, _FLAGS_END) if flags else ()))
    return found


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
