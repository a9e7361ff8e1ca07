"""The CUDA toolkit of a variant as conda packages, named, laid out and activated as its channel has them.

Where conda-forge has the compiler, its layout is taken (:mod:`.toolkit_conda_forge`). CUDA 11.8 is as NVIDIA's own
channel has it: ``cuda-nvcc``, ``cuda-cccl`` and so on with all files at the prefix's root, and nothing activated.
"""

from __future__ import annotations

from pathlib import Path

from ssm_forge.base.paths import Workspace
from ssm_forge.bridge import toolkit_conda_forge
from ssm_forge.bridge.package import BridgePackage, link
from ssm_forge.bridge.toolkit_parts import Maker, ToolkitParts
from ssm_forge.bridge.toolkit_scripts import PROFILE


def toolkit_packages(parts: ToolkitParts, workspace: Workspace) -> list[BridgePackage]:
    """The packages of a toolkit, with ``cuda-version`` first; nothing is downloaded until one is staged."""
    make = Maker(parts, workspace)
    packages = _nvidias(make, parts) if parts.cuda == "11.8" else toolkit_conda_forge.packages(make, parts)
    if parts.ptxas is not None:
        moves = ((r"bin/ptxas", "bin/newer-ptxas"),)
        summary = "A newer assembler of NVIDIA's, for GPUs that nvcc does not know"
        packages.append(make("newer-ptxas", [parts.ptxas], moves, summary=summary))
    return [_version(parts), *packages]


def runtime_packages(parts: ToolkitParts, workspace: Workspace) -> list[BridgePackage]:
    """Those of a toolkit that an environment without a compiler has, and that is compiled for; from CUDA 12 on."""
    return [_version(parts), *toolkit_conda_forge.runtime_packages(Maker(parts, workspace), parts)]


def _version(parts: ToolkitParts) -> BridgePackage:
    return BridgePackage(
        name="cuda-version",
        version=parts.cuda,
        inputs=(parts.cuda,),
        stage=lambda folder: None,
        constrains=(f"__cuda >={parts.major}", f"cudatoolkit {parts.cuda}|{parts.cuda}.*"),
        summary="Metapackage to select a CUDA release",
        platform=parts.runs_on,
    )


def _nvidias(make: Maker, parts: ToolkitParts) -> list[BridgePackage]:
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
            texts={"bin/nvcc.profile": PROFILE.format(root="")},
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
