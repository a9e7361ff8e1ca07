"""torch and NVIDIA's libraries as conda-forge's and pytorch.org's packages."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bridge_wheels import add_wheel
from ssm_forge.base.errors import BuildError
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge.nvidia import find_libraries_beside, library_packages
from ssm_forge.bridge.package import BridgePackage
from ssm_forge.bridge.pylock import LockedWheel
from ssm_forge.bridge.torch import is_bundled, torch_packages, with_condas_headers
from ssm_forge.bridge.wheels import distributions, wheel_package
from ssm_forge.package import libraries as elf

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
TAG = PYTHON.replace(".", "")
SITE = f"lib/python{PYTHON}/site-packages"

_EXTENSION = """\
import os
_TORCH_PATH = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
lib_include = os.path.join(_TORCH_PATH, 'include')
"""
_REQUIRES = (
    "filelock",
    "nvidia-cublas{0}==13.1",
    "nvidia-cuda-runtime{0}==13.0",
    "nvidia-cudnn{0}==9.1",
    "triton==3.6.0",
)


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path, cache=tmp_path / "cache")


def wheel(place: Workspace, name: str, version: str, files: dict[str, str], *requires: str) -> LockedWheel:
    stem = f"{name.replace('-', '_')}-{version}"
    needed = "".join(f"Requires-Dist: {spec}\n" for spec in requires)
    platform = f"cp{TAG}-cp{TAG}-linux_x86_64" if name in ("torch", "triton") else "py3-none-manylinux_2_27_x86_64"
    files = {
        **files,
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}\nText.\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n",
    }
    return LockedWheel(name, version, add_wheel(place, f"{stem}-{platform}.whl", files).artifact)


def lock(place: Workspace, cuda: str) -> list[LockedWheel]:
    """What the lock of a variant holds, as far as it matters here."""
    suffix = "" if cuda == "13.0" else "-cu11"
    return [
        wheel(
            place,
            "torch",
            "2.11.0+cu130",
            {
                "torch/__init__.py": "",
                "torch/utils/cpp_extension.py": _EXTENSION,
                "torch/include/ATen/ATen.h": "",
                "torch/lib/libc10.so": "c10",
                "torch/lib/libtorch_python.so": "python",
            },
            *(spec.format(suffix) for spec in _REQUIRES),
        ),
        wheel(
            place,
            f"nvidia-cublas{suffix}",
            "13.1",
            {"nvidia/cu13/lib/libcublas.so.13": "b", "nvidia/cu13/include/cublas_v2.h": "h"},
        ),
        wheel(place, f"nvidia-cuda-runtime{suffix}", "13.0", {"nvidia/cu13/lib/libcudart.so.13": "r"}),
        wheel(
            place,
            f"nvidia-cudnn{suffix}",
            "9.1",
            {"nvidia/cudnn/lib/libcudnn.so.9": "d", "nvidia/cudnn/include/cudnn_version.h": "h"},
            f"nvidia-cublas{suffix}",
        ),
        wheel(place, "triton", "3.6.0", {"triton/__init__.py": ""}),
        wheel(place, "filelock", "1.0", {"filelock.py": ""}),
    ]


def made(place: Workspace, cuda: str) -> dict[str, BridgePackage]:
    wheels = lock(place, cuda)
    dists = distributions(wheels, place)
    bundled = [w for w in wheels if is_bundled(w.name, cuda)]
    torch = torch_packages(
        wheels[0], bundled, dists, python=PYTHON, interpreter=Path(sys.executable), cuda=cuda, workspace=place
    )
    libraries = [
        package
        for w in wheels
        if w.name.startswith("nvidia-cu") and w not in bundled
        for package in library_packages(w, dists, python=PYTHON, cuda=cuda, workspace=place)
    ]
    triton = wheel_package(
        wheels[4], dists, python=PYTHON, interpreter=Path(sys.executable), cuda=cuda, workspace=place
    )
    return {package.name: package for package in (*torch, *libraries, triton)}


def staged(package: BridgePackage, folder: Path) -> set[str]:
    folder.mkdir()
    package.stage(folder)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def test_conda_forges_torch_has_its_libraries_in_lib_and_its_headers_in_include(
    place: Workspace, tmp_path: Path
) -> None:
    packages = made(place, "13.0")
    assert staged(packages["libtorch"], tmp_path / "libtorch") == {"lib/libc10.so", "include/ATen/ATen.h"}
    files = staged(packages["pytorch"], tmp_path / "pytorch")
    assert "lib/libtorch_python.so" in files
    assert not any("include" in file for file in files)
    prefix = tmp_path / "prefix"
    for name in ("libtorch", "pytorch"):
        shutil.copytree(tmp_path / name, prefix, symlinks=True, dirs_exist_ok=True)
    for name in ("libc10.so", "libtorch_python.so"):
        link = prefix / SITE / "torch/lib" / name
        assert link.is_symlink()
        assert link.resolve() == (prefix / "lib" / name).resolve()
    script = "import torch.utils.cpp_extension as c; print(c.lib_include)"
    told = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(prefix / SITE)},
    )
    assert told.stdout.strip() == str(prefix / "include")


def test_conda_forges_torch_names_no_package_of_nvidias_in_its_metadata(place: Workspace, tmp_path: Path) -> None:
    packages = made(place, "13.0")
    staged(packages["pytorch"], tmp_path / "pytorch")
    (info,) = (tmp_path / "pytorch" / SITE).glob("torch-*.dist-info")
    found = importlib.metadata.PathDistribution(info)
    assert found.requires == ["filelock"]
    assert found.metadata.get_payload() == "Text.\n"
    names = {str(file): file.hash for file in found.files or ()}
    assert not any(name.startswith(("torch/lib", "torch/include")) for name in names)
    changed = next(file for file in found.files or () if str(file).endswith("METADATA"))
    assert changed.size == (info / "METADATA").stat().st_size


def test_conda_forges_torch_needs_what_is_apart_from_it(place: Workspace) -> None:
    packages = made(place, "13.0")
    pytorch, libtorch = packages["pytorch"], packages["libtorch"]
    # The recipes ask for "pytorch 2.11.* bridge_cuda130_*".
    assert pytorch.build.startswith(f"bridge_cuda130_py{TAG}_")
    assert {"__cuda", "triton ==3.6.0", "setuptools <82", f"libtorch ==2.11.0 {libtorch.build}"} <= set(pytorch.depends)
    assert pytorch.run_exports == {"weak": ["pytorch >=2.11.0,<2.12.0a0", "libtorch >=2.11.0,<2.12.0a0"]}
    assert {"libcublas ==13.1", "libcudnn ==9.1", "cuda-cudart >=13.0,<14"} <= set(libtorch.depends)
    assert "cuda-version >=13.0,<14" in libtorch.depends


def test_nvidias_libraries_are_in_lib_and_their_headers_apart(place: Workspace, tmp_path: Path) -> None:
    packages = made(place, "13.0")
    assert staged(packages["libcublas"], tmp_path / "blas") == {"lib/libcublas.so.13"}
    assert staged(packages["libcudnn"], tmp_path / "dnn") == {"lib/libcudnn.so.9"}
    assert staged(packages["libcudnn-dev"], tmp_path / "dev") == {"include/cudnn_version.h"}
    # Torch's headers include it, and so does what source trees include of torch.
    assert staged(packages["libcublas-dev"], tmp_path / "blas-dev") == {"include/cublas_v2.h"}
    assert packages["libcublas-dev"].depends == ("libcublas ==13.1", "cuda-version >=13,<14")
    assert packages["libcudnn"].depends == ("libcublas", "cuda-version >=13,<14")


def test_pytorch_orgs_torch_has_everything_beside_its_modules(place: Workspace, tmp_path: Path) -> None:
    packages = made(place, "11.8")
    assert set(packages) >= {"pytorch", "pytorch-cuda", "pytorch-mutex", "torchtriton", "libcublas"}
    assert not {"libtorch", "libcudnn", "triton"} & set(packages)
    files = staged(packages["pytorch"], tmp_path / "pytorch")
    lib = f"{SITE}/torch/lib"
    assert {f"{lib}/libc10.so", f"{lib}/libtorch_python.so", f"{lib}/libcudnn.so.9"} <= files
    assert f"{SITE}/torch/include/ATen/ATen.h" in files
    pytorch = packages["pytorch"]
    assert pytorch.build.startswith(f"bridge_cuda118_py{TAG}_")
    assert {"torchtriton ==3.6.0", "pytorch-cuda 11.8.*", "pytorch-mutex 1.0 cuda*"} <= set(pytorch.depends)
    assert set(packages["pytorch-cuda"].depends) == {"libcublas ==13.1", "cuda-cudart >=11.8,<12"}
    assert not pytorch.run_exports


def test_pytorch_orgs_torch_requires_fsspec_without_bringing_it(place: Workspace, tmp_path: Path) -> None:
    pytorch = made(place, "11.8")["pytorch"]
    staged(pytorch, tmp_path / "pytorch")
    site = tmp_path / "pytorch" / SITE
    assert not list(site.glob("*.dist-info"))
    (egg,) = site.glob("*.egg-info")
    found = importlib.metadata.PathDistribution(egg)
    assert (found.metadata["Name"], found.version) == ("torch", "2.11.0+cu130")
    assert sorted(found.requires or ()) == ["filelock", "fsspec"]
    assert not any(spec.startswith("fsspec") for spec in pytorch.depends)


def test_a_torch_that_names_its_headers_otherwise_is_refused() -> None:
    with pytest.raises(BuildError, match="headers in an unknown way"):
        with_condas_headers("lib_include = HEADERS\n")


@pytest.mark.skipif(not shutil.which("gcc") or not shutil.which("patchelf"), reason="no gcc or no patchelf here")
def test_libraries_that_name_folders_of_other_wheels_look_beside_themselves(tmp_path: Path) -> None:
    rpaths = {"a": "$ORIGIN/../../cublas/lib", "b": "$ORIGIN:/x", "c": ""}
    for name, rpath in rpaths.items():
        command = ["gcc", "-shared", "-o", f"lib{name}.so.1", "-x", "c", "/dev/null"]
        subprocess.run([*command, *([f"-Wl,-rpath,{rpath}"] if rpath else [])], cwd=tmp_path, check=True)
    find_libraries_beside(tmp_path)
    assert [elf.read(tmp_path / f"lib{name}.so.1").rpaths for name in rpaths] == [("$ORIGIN",), ("$ORIGIN", "/x"), ()]
