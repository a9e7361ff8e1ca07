"""CUDA toolkits as conda packages."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from ssm_forge.bridge.debian import Deb
from ssm_forge.bridge.package import BridgePackage
from ssm_forge.bridge.pylock import LockedWheel
from ssm_forge.bridge.toolkit import ToolkitParts, toolkit_packages
from ssm_forge.fetch import Artifact
from ssm_forge.paths import Workspace

_DEBIAN = "usr/lib/nvidia-cuda-toolkit"


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path / "root", cache=tmp_path / "cache")


def keep(place: Workspace, name: str, data: bytes) -> Artifact:
    artifact = Artifact(f"https://x/pool/{name}", hashlib.sha256(data).hexdigest(), len(data), name)
    path = place.downloads / artifact.sha256 / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return artifact


def wheel(place: Workspace, name: str, version: str, *files: str) -> LockedWheel:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        # As in NVIDIA's wheels.
        archive.writestr("nvidia/__init__.py", "")
        for file in files:
            archive.writestr(f"nvidia/{file}", f"{name} {file}")
        for folder in {file.split("/")[0] for file in files}:
            archive.writestr(f"nvidia/{folder}/__init__.py", "")
    tagged = f"{name.replace('-', '_')}-{version}-py3-none-manylinux1_x86_64.whl"
    return LockedWheel(name, version, keep(place, tagged, data.getvalue()))


def toolkit_deb(place: Workspace) -> Deb:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name in (
            *("usr/bin/nvcc", "usr/bin/ptxas", "usr/bin/cudafe++", "usr/bin/compute-sanitizer"),
            *(f"{_DEBIAN}/bin/nvcc", f"{_DEBIAN}/bin/cicc", f"{_DEBIAN}/bin/crt/link.stub"),
        ):
            content = f"debian {name}".encode()
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    package = b"!<arch>\n" + f"{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{0:<8}{len(data.getvalue()):<10}`\n".encode()
    artifact = keep(place, "nvidia-cuda-toolkit.deb", package + data.getvalue())
    return Deb("nvidia-cuda-toolkit", "11.8.89~x", "tin", "non-free", artifact.url, artifact.sha256, artifact.size)


@pytest.fixture
def classic(place: Workspace) -> dict[str, BridgePackage]:
    wheels = (
        wheel(
            place,
            "nvidia-cuda-nvcc-cu11",
            "11.8.89",
            "cuda_nvcc/bin/ptxas",
            "cuda_nvcc/include/crt/host_config.h",
            "cuda_nvcc/nvvm/libdevice/libdevice.10.bc",
        ),
        wheel(
            place,
            "nvidia-cuda-runtime-cu11",
            "11.8.89",
            "cuda_runtime/include/cuda.h",
            "cuda_runtime/lib/libcudart.so.11.0",
        ),
        wheel(place, "nvidia-cuda-cccl-cu11", "11.8.89.post1", "cuda_cccl/include/cub/cub.cuh"),
        wheel(
            place,
            "nvidia-cudnn-cu11",
            "8.9.6.50",
            "cudnn/include/cudnn_version.h",
            "cudnn/lib/libcudnn.so.8",
            "cudnn/lib/libcudnn_ops_infer.so.8",
        ),
    )
    parts = ToolkitParts("11.8", wheels, (toolkit_deb(place),))
    return {package.name: package for package in toolkit_packages(parts, place)}


def staged(package: BridgePackage, folder: Path) -> set[str]:
    folder.mkdir()
    package.stage(folder)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_11_8_has_nvidias_package_names(classic: dict[str, BridgePackage]) -> None:
    names = {name: package.version for name, package in classic.items()}
    assert names == {
        "cuda-version": "11.8",
        "cuda-nvcc": "11.8.89",
        "cuda-cudart-dev": "11.8.89",
        "cuda-cudart": "11.8.89",
        "cuda-cccl": "11.8.89",
        "cudnn": "8.9.6.50",
    }


def test_nvcc_is_debians_and_its_headers_the_wheels(classic: dict[str, BridgePackage], tmp_path: Path) -> None:
    files = staged(classic["cuda-nvcc"], tmp_path / "nvcc")
    assert files == {
        *("bin/nvcc", "bin/nvcc.profile", "bin/ptxas", "bin/cudafe++", "bin/crt/link.stub", "nvvm/bin/cicc"),
        *("nvvm/libdevice/libdevice.10.bc", "targets/x86_64-linux/include/crt/host_config.h"),
        *("etc/conda/activate.d/activate-cuda-nvcc.sh", "etc/conda/deactivate.d/deactivate-cuda-nvcc.sh"),
    }
    assert (tmp_path / "nvcc/bin/nvcc").read_text() == f"debian {_DEBIAN}/bin/nvcc"
    assert (tmp_path / "nvcc/bin/ptxas").read_text() == "debian usr/bin/ptxas"
    assert os.access(tmp_path / "nvcc/nvvm/bin/cicc", os.X_OK)


def test_the_library_path_folder_holds_cudas_libraries_only(classic: dict[str, BridgePackage], tmp_path: Path) -> None:
    assert staged(classic["cuda-cudart"], tmp_path / "cudart") == {
        "lib/libcudart.so.11.0",
        "targets/x86_64-linux/lib/libcudart.so",
        "targets/x86_64-linux/lib/libcudart.so.11.0",
    }
    assert (tmp_path / "cudart/targets/x86_64-linux/lib/libcudart.so").exists()


def test_cudnn_brings_its_version_header(classic: dict[str, BridgePackage], tmp_path: Path) -> None:
    files = staged(classic["cudnn"], tmp_path / "cudnn")
    assert {"include/cudnn_version.h", "lib/libcudnn.so.8", "lib/libcudnn_ops_infer.so.8"} <= files


def test_activation_is_undone_by_deactivation(classic: dict[str, BridgePackage], tmp_path: Path) -> None:
    staged(classic["cuda-nvcc"], tmp_path / "prefix")
    scripts = tmp_path / "prefix/etc/conda"
    probe = f"""
    show() {{ echo "${{CUDA_HOME-unset}} ${{LD_LIBRARY_PATH-unset}}"; }}
    export CONDA_PREFIX=/p LD_LIBRARY_PATH=/mine
    . "{scripts}/activate.d/activate-cuda-nvcc.sh"; show
    . "{scripts}/deactivate.d/deactivate-cuda-nvcc.sh"; show
    """
    done = subprocess.run(["sh", "-eu", "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["/p /p/targets/x86_64-linux/lib:/mine", "unset /mine"]


def test_12_and_newer_have_conda_forges_package_names(place: Workspace, tmp_path: Path) -> None:
    wheels = (
        wheel(place, "nvidia-cuda-nvcc", "13.0.88", "cu13/bin/nvcc"),
        wheel(place, "nvidia-nvvm", "13.0.88", "cu13/nvvm/bin/cicc"),
        wheel(place, "nvidia-cuda-crt", "13.0.88", "cu13/include/crt/host_config.h"),
        wheel(place, "nvidia-cuda-runtime", "13.0.96", "cu13/include/cuda.h", "cu13/lib/libcudart.so.13"),
        wheel(place, "nvidia-cuda-cccl", "13.0.85", "cu13/include/cccl/cub/cub.cuh"),
    )
    packages = {p.name: p for p in toolkit_packages(ToolkitParts("13.0", wheels), place)}
    assert set(packages) == {"cuda-version", "cuda-nvcc_linux-64", "cuda-cudart-dev", "cuda-cudart"}
    assert {"bin/nvcc", "nvvm/bin/cicc"} <= staged(packages["cuda-nvcc_linux-64"], tmp_path / "nvcc")
    headers = staged(packages["cuda-cudart-dev"], tmp_path / "dev")
    assert "targets/x86_64-linux/include/cccl/cub/cub.cuh" in headers
