"""The CUDA toolkit of a variant as conda packages, in conda-forge's layout.

Tools are in ``bin/`` and ``nvvm/``, headers and linker names under ``targets/x86_64-linux/``. Package names
are conda-forge's: ``cuda-nvcc_linux-64``, ``cuda-cudart-dev``, ``cuda-cudart``, ``cuda-version``; for CUDA
11.8, which conda-forge has not in full, NVIDIA's own: ``cuda-nvcc``, ``cuda-cccl``. Up to CUDA 12 the wheels
hold neither nvcc nor cicc nor cudafe++: those come from Debian's package of the same toolkit.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.bridge.debian import Deb, unpack
from ssm_forge.bridge.package import BridgePackage, link
from ssm_forge.bridge.pylock import LockedWheel
from ssm_forge.fetch import checked
from ssm_forge.paths import Workspace

_TARGET = Path("targets/x86_64-linux")
_LICENSE = "LicenseRef-NVIDIA-End-User-License-Agreement"

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

# Of what Debian's package has in usr/bin, the tools of a compilation.
_DEBIAN_TOOLS = ("bin2c", "cudafe++", "cuobjdump", "fatbinary", "nvdisasm", "nvlink", "nvprune", "ptxas")

# The folder on the library path holds CUDA's libraries only, so that no program of the system meets a C++
# runtime it was not made for.
_ACTIVATE = """\
export SSM_FORGE_BACKUP_CUDA_HOME="${CUDA_HOME:-}" SSM_FORGE_BACKUP_LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}"
export CUDA_HOME="$CONDA_PREFIX"
export LD_LIBRARY_PATH="$CONDA_PREFIX/targets/x86_64-linux/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
"""

_DEACTIVATE = """\
for name in CUDA_HOME LD_LIBRARY_PATH; do
    eval "old=\\${SSM_FORGE_BACKUP_$name:-}"
    if [ -n "$old" ]; then export "$name=$old"; else unset "$name"; fi
    unset "SSM_FORGE_BACKUP_$name"
done
unset old name
"""


@dataclass(frozen=True)
class ToolkitParts:
    """What a toolkit is made from.

    Attributes:
        cuda: CUDA release, ``11.8``.
        wheels: headers and libraries; from CUDA 13 on everything.
        debs: Debian's nvidia-cuda-toolkit; empty from CUDA 13 on.
    """

    cuda: str
    wheels: tuple[LockedWheel, ...]
    debs: tuple[Deb, ...] = ()

    @property
    def major(self) -> int:
        return int(self.cuda.split(".")[0])

    @property
    def nvcc(self) -> str:
        """Name of the compiler's package."""
        return "cuda-nvcc" if self.cuda == "11.8" else "cuda-nvcc_linux-64"

    def take(self, *names: str) -> list[LockedWheel]:
        """The wheels of these projects (``cuda-nvcc`` for ``nvidia-cuda-nvcc-cu11``) that the lock has."""
        by_name = {re.sub(r"^nvidia-|-cu\d\d$", "", wheel.name): wheel for wheel in self.wheels}
        return [by_name[name] for name in names if name in by_name]


def toolkit_packages(parts: ToolkitParts, workspace: Workspace) -> list[BridgePackage]:
    """The packages of a toolkit."""
    cuda, major = parts.cuda, parts.major
    pin = f"cuda-version {cuda}.*"
    compiler = parts.take("cuda-nvcc", "nvvm", "cuda-crt")
    (runtime,) = parts.take("cuda-runtime")
    cccl = parts.take("cuda-cccl")
    own_cccl = cuda == "11.8"
    headers = [runtime] if own_cccl else [runtime, *cccl]
    packages = [
        BridgePackage(
            name="cuda-version",
            version=cuda,
            inputs=(cuda,),
            stage=lambda folder: None,
            summary="Metapackage to select a CUDA release",
        ),
        BridgePackage(
            name=parts.nvcc,
            version=compiler[0].version,
            inputs=(
                *_digests(compiler),
                *(deb.sha256 for deb in parts.debs),
                _NVCC_PROFILE,
                _ACTIVATE,
                _DEACTIVATE,
            ),
            stage=lambda folder: _stage_compiler(folder, compiler, parts.debs, workspace),
            depends=(pin, "cuda-cudart-dev"),
            license=_LICENSE,
            summary="NVIDIA's CUDA compiler",
            size=sum(wheel.artifact.size for wheel in compiler) + sum(deb.size for deb in parts.debs),
        ),
        BridgePackage(
            name="cuda-cudart-dev",
            version=runtime.version,
            inputs=_digests(headers),
            stage=lambda folder: _stage_headers(folder, headers, workspace),
            depends=(pin, f"cuda-cudart =={runtime.version}", *(["cuda-cccl"] if own_cccl else [])),
            run_exports={"weak": [f"cuda-cudart >={cuda},<{major + 1}"]},
            license=_LICENSE,
            summary="CUDA runtime headers" + ("" if own_cccl else ", with libcu++, CUB and Thrust"),
            size=sum(wheel.artifact.size for wheel in headers),
        ),
        BridgePackage(
            name="cuda-cudart",
            version=runtime.version,
            inputs=_digests([runtime]),
            stage=lambda folder: _stage_libraries(folder, runtime, "libcudart.so.*", workspace),
            depends=(f"cuda-version >={cuda},<{major + 1}",),
            license=_LICENSE,
            summary="CUDA runtime library",
            size=runtime.artifact.size,
        ),
    ]
    if own_cccl:
        packages.append(
            BridgePackage(
                name="cuda-cccl",
                version=cccl[0].version.partition(".post")[0],
                inputs=_digests(cccl),
                stage=lambda folder: _stage_headers(folder, cccl, workspace),
                depends=(pin,),
                license=_LICENSE,
                summary="libcu++, CUB and Thrust",
                size=cccl[0].artifact.size,
            )
        )
    for cudnn in parts.take("cudnn"):
        packages.append(_cudnn(cudnn, major, workspace))
    return packages


def _cudnn(wheel: LockedWheel, major: int, workspace: Workspace) -> BridgePackage:
    return BridgePackage(
        name="cudnn",
        version=wheel.version,
        inputs=_digests([wheel]),
        stage=lambda folder: _stage_libraries(folder, wheel, "libcudnn*.so.*", workspace, headers=True),
        depends=(f"cuda-version >={major},<{major + 1}",),
        run_exports={"weak": [f"cudnn >={wheel.version},<{int(wheel.version.split('.')[0]) + 1}"]},
        license="LicenseRef-cuDNN-Software-License-Agreement",
        summary="NVIDIA's library of primitives for deep neural networks",
        size=wheel.artifact.size,
    )


def _digests(wheels: Sequence[LockedWheel]) -> tuple[str, ...]:
    return tuple(wheel.artifact.sha256 for wheel in wheels)


def _unpack(wheels: Sequence[LockedWheel], scratch: Path, workspace: Workspace) -> Path:
    """Unpack wheels and merge their roots (``nvidia/cu13``, or ``nvidia/cuda_nvcc`` and so on) into one."""
    root = scratch / "root"
    root.mkdir(parents=True)
    for wheel in wheels:
        with zipfile.ZipFile(checked(wheel.artifact, workspace)) as archive:
            archive.extractall(scratch)
    # Not "nvidia/*/", which is files too before Python 3.11: some wheels have an nvidia/__init__.py.
    for part in sorted(path for path in scratch.glob("nvidia/*") if path.is_dir()):
        shutil.copytree(part, root, dirs_exist_ok=True, copy_function=shutil.move)
    for marker in [*root.glob("__init__.py"), *root.glob("*/__init__.py")]:
        marker.unlink()
    return root


def _take(source: Path, target: Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target)


def _stage_compiler(folder: Path, wheels: Sequence[LockedWheel], debs: Sequence[Deb], workspace: Workspace) -> None:
    scratch = folder / ".unpacked"
    root = _unpack(wheels, scratch, workspace)
    _take(root / "bin", folder / "bin")
    _take(root / "nvvm", folder / "nvvm")
    _take(root / "include", folder / _TARGET / "include")
    for library in (root / "lib").glob("libnvvm.so*"):
        _take(library, folder / "nvvm/lib64" / library.name)
    for deb in debs:
        unpack(checked(deb.artifact(), workspace), scratch / "deb")
        _take_debian_tools(scratch / "deb", folder)
    shutil.rmtree(scratch)
    # The one that came along describes a flat layout (wheels) or the system's (Debian), not conda's.
    (folder / "bin/nvcc.profile").write_text(_NVCC_PROFILE)
    # Zip archives drop the permission to execute.
    for tool in [*(folder / "bin").iterdir(), *(folder / "nvvm/bin").iterdir()]:
        if tool.is_file() and tool.name != "nvcc.profile":
            tool.chmod(0o755)
    for step, text in (("activate", _ACTIVATE), ("deactivate", _DEACTIVATE)):
        script = folder / f"etc/conda/{step}.d/{step}-cuda-nvcc.sh"
        script.parent.mkdir(parents=True)
        script.write_text(text)


def _take_debian_tools(unpacked: Path, folder: Path) -> None:
    own = unpacked / "usr/lib/nvidia-cuda-toolkit"
    for tool in _DEBIAN_TOOLS:
        (folder / "bin" / tool).unlink(missing_ok=True)
        _take(unpacked / "usr/bin" / tool, folder / "bin" / tool)
    _take(own / "bin/nvcc", folder / "bin/nvcc")
    _take(own / "bin/crt", folder / "bin/crt")
    _take(own / "bin/cicc", folder / "nvvm/bin/cicc")


def _stage_headers(folder: Path, wheels: Sequence[LockedWheel], workspace: Workspace) -> None:
    scratch = folder / ".unpacked"
    root = _unpack(wheels, scratch, workspace)
    _take(root / "include", folder / _TARGET / "include")
    for archive in (root / "lib").glob("*.a"):
        _take(archive, folder / _TARGET / "lib" / archive.name)
    for library in (root / "lib").glob("libcudart.so.*"):
        link(library.name, folder / "lib/libcudart.so")
    shutil.rmtree(scratch)


def _stage_libraries(
    folder: Path, wheel: LockedWheel, pattern: str, workspace: Workspace, *, headers: bool = False
) -> None:
    """Libraries in ``lib/``, with links to them in the folder that activation puts on the library path."""
    scratch = folder / ".unpacked"
    root = _unpack([wheel], scratch, workspace)
    if headers:
        _take(root / "include", folder / "include")
    for library in sorted((root / "lib").glob(pattern)):
        _take(library, folder / "lib" / library.name)
        stem = library.name.partition(".so.")[0]
        for name in (library.name, f"{stem}.so"):
            link(f"../../../lib/{library.name}", folder / _TARGET / "lib" / name)
    shutil.rmtree(scratch)
