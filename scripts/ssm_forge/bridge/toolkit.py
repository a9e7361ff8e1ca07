"""The CUDA toolkit of a variant as conda packages, in conda-forge's layout.

Tools are in ``bin/`` and ``nvvm/``, headers and libraries under ``targets/x86_64-linux/``; package names are
conda-forge's: ``cuda-nvcc_linux-64``, ``cuda-cudart-dev``, ``cuda-cudart``, ``cuda-version``.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ssm_forge.bridge.package import BridgePackage, link
from ssm_forge.bridge.pylock import LockedWheel
from ssm_forge.fetch import checked
from ssm_forge.paths import Workspace

_TARGET = Path("targets/x86_64-linux")

_NVCC_PROFILE = """\
TOP              = $(_HERE_)/..

CICC_PATH        = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice

LD_LIBRARY_PATH += $(TOP)/lib:
PATH            += $(CICC_PATH):$(_HERE_):

INCLUDES        +=  "-I$(TOP)/targets/x86_64-linux/include" $(_SPACE_)
SYSTEM_INCLUDES +=  "-isystem" "$(TOP)/targets/x86_64-linux/include/cccl" $(_SPACE_)

LIBRARIES        =+ $(_SPACE_) "-L$(TOP)/targets/x86_64-linux/lib/stubs" "-L$(TOP)/targets/x86_64-linux/lib"

CUDAFE_FLAGS    +=
PTXAS_FLAGS     +=
"""


def toolkit_packages(wheels: Sequence[LockedWheel], cuda: str, workspace: Workspace) -> list[BridgePackage]:
    """The packages of a toolkit that comes as wheels (CUDA 13).

    Args:
        wheels: the toolkit lock.
        cuda: CUDA release, ``13.0``.
    """
    by_name = {wheel.name: wheel for wheel in wheels}
    nvcc = by_name["nvidia-cuda-nvcc"]
    runtime = by_name["nvidia-cuda-runtime"]
    compiler_parts = [nvcc, by_name["nvidia-nvvm"], by_name["nvidia-cuda-crt"]]
    header_parts = [runtime, by_name["nvidia-cuda-cccl"]]
    major = int(cuda.split(".")[0])
    pin = f"cuda-version {cuda}.*"
    return [
        BridgePackage(
            name="cuda-version",
            version=cuda,
            inputs=(cuda,),
            stage=lambda folder: None,
            summary="Metapackage to select a CUDA release",
        ),
        BridgePackage(
            name="cuda-nvcc_linux-64",
            version=nvcc.version,
            inputs=tuple(wheel.artifact.sha256 for wheel in compiler_parts),
            stage=lambda folder: _stage_compiler(folder, compiler_parts, workspace),
            depends=(pin, "cuda-cudart-dev"),
            license="LicenseRef-NVIDIA-End-User-License-Agreement",
            summary="NVIDIA's CUDA compiler",
            size=sum(wheel.artifact.size for wheel in compiler_parts),
        ),
        BridgePackage(
            name="cuda-cudart-dev",
            version=runtime.version,
            inputs=tuple(wheel.artifact.sha256 for wheel in header_parts),
            stage=lambda folder: _stage_headers(folder, header_parts, major, workspace),
            depends=(pin, f"cuda-cudart =={runtime.version}"),
            run_exports={"weak": [f"cuda-cudart >={cuda},<{major + 1}"]},
            license="LicenseRef-NVIDIA-End-User-License-Agreement",
            summary="CUDA runtime headers, with libcu++, CUB and Thrust",
            size=sum(wheel.artifact.size for wheel in header_parts),
        ),
        BridgePackage(
            name="cuda-cudart",
            version=runtime.version,
            inputs=(runtime.artifact.sha256,),
            stage=lambda folder: _stage_runtime(folder, runtime, major, workspace),
            depends=(f"cuda-version >={cuda},<{major + 1}",),
            license="LicenseRef-NVIDIA-End-User-License-Agreement",
            summary="CUDA runtime library",
            size=runtime.artifact.size,
        ),
    ]


def _unpack(wheels: Sequence[LockedWheel], folder: Path, workspace: Workspace) -> Path:
    """Unpack wheels over each other; returns the toolkit root inside (``nvidia/cu13``)."""
    for wheel in wheels:
        with zipfile.ZipFile(checked(wheel.artifact, workspace)) as archive:
            archive.extractall(folder)
    return next(path.parent for path in sorted(folder.glob("nvidia/*/include")))


def _take(source: Path, target: Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target)


def _stage_compiler(folder: Path, wheels: Sequence[LockedWheel], workspace: Workspace) -> None:
    scratch = folder / ".unpacked"
    root = _unpack(wheels, scratch, workspace)
    _take(root / "bin", folder / "bin")
    _take(root / "nvvm", folder / "nvvm")
    _take(root / "include", folder / _TARGET / "include")
    for library in (root / "lib").glob("libnvvm.so*"):
        _take(library, folder / "nvvm/lib64" / library.name)
    shutil.rmtree(scratch)
    # The profile comes from the wheel's own flat layout; conda's has headers under targets/.
    (folder / "bin/nvcc.profile").write_text(_NVCC_PROFILE)
    # Zip archives drop the permission to execute.
    for tool in [*(folder / "bin").iterdir(), *(folder / "nvvm/bin").iterdir()]:
        if tool.is_file() and tool.name != "nvcc.profile":
            tool.chmod(0o755)


def _stage_headers(folder: Path, wheels: Sequence[LockedWheel], major: int, workspace: Workspace) -> None:
    scratch = folder / ".unpacked"
    root = _unpack(wheels, scratch, workspace)
    _take(root / "include", folder / _TARGET / "include")
    for archive in (root / "lib").glob("*.a"):
        _take(archive, folder / _TARGET / "lib" / archive.name)
    shutil.rmtree(scratch)
    link(f"libcudart.so.{major}", folder / "lib/libcudart.so")


def _stage_runtime(folder: Path, wheel: LockedWheel, major: int, workspace: Workspace) -> None:
    scratch = folder / ".unpacked"
    root = _unpack([wheel], scratch, workspace)
    _take(root / f"lib/libcudart.so.{major}", folder / f"lib/libcudart.so.{major}")
    shutil.rmtree(scratch)
