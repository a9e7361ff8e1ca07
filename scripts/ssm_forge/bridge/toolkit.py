"""The CUDA toolkit of a variant as conda packages, named, laid out and activated as conda-forge's.

Tools are in ``bin/`` and ``nvvm/``, headers and libraries under ``targets/x86_64-linux/``, with links to the libraries
in ``lib/``; ``cuda-nvcc_linux-64`` activates nvcc with the environment's compiler. CUDA 11.8 is as NVIDIA's own channel
has it, for conda-forge has no such compiler: ``cuda-nvcc``, ``cuda-cccl`` and so on with all files at the prefix's
root, and nothing activated. Up to CUDA 12 the wheels hold neither nvcc nor cicc nor cudafe++: those come from Debian's
package of the same toolkit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base.paths import Workspace
from ssm_forge.bridge.debian import Deb
from ssm_forge.bridge.metadata import project
from ssm_forge.bridge.nvidia import LICENSE, Moves, file_names, find_libraries_beside, place
from ssm_forge.bridge.package import BridgePackage, link
from ssm_forge.bridge.pylock import LockedWheel

_TARGET = "targets/x86_64-linux"

_PROFILE = """\
TOP              = $(_HERE_)/..

CICC_PATH        = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice

LD_LIBRARY_PATH += $(TOP)/lib:
PATH            += $(CICC_PATH):$(_HERE_):

INCLUDES        +=  "-I$(TOP)/{root}include" $(_SPACE_)
SYSTEM_INCLUDES +=  "-isystem" "$(TOP)/{root}include/cccl" $(_SPACE_)

LIBRARIES        =+ $(_SPACE_) "-L$(TOP)/{root}lib/stubs" "-L$(TOP)/{root}lib"

CUDAFE_FLAGS    +=
PTXAS_FLAGS     +=
"""

# The last of all scripts: it takes the compiler and adds to the flags that the others have set. What it added is taken
# out again, whatever was put back meanwhile.
_ACTIVATE = f"""\
if [ "${{CONDA_BUILD:-0}}" = 1 ]; then
    _forge_host="$PREFIX/{_TARGET}" _forge_own="$BUILD_PREFIX/{_TARGET}"
else
    _forge_host="$CONDA_PREFIX/{_TARGET}" _forge_own="$CONDA_PREFIX/{_TARGET}"
fi
export SSM_FORGE_NVCC_INCLUDES=" -I$_forge_host/include -I$_forge_own/include"
export SSM_FORGE_NVCC_LIBRARIES=" -L$_forge_host/lib -L$_forge_host/lib/stubs"
export CPPFLAGS="${{CPPFLAGS:-}}$SSM_FORGE_NVCC_INCLUDES" CFLAGS="${{CFLAGS:-}}$SSM_FORGE_NVCC_INCLUDES"
export CXXFLAGS="${{CXXFLAGS:-}}$SSM_FORGE_NVCC_INCLUDES" LDFLAGS="${{LDFLAGS:-}}$SSM_FORGE_NVCC_LIBRARIES"
if [ -n "${{NVCC_PREPEND_FLAGS+x}}" ]; then export SSM_FORGE_BACKUP_NVCC_PREPEND_FLAGS="$NVCC_PREPEND_FLAGS"; fi
if [ -n "${{CUDAARCHS+x}}" ]; then export SSM_FORGE_BACKUP_CUDAARCHS="$CUDAARCHS"; fi
export NVCC_PREPEND_FLAGS="${{NVCC_PREPEND_FLAGS:+$NVCC_PREPEND_FLAGS }}-ccbin=${{CXX:-c++}}" CUDAARCHS=all-major
unset _forge_host _forge_own
"""

_DEACTIVATE = """\
for _forge_name in CPPFLAGS CFLAGS CXXFLAGS LDFLAGS; do
    _forge_added="$SSM_FORGE_NVCC_INCLUDES"
    if [ "$_forge_name" = LDFLAGS ]; then _forge_added="$SSM_FORGE_NVCC_LIBRARIES"; fi
    eval "_forge_value=\\${$_forge_name:-}"
    case "$_forge_value" in
        "$_forge_added") unset "$_forge_name" ;;
        *"$_forge_added"*) export "$_forge_name=${_forge_value%%"$_forge_added"*}${_forge_value#*"$_forge_added"}" ;;
    esac
done
for _forge_name in NVCC_PREPEND_FLAGS CUDAARCHS; do
    eval "_forge_value=\\${SSM_FORGE_BACKUP_$_forge_name-}"
    unset "$_forge_name" "SSM_FORGE_BACKUP_$_forge_name"
    if [ -n "$_forge_value" ]; then export "$_forge_name=$_forge_value"; fi
done
unset _forge_name _forge_added _forge_value SSM_FORGE_NVCC_INCLUDES SSM_FORGE_NVCC_LIBRARIES
"""


@dataclass(frozen=True)
class ToolkitParts:
    """What a toolkit is made from.

    Attributes:
        cuda: CUDA release, ``11.8``.
        wheels: headers and libraries; from CUDA 13 on everything.
        debs: Debian's nvidia-cuda-toolkit; empty from CUDA 13 on.
        newest_gcc: major of the newest GCC that nvcc takes.
        ptxas: of a newer toolkit, for GPUs that this one's nvcc does not know; None where none of them is asked for.
    """

    cuda: str
    wheels: tuple[LockedWheel, ...]
    debs: tuple[Deb, ...] = ()
    newest_gcc: int = 99
    ptxas: LockedWheel | None = None

    @property
    def major(self) -> int:
        return int(self.cuda.split(".")[0])

    def take(self, *names: str) -> list[LockedWheel]:
        """The wheels of these projects (``cuda-nvcc`` for ``nvidia-cuda-nvcc-cu11``) that the lock has."""
        by_name = {project(wheel.name): wheel for wheel in self.wheels}
        return [by_name[name] for name in names if name in by_name]


def toolkit_packages(parts: ToolkitParts, workspace: Workspace) -> list[BridgePackage]:
    """The packages of a toolkit."""
    version = BridgePackage(
        name="cuda-version",
        version=parts.cuda,
        inputs=(parts.cuda,),
        stage=lambda folder: None,
        constrains=(f"__cuda >={parts.major}", f"cudatoolkit {parts.cuda}|{parts.cuda}.*"),
        summary="Metapackage to select a CUDA release",
    )
    make = _Maker(parts, workspace)
    packages = _nvidias(make, parts) if parts.cuda == "11.8" else _conda_forges(make, parts)
    if parts.ptxas is not None:
        moves = ((r"bin/ptxas", "bin/newer-ptxas"),)
        summary = "A newer assembler of NVIDIA's, for GPUs that nvcc does not know"
        packages.append(make("newer-ptxas", [parts.ptxas], moves, summary=summary))
    return [version, *packages]


@dataclass(frozen=True)
class _Maker:
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
        )

    def names(self, wheel: LockedWheel, pattern: str) -> list[str]:
        return file_names(wheel, pattern, self.workspace)


def _conda_forges(make: _Maker, parts: ToolkitParts) -> list[BridgePackage]:
    cuda, major = parts.cuda, parts.major
    nvcc = parts.take("cuda-nvcc", "nvvm", "cuda-crt")
    (runtime,), (cccl,) = parts.take("cuda-runtime"), parts.take("cuda-cccl")
    pin = f"cuda-version {cuda}.*"
    same = nvcc[0].version
    gcc = f"gcc_impl_linux-64 >=6,<{parts.newest_gcc + 1}.0a0"
    run = runtime.version

    def linked(*patterns: str, extra: Sequence[tuple[str, str]] = ()) -> Callable[[Path], None]:
        """Links in ``lib/`` to the libraries of the target folder."""

        def links(folder: Path) -> None:
            for pattern in patterns:
                for name in make.names(runtime, pattern):
                    link(f"../{_TARGET}/lib/{name}", folder / "lib" / name)
            for target, path in extra:
                link(target, folder / path)

        return links

    def development(folder: Path) -> None:
        for name in make.names(runtime, r"lib/libcudart\.so\.\d+(\.\d+)?"):
            link(name, folder / _TARGET / "lib/libcudart.so")

    return [
        make(
            "cuda-nvcc-tools",
            nvcc,
            ((r"bin/crt/.*|bin/nvcc\.profile", None), (r"bin/([^/]+)", r"bin/\1")),
            debs=parts.debs,
            texts={"bin/nvcc.profile": _PROFILE.format(root=f"{_TARGET}/")},
            depends=(f"cuda-crt-tools =={same}", f"cuda-nvvm-tools =={same}", pin, "libgcc", "libstdcxx"),
            constrains=(gcc,),
            summary="NVIDIA's CUDA compiler driver and its tools",
        ),
        make(
            "cuda-crt-tools",
            nvcc,
            ((r"bin/crt/(.*)", r"bin/crt/\1"),),
            debs=parts.debs,
            depends=(pin,),
            summary="Link stubs of NVIDIA's CUDA compiler",
        ),
        make(
            "cuda-nvvm-tools",
            nvcc,
            ((r"nvvm/bin/(.*)", r"nvvm/bin/\1"),),
            debs=parts.debs,
            depends=(pin,),
            summary="NVIDIA's device compiler",
        ),
        make(
            "cuda-nvvm-impl",
            nvcc,
            ((r"(nvvm/(?:libdevice|lib64)/.*)", r"\1"), (r"lib/(libnvvm\.so[^/]*)", r"nvvm/lib64/\1")),
            depends=(pin,),
            summary="Libraries of NVIDIA's device compiler",
        ),
        make(
            "cuda-nvvm-dev_linux-64",
            nvcc,
            ((r"nvvm/include/(.*)|include/(nvvm\.h)", r"nvvm/include/\1\2"),),
            links=lambda folder: link("../../nvvm", folder / _TARGET / "nvvm"),
            depends=(pin,),
            summary="Headers of NVIDIA's device compiler",
        ),
        make(
            "cuda-crt-dev_linux-64",
            nvcc,
            ((r"include/(crt/.*)", rf"{_TARGET}/include/\1"),),
            depends=(pin,),
            summary="Headers that NVIDIA's CUDA compiler includes",
        ),
        make(
            "libnvptxcompiler-dev_linux-64",
            nvcc,
            (
                (r"include/(nvPTXCompiler\.h)", rf"{_TARGET}/include/\1"),
                (r"lib/(libnvptxcompiler_static\.a)", rf"{_TARGET}/lib/\1"),
            ),
            depends=(pin,),
            summary="NVIDIA's PTX compiler as a library",
        ),
        make(
            "cuda-nvcc-dev_linux-64",
            nvcc,
            ((r"include/(?:crt/.*|nvvm\.h|nvPTXCompiler\.h)", None), (r"include/(.*)", rf"{_TARGET}/include/\1")),
            depends=(
                f"cuda-crt-dev_linux-64 =={same}",
                f"cuda-nvvm-dev_linux-64 =={same}",
                f"libnvptxcompiler-dev_linux-64 =={same}",
                pin,
                "libgcc >=6",
            ),
            constrains=(gcc,),
            summary="Headers of NVIDIA's CUDA compiler",
        ),
        make(
            "cuda-nvcc-impl",
            nvcc,
            depends=(
                f"cuda-cudart >={cuda},<{major + 1}.0a0",
                "cuda-cudart-dev",
                f"cuda-nvcc-dev_linux-64 =={same}",
                f"cuda-nvcc-tools =={same}",
                f"cuda-nvvm-impl =={same}",
                pin,
            ),
            constrains=(gcc,),
            summary="NVIDIA's CUDA compiler with all it needs",
        ),
        make(
            "cuda-nvcc_linux-64",
            nvcc,
            texts={
                "etc/conda/activate.d/~cuda-nvcc_activate.sh": _ACTIVATE,
                "etc/conda/deactivate.d/~cuda-nvcc_deactivate.sh": _DEACTIVATE,
            },
            depends=(
                f"cuda-cudart-dev_linux-64 {cuda}.*",
                f"cuda-driver-dev_linux-64 {cuda}.*",
                f"cuda-nvcc-dev_linux-64 {same}.*",
                f"cuda-nvcc-impl {same}.*",
                f"cuda-nvcc-tools {same}.*",
                "sysroot_linux-64",
            ),
            run_exports={"strong": [f"cuda-version >={cuda},<{major + 1}"]},
            summary="Activates NVIDIA's CUDA compiler",
        ),
        make(
            "cuda-nvcc",
            nvcc,
            depends=(f"cuda-nvcc_linux-64 {same}.*", "gcc_linux-64", "gxx_linux-64"),
            summary="NVIDIA's CUDA compiler and a host compiler",
        ),
        make(
            "cuda-cudart_linux-64",
            [runtime],
            ((r"lib/(libcudart\.so\.[^/]+)", rf"{_TARGET}/lib/\1"),),
            depends=(pin,),
            summary="CUDA runtime library",
        ),
        make(
            "cuda-cudart",
            [runtime],
            links=linked(r"lib/libcudart\.so\.[^/]+"),
            depends=(f"cuda-cudart_linux-64 =={run}", f"cuda-version >={cuda},<{major + 1}"),
            summary="CUDA runtime library",
        ),
        make(
            "cuda-cudart-static_linux-64",
            [runtime],
            ((r"lib/([^/]+\.a)", rf"{_TARGET}/lib/\1"),),
            depends=(pin,),
            summary="CUDA runtime library to link statically",
        ),
        make(
            "cuda-cudart-static",
            [runtime],
            links=linked(r"lib/[^/]+\.a"),
            depends=(f"cuda-cudart-static_linux-64 =={run}", pin),
            summary="CUDA runtime library to link statically",
        ),
        make(
            "cuda-cudart-dev_linux-64",
            [runtime],
            ((r"include/(.*)", rf"{_TARGET}/include/\1"),),
            links=development,
            depends=(
                "cuda-cccl_linux-64",
                f"cuda-cudart-static_linux-64 =={run}",
                f"cuda-cudart_linux-64 =={run}",
                pin,
            ),
            summary="CUDA runtime headers",
        ),
        make(
            "cuda-cudart-dev",
            [runtime],
            links=linked(extra=((f"../{_TARGET}/lib/libcudart.so", "lib/libcudart.so"),)),
            depends=(
                f"cuda-cudart =={run}",
                f"cuda-cudart-dev_linux-64 =={run}",
                f"cuda-cudart-static =={run}",
                pin,
            ),
            run_exports={"weak": [f"cuda-cudart >={cuda},<{major + 1}.0a0"]},
            summary="CUDA runtime headers",
        ),
        make(
            "cuda-driver-dev_linux-64",
            [runtime],
            depends=(pin,),
            summary="Stands for the driver's stub library, which no wheel has",
        ),
        make(
            "cuda-cccl_linux-64",
            [cccl],
            ((r"include/(.*)", rf"{_TARGET}/include/\1"),),
            depends=(pin,),
            summary="libcu++, CUB and Thrust",
        ),
        make("cuda-cccl", [cccl], depends=("cuda-cccl_linux-64", pin), summary="libcu++, CUB and Thrust"),
    ]


def _nvidias(make: _Maker, parts: ToolkitParts) -> list[BridgePackage]:
    nvcc = parts.take("cuda-nvcc")
    (runtime,), (cccl,) = parts.take("cuda-runtime"), parts.take("cuda-cccl")

    def development(folder: Path) -> None:
        for name in make.names(runtime, r"lib/libcudart\.so\.\d+(\.\d+)?"):
            link(name, folder / "lib/libcudart.so")

    packages = [
        make(
            "cuda-nvcc",
            nvcc,
            ((r"bin/nvcc\.profile", None), (r"((?:bin|nvvm|include|lib)/.*)", r"\1")),
            debs=parts.debs,
            texts={"bin/nvcc.profile": _PROFILE.format(root="")},
            summary="NVIDIA's CUDA compiler",
        ),
        make("cuda-cudart", [runtime], ((r"(lib/libcudart\.so\..*)", r"\1"),), summary="CUDA runtime library"),
        make(
            "cuda-cudart-dev",
            [runtime],
            ((r"(include/.*|lib/[^/]+\.a)", r"\1"),),
            links=development,
            depends=("cuda-cccl", f"cuda-cudart >={runtime.version}"),
            summary="CUDA runtime headers",
        ),
        make("cuda-cccl", [cccl], ((r"(include/.*)", r"\1"),), summary="libcu++, CUB and Thrust"),
    ]
    for cudnn in parts.take("cudnn"):
        packages.append(
            make(
                "cudnn",
                [cudnn],
                ((r"(include/.*|lib/.*\.so.*)", r"\1"),),
                depends=(f"cuda-version >={parts.major},<{parts.major + 1}",),
                run_exports={"weak": [f"cudnn >={cudnn.version},<{int(cudnn.version.split('.')[0]) + 1}"]},
                license_name="LicenseRef-cuDNN-Software-License-Agreement",
                summary="NVIDIA's library of primitives for deep neural networks",
            )
        )
    return packages
