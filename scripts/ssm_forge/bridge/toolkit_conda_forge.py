"""A CUDA toolkit cut into packages as conda-forge cuts it: from CUDA 12 on.

Tools are in ``bin/`` and ``nvvm/``, headers and libraries under ``targets/x86_64-linux/``, with links to the libraries
in ``lib/``; ``cuda-nvcc_linux-64`` activates nvcc with the environment's compiler. Up to CUDA 12 the wheels hold
neither nvcc nor cicc nor cudafe++: those come from Debian's package of the same toolkit. The names and the folder say
what is compiled for: with another platform's headers and libraries, and a cross compiler, nvcc is one too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ssm_forge.bridge.package import BridgePackage, link
from ssm_forge.bridge.pylock import LockedWheel
from ssm_forge.bridge.toolkit_parts import Maker, ToolkitParts
from ssm_forge.bridge.toolkit_scripts import DEACTIVATE, PROFILE, activate


def packages(make: Maker, parts: ToolkitParts) -> list[BridgePackage]:
    """The packages of a toolkit as conda-forge cuts it."""
    pin = f"cuda-version {parts.cuda}.*"
    return [
        *_programs(make, parts, pin),
        *_headers(make, parts, pin),
        *_compiler(make, parts, pin),
        *runtime_packages(make, parts),
    ]


def runtime_packages(make: Maker, parts: ToolkitParts) -> list[BridgePackage]:
    """Those of what is compiled against and what runs with it, without a compiler."""
    pin = f"cuda-version {parts.cuda}.*"
    return [
        *_runtime(make, parts, pin),
        *_runtime_to_link(make, parts, pin),
        *_templates(make, parts, pin),
    ]


def _gcc(parts: ToolkitParts) -> str:
    """The GCCs that nvcc takes."""
    return f"{parts.called('gcc_impl')} >=6,<{parts.newest_gcc + 1}.0a0"


def _programs(make: Maker, parts: ToolkitParts, pin: str) -> list[BridgePackage]:
    """nvcc and what it starts."""
    nvcc = parts.programs
    same = nvcc[0].version
    return [
        make(
            "cuda-nvcc-tools",
            nvcc,
            ((r"bin/crt/.*|bin/nvcc\.profile", None), (r"bin/([^/]+)", r"bin/\1")),
            debs=parts.debs,
            texts={"bin/nvcc.profile": PROFILE.format(root=f"{parts.target.targets}/")},
            depends=(f"cuda-crt-tools =={same}", f"cuda-nvvm-tools =={same}", pin, "libgcc", "libstdcxx"),
            constrains=(_gcc(parts),),
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
    ]


def _headers(make: Maker, parts: ToolkitParts, pin: str) -> list[BridgePackage]:
    """What nvcc includes, and its parts as libraries."""
    nvcc, target = parts.compiler, parts.target.targets
    same = nvcc[0].version
    return [
        make(
            parts.called("cuda-nvvm-dev"),
            nvcc,
            ((r"nvvm/include/(.*)|include/(nvvm\.h)", r"nvvm/include/\1\2"),),
            links=lambda folder: link("../../nvvm", folder / target / "nvvm"),
            depends=(pin,),
            summary="Headers of NVIDIA's device compiler",
        ),
        make(
            parts.called("cuda-crt-dev"),
            nvcc,
            ((r"include/(crt/.*)", rf"{target}/include/\1"),),
            depends=(pin,),
            summary="Headers that NVIDIA's CUDA compiler includes",
        ),
        make(
            parts.called("libnvptxcompiler-dev"),
            nvcc,
            (
                (r"include/(nvPTXCompiler\.h)", rf"{target}/include/\1"),
                (r"lib/(libnvptxcompiler_static\.a)", rf"{target}/lib/\1"),
            ),
            depends=(pin,),
            summary="NVIDIA's PTX compiler as a library",
        ),
        make(
            parts.called("cuda-nvcc-dev"),
            nvcc,
            ((r"include/(?:crt/.*|nvvm\.h|nvPTXCompiler\.h)", None), (r"include/(.*)", rf"{target}/include/\1")),
            depends=(
                f"{parts.called('cuda-crt-dev')} =={same}",
                f"{parts.called('cuda-nvvm-dev')} =={same}",
                f"{parts.called('libnvptxcompiler-dev')} =={same}",
                pin,
                "libgcc >=6",
            ),
            constrains=(_gcc(parts),),
            summary="Headers of NVIDIA's CUDA compiler",
        ),
    ]


def _compiler(make: Maker, parts: ToolkitParts, pin: str) -> list[BridgePackage]:
    """nvcc with all it needs, and what activates it."""
    nvcc, cuda, major = parts.compiler, parts.cuda, parts.major
    same = nvcc[0].version
    return [
        make(
            "cuda-nvcc-impl",
            nvcc,
            depends=(
                f"cuda-cudart >={cuda},<{major + 1}.0a0",
                "cuda-cudart-dev",
                f"{parts.called('cuda-nvcc-dev')} =={same}",
                f"cuda-nvcc-tools =={same}",
                f"cuda-nvvm-impl =={same}",
                pin,
            ),
            constrains=(_gcc(parts),),
            summary="NVIDIA's CUDA compiler with all it needs",
        ),
        make(
            parts.called("cuda-nvcc"),
            nvcc,
            texts={
                "etc/conda/activate.d/~cuda-nvcc_activate.sh": activate(parts.target),
                "etc/conda/deactivate.d/~cuda-nvcc_deactivate.sh": DEACTIVATE,
            },
            depends=(
                f"{parts.called('cuda-cudart-dev')} {cuda}.*",
                f"{parts.called('cuda-driver-dev')} {cuda}.*",
                f"{parts.called('cuda-nvcc-dev')} {same}.*",
                f"cuda-nvcc-impl {same}.*",
                f"cuda-nvcc-tools {same}.*",
                parts.called("sysroot"),
            ),
            run_exports={"strong": [f"cuda-version >={cuda},<{major + 1}"]},
            summary="Activates NVIDIA's CUDA compiler",
        ),
        make(
            "cuda-nvcc",
            nvcc,
            depends=(f"{parts.called('cuda-nvcc')} {same}.*", parts.called("gcc"), parts.called("gxx")),
            summary="NVIDIA's CUDA compiler and a host compiler",
        ),
    ]


def _libraries(make: Maker, runtime: LockedWheel, pattern: str) -> Callable[[Path], None]:
    """Links in ``lib/`` to those libraries of the target folder whose path in the wheel has this pattern."""

    def links(folder: Path) -> None:
        for name in make.names(runtime, pattern):
            link(f"../{make.parts.target.targets}/lib/{name}", folder / "lib" / name)

    return links


def _runtime(make: Maker, parts: ToolkitParts, pin: str) -> list[BridgePackage]:
    """The CUDA runtime library, shared and static."""
    (runtime,) = parts.take("cuda-runtime")
    run, target = runtime.version, parts.target.targets
    cuda, major = parts.cuda, parts.major
    return [
        make(
            parts.called("cuda-cudart"),
            [runtime],
            ((r"lib/(libcudart\.so\.[^/]+)", rf"{target}/lib/\1"),),
            depends=(pin,),
            summary="CUDA runtime library",
        ),
        make(
            "cuda-cudart",
            [runtime],
            links=_libraries(make, runtime, r"lib/libcudart\.so\.[^/]+"),
            depends=(f"{parts.called('cuda-cudart')} =={run}", f"cuda-version >={cuda},<{major + 1}"),
            summary="CUDA runtime library",
        ),
        make(
            parts.called("cuda-cudart-static"),
            [runtime],
            ((r"lib/([^/]+\.a)", rf"{target}/lib/\1"),),
            depends=(pin,),
            summary="CUDA runtime library to link statically",
        ),
        make(
            "cuda-cudart-static",
            [runtime],
            links=_libraries(make, runtime, r"lib/[^/]+\.a"),
            depends=(f"{parts.called('cuda-cudart-static')} =={run}", pin),
            summary="CUDA runtime library to link statically",
        ),
    ]


def _runtime_to_link(make: Maker, parts: ToolkitParts, pin: str) -> list[BridgePackage]:
    """What is compiled and linked against: the runtime's headers and names."""
    (runtime,) = parts.take("cuda-runtime")
    run, target = runtime.version, parts.target.targets
    cuda, major = parts.cuda, parts.major

    def unversioned(folder: Path) -> None:
        for name in make.names(runtime, r"lib/libcudart\.so\.\d+(\.\d+)?"):
            link(name, folder / target / "lib/libcudart.so")

    return [
        make(
            parts.called("cuda-cudart-dev"),
            [runtime],
            ((r"include/(.*)", rf"{target}/include/\1"),),
            links=unversioned,
            depends=(
                parts.called("cuda-cccl"),
                f"{parts.called('cuda-cudart-static')} =={run}",
                f"{parts.called('cuda-cudart')} =={run}",
                pin,
            ),
            summary="CUDA runtime headers",
        ),
        make(
            "cuda-cudart-dev",
            [runtime],
            links=lambda folder: link(f"../{target}/lib/libcudart.so", folder / "lib/libcudart.so"),
            depends=(
                f"cuda-cudart =={run}",
                f"{parts.called('cuda-cudart-dev')} =={run}",
                f"cuda-cudart-static =={run}",
                pin,
            ),
            run_exports={"weak": [f"cuda-cudart >={cuda},<{major + 1}.0a0"]},
            summary="CUDA runtime headers",
        ),
        make(
            parts.called("cuda-driver-dev"),
            [runtime],
            depends=(pin,),
            summary="Stands for the driver's stub library, which no wheel has",
        ),
    ]


def _templates(make: Maker, parts: ToolkitParts, pin: str) -> list[BridgePackage]:
    """Headers that hold whole algorithms: libcu++, CUB and Thrust."""
    (cccl,) = parts.take("cuda-cccl")
    target = parts.target.targets
    return [
        make(
            parts.called("cuda-cccl"),
            [cccl],
            ((r"include/(.*)", rf"{target}/include/\1"),),
            depends=(pin,),
            summary="libcu++, CUB and Thrust",
        ),
        make("cuda-cccl", [cccl], depends=(parts.called("cuda-cccl"), pin), summary="libcu++, CUB and Thrust"),
    ]
