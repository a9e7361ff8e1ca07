"""CUDA toolkits as conda packages."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.fetch import Artifact
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge.debian import Deb
from ssm_forge.bridge.package import BridgePackage
from ssm_forge.bridge.pylock import LockedWheel
from ssm_forge.bridge.toolkit import toolkit_packages
from ssm_forge.bridge.toolkit_parts import ToolkitParts

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


def test_11_8_lies_at_the_root_as_in_nvidias_channel_and_activates_nothing(
    classic: dict[str, BridgePackage], tmp_path: Path
) -> None:
    files = staged(classic["cuda-nvcc"], tmp_path / "nvcc")
    assert files == {
        *("bin/nvcc", "bin/nvcc.profile", "bin/ptxas", "bin/cudafe++", "bin/crt/link.stub", "nvvm/bin/cicc"),
        *("nvvm/libdevice/libdevice.10.bc", "include/crt/host_config.h"),
    }
    assert (tmp_path / "nvcc/bin/nvcc").read_text() == f"debian {_DEBIAN}/bin/nvcc"
    assert (tmp_path / "nvcc/bin/ptxas").read_text() == "debian usr/bin/ptxas"
    assert '"-I$(TOP)/include"' in (tmp_path / "nvcc/bin/nvcc.profile").read_text()
    assert os.access(tmp_path / "nvcc/nvvm/bin/cicc", os.X_OK)
    assert staged(classic["cuda-cudart"], tmp_path / "cudart") == {"lib/libcudart.so.11.0"}
    assert staged(classic["cuda-cudart-dev"], tmp_path / "dev") == {"include/cuda.h", "lib/libcudart.so"}
    assert not any(classic[name].run_exports for name in ("cuda-nvcc", "cuda-cudart-dev", "cuda-cccl"))


def test_cudnn_brings_its_version_header(classic: dict[str, BridgePackage], tmp_path: Path) -> None:
    files = staged(classic["cudnn"], tmp_path / "cudnn")
    assert {"include/cudnn_version.h", "lib/libcudnn.so.8", "lib/libcudnn_ops_infer.so.8"} <= files


@pytest.fixture
def modern(place: Workspace) -> dict[str, BridgePackage]:
    wheels = (
        wheel(
            *(place, "nvidia-cuda-nvcc", "13.0.88", "cu13/bin/nvcc", "cu13/bin/nvcc.profile", "cu13/bin/ptxas"),
            *("cu13/bin/crt/link.stub", "cu13/include/fatbinary_section.h"),
        ),
        wheel(place, "nvidia-nvvm", "13.0.88", "cu13/nvvm/bin/cicc", "cu13/include/nvvm.h", "cu13/lib/libnvvm.so.4"),
        wheel(place, "nvidia-cuda-crt", "13.0.88", "cu13/include/crt/host_config.h"),
        wheel(
            *(place, "nvidia-cuda-runtime", "13.0.96", "cu13/include/cuda.h", "cu13/lib/libcudart.so.13"),
            "cu13/lib/libcudart_static.a",
        ),
        wheel(place, "nvidia-cuda-cccl", "13.0.85", "cu13/include/cccl/cub/cub.cuh"),
    )
    return {p.name: p for p in toolkit_packages(ToolkitParts("13.0", wheels, newest_gcc=15), place)}


def test_12_and_newer_are_conda_forges_packages(modern: dict[str, BridgePackage], tmp_path: Path) -> None:
    target = "targets/x86_64-linux"
    assert {name: staged(package, tmp_path / name) for name, package in modern.items() if package.size} == {
        "cuda-nvcc-tools": {"bin/nvcc", "bin/nvcc.profile", "bin/ptxas"},
        "cuda-crt-tools": {"bin/crt/link.stub"},
        "cuda-nvvm-tools": {"nvvm/bin/cicc"},
        "cuda-nvvm-impl": {"nvvm/lib64/libnvvm.so.4"},
        "cuda-nvvm-dev_linux-64": {"nvvm/include/nvvm.h"},
        "cuda-crt-dev_linux-64": {f"{target}/include/crt/host_config.h"},
        "libnvptxcompiler-dev_linux-64": set(),
        "cuda-nvcc-dev_linux-64": {f"{target}/include/fatbinary_section.h"},
        "cuda-cudart_linux-64": {f"{target}/lib/libcudart.so.13"},
        "cuda-cudart-static_linux-64": {f"{target}/lib/libcudart_static.a"},
        "cuda-cudart-dev_linux-64": {f"{target}/include/cuda.h", f"{target}/lib/libcudart.so"},
        "cuda-cccl_linux-64": {f"{target}/include/cccl/cub/cub.cuh"},
    }
    assert (tmp_path / "cuda-nvvm-dev_linux-64/targets/x86_64-linux/nvvm/include/nvvm.h").is_file()
    assert "targets/x86_64-linux/include" in (tmp_path / "cuda-nvcc-tools/bin/nvcc.profile").read_text()
    assert modern["cuda-version"].constrains[0] == "__cuda >=13"
    assert modern["cuda-nvcc-impl"].constrains == ("gcc_impl_linux-64 >=6,<16.0a0",)
    assert modern["cuda-nvcc_linux-64"].run_exports == {"strong": ["cuda-version >=13.0,<14"]}
    assert modern["cuda-cudart-dev"].run_exports == {"weak": ["cuda-cudart >=13.0,<14.0a0"]}


def test_links_lead_to_the_libraries_from_lib(modern: dict[str, BridgePackage], tmp_path: Path) -> None:
    names = [name for name in modern if name.startswith("cuda-cudart")]
    for name in names:
        staged(modern[name], tmp_path / name)
        shutil.copytree(tmp_path / name, tmp_path / "prefix", symlinks=True, dirs_exist_ok=True)
    for name in ("libcudart.so.13", "libcudart.so", "libcudart_static.a"):
        assert (tmp_path / "prefix/lib" / name).is_file(), name


def test_activation_adds_to_what_the_compilers_set_and_is_undone(
    modern: dict[str, BridgePackage], tmp_path: Path
) -> None:
    assert staged(modern["cuda-nvcc_linux-64"], tmp_path / "prefix") == {
        "etc/conda/activate.d/~cuda-nvcc_activate.sh",
        "etc/conda/deactivate.d/~cuda-nvcc_deactivate.sh",
    }
    scripts = tmp_path / "prefix/etc/conda"
    probe = f"""
    show() {{ echo "${{CFLAGS-unset}}|${{LDFLAGS-unset}}|${{NVCC_PREPEND_FLAGS-unset}}|${{CUDA_HOME-unset}}"; }}
    export CONDA_PREFIX=/p CXX=x-c++ CFLAGS=-mine
    . "{scripts}/activate.d/~cuda-nvcc_activate.sh"; show
    CFLAGS="$CFLAGS -later"
    . "{scripts}/deactivate.d/~cuda-nvcc_deactivate.sh"; show
    """
    clean = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["sh", "-eu", "-c", probe], capture_output=True, text=True, check=True, env=clean)
    headers, libraries = "/p/targets/x86_64-linux/include", "/p/targets/x86_64-linux/lib"
    assert done.stdout.splitlines() == [
        f"-mine -I{headers} -I{headers}| -L{libraries} -L{libraries}/stubs|-ccbin=x-c++|unset",
        "-mine -later|unset|unset|unset",
    ]


def test_a_wheel_that_would_write_elsewhere_is_refused(place: Workspace, tmp_path: Path) -> None:
    wheels = (
        wheel(place, "nvidia-cuda-nvcc-cu11", "11.8.89", "cuda_nvcc/include/../../../../escaped"),
        wheel(place, "nvidia-cuda-runtime-cu11", "11.8.89", "cuda_runtime/include/cuda.h"),
        wheel(place, "nvidia-cuda-cccl-cu11", "11.8.89", "cuda_cccl/include/cub/cub.cuh"),
    )
    packages = {p.name: p for p in toolkit_packages(ToolkitParts("11.8", wheels), place)}
    with pytest.raises(IntegrityError, match="leads out of it"):
        staged(packages["cuda-nvcc"], tmp_path / "nvcc")
