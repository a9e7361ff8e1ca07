"""PyPI's torch as conda packages: as conda-forge lays out its own, and for CUDA 11.8 as pytorch.org does.

conda-forge: ``libtorch`` has the libraries in ``lib/`` and the headers in ``include/``, ``pytorch`` the Python modules
with links to the libraries, and metadata that names no package of NVIDIA's. pytorch.org: one package with everything
beside the modules, cuDNN and NCCL too, ``pytorch-cuda`` for NVIDIA's other libraries, ``torchtriton``, and an egg-info.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base.errors import BuildError
from ssm_forge.base.fetch import checked
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge.metadata import CUDA_LIBRARIES, Distribution, conda_depends, conda_name, project
from ssm_forge.bridge.nvidia import file_names, find_libraries_beside, library_depends, place
from ssm_forge.bridge.package import BridgePackage, link
from ssm_forge.bridge.pylock import LockedWheel
from ssm_forge.bridge.wheels import compile_bytecode, install_wheel

# Not in conda-forge's metadata of torch, and none of them is a Python package there.
_NOT_IN_METADATA = re.compile(r"Requires-Dist: (nvidia-|cuda-toolkit|triton\b)")
# What pytorch.org's package brings itself.
_BUNDLED = ("cudnn", "nccl")
_MUTEX = "1.0"

_HEADERS = "os.path.join(_TORCH_PATH, 'include'"
_CONDAS_HEADERS = "os.path.join(os.path.normpath(os.path.join(_TORCH_PATH, *[os.pardir] * 4)), 'include'"

_UP = "../../../.."


@dataclass(frozen=True)
class Torch:
    """What torch's packages are made of.

    Attributes:
        wheel: torch's.
        bundled: wheels of NVIDIA's whose libraries go beside torch's; only as pytorch.org does.
        interpreter: a Python of the minor ``python``, to compile bytecode with.
        cuda: CUDA release of the variant.
    """

    wheel: LockedWheel
    bundled: tuple[LockedWheel, ...]
    dists: Mapping[str, Distribution]
    python: str
    interpreter: Path
    cuda: str
    workspace: Workspace

    @property
    def version(self) -> str:
        """torch's version without what follows a plus, ``2.11.0``."""
        return self.dists["torch"].version.partition("+")[0]

    @property
    def prefix(self) -> str:
        """Start of the build string: who built this torch."""
        return f"bridge_cuda{self.cuda.replace('.', '')}"

    @property
    def tag(self) -> str:
        """The Python as build strings have it, ``312``."""
        return self.python.replace(".", "")

    @property
    def site(self) -> str:
        """Where Python packages lie below a prefix."""
        return f"lib/python{self.python}/site-packages"


def is_bundled(name: str, cuda: str) -> bool:
    """Whether a wheel's libraries go into torch's own package."""
    return cuda == "11.8" and name.startswith("nvidia-") and project(name) in _BUNDLED


def torch_packages(
    wheel: LockedWheel,
    bundled: Sequence[LockedWheel],
    dists: Mapping[str, Distribution],
    *,
    python: str,
    interpreter: Path,
    cuda: str,
    workspace: Workspace,
) -> list[BridgePackage]:
    """The packages of torch, in the layout of whoever builds it for this CUDA."""
    torch = Torch(wheel, tuple(bundled), dists, python, interpreter, cuda, workspace)
    return _pytorch_orgs(torch) if cuda == "11.8" else _conda_forges(torch)


def _cuda_range(cuda: str) -> str:
    major, minor = cuda.split(".")
    return f"cuda-version >={major}.{minor if major != '11' else '0'},<{int(major) + 1}"


def _split(torch: Torch) -> tuple[list[str], list[str]]:
    """(NVIDIA's libraries, Python packages) that torch's metadata asks for."""
    depends = conda_depends(torch.dists["torch"], torch.dists, torch.python)
    # cuda-toolkit only stands for the libraries that its extras name.
    others = [d for d in depends if d.split()[0] not in {*CUDA_LIBRARIES.values(), "cuda-toolkit"}]
    return library_depends(depends, torch.cuda), others


def _conda_forges(torch: Torch) -> list[BridgePackage]:
    libraries, others = _split(torch)
    version = torch.version
    minor = version.rpartition(".")[0].split(".")
    following = f"{minor[0]}.{int(minor[1]) + 1}.0a0"
    libtorch = BridgePackage(
        name="libtorch",
        version=version,
        inputs=(torch.wheel.artifact.sha256, torch.python),
        stage=lambda folder: _stage_libtorch(torch, folder),
        depends=(*libraries, _cuda_range(torch.cuda), "libgcc", "libstdcxx"),
        constrains=("pytorch-cpu <0.0a0",),
        build_prefix=torch.prefix,
        license=torch.dists["torch"].license,
        summary="Libraries and headers of torch, from PyPI",
        size=torch.wheel.artifact.size,
    )
    pytorch = BridgePackage(
        name="pytorch",
        version=version,
        inputs=(torch.wheel.artifact.sha256, torch.python, _CONDAS_HEADERS),
        stage=lambda folder: _stage_pytorch(torch, folder),
        depends=(
            *(spec for spec in others if spec.split()[0] not in ("numpy", "setuptools")),
            "numpy",
            "setuptools <82",
            "__cuda",
            f"libtorch =={version} {libtorch.build}",
            _cuda_range(torch.cuda),
            f"python {torch.python}.*",
            f"python_abi {torch.python}.* *_cp{torch.tag}",
        ),
        constrains=("pytorch-cpu <0.0a0",),
        run_exports={"weak": [f"{name} >={version},<{following}" for name in ("pytorch", "libtorch")]},
        build_prefix=f"{torch.prefix}_py{torch.tag}",
        license=torch.dists["torch"].license,
        summary=torch.dists["torch"].summary,
        size=torch.wheel.artifact.size // 20,
    )
    return [libtorch, pytorch]


def _of_libtorch(path: str) -> bool:
    """Whether a path of the wheel goes to ``libtorch``; its link to Python stays with the modules."""
    library = path.startswith("torch/lib/") and ".so" in path and not path.endswith("/libtorch_python.so")
    return library or path.startswith("torch/include/")


def _stage_libtorch(torch: Torch, folder: Path) -> None:
    with zipfile.ZipFile(checked(torch.wheel.artifact, torch.workspace)) as archive:
        for member in archive.infolist():
            if member.is_dir() or not _of_libtorch(member.filename):
                continue
            target = folder / member.filename.removeprefix("torch/")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    find_libraries_beside(folder / "lib")


def _stage_pytorch(torch: Torch, folder: Path) -> None:
    install_wheel(torch.wheel, folder, torch.python, torch.workspace, without=_of_libtorch)
    site = folder / torch.site
    own = site / "torch/lib/libtorch_python.so"
    (folder / "lib").mkdir(exist_ok=True)
    shutil.move(own, folder / "lib" / own.name)
    find_libraries_beside(folder / "lib")
    with zipfile.ZipFile(checked(torch.wheel.artifact, torch.workspace)) as archive:
        names = [n for n in archive.namelist() if n.startswith("torch/lib/") and ".so" in n]
    for name in names:
        link(f"{_UP}/{Path(name).name}", site / name)
    extension = site / "torch/utils/cpp_extension.py"
    extension.write_text(with_condas_headers(extension.read_text(encoding="utf-8")), encoding="utf-8")
    (info,) = site.glob("torch-*.dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    head, blank, body = metadata.partition("\n\n")
    kept = "\n".join(line for line in head.splitlines() if not _NOT_IN_METADATA.match(line))
    (info / "METADATA").write_text(kept + blank + body, encoding="utf-8")
    refresh_record(info / "RECORD")
    compile_bytecode(torch.interpreter, folder, site)


def with_condas_headers(text: str) -> str:
    """torch's ``cpp_extension`` with the headers in the environment's ``include/``.

    Raises:
        BuildError: when it names them in another way.
    """
    if _HEADERS not in text:
        raise BuildError("torch/utils/cpp_extension.py names torch's headers in an unknown way.")
    return text.replace(_HEADERS, _CONDAS_HEADERS)


def refresh_record(record: Path) -> None:
    """Write a RECORD anew: without what is gone, with the hashes of what is there."""
    site = record.parent.parent
    rows = []
    for path, digest, size in csv.reader(record.read_text(encoding="utf-8").splitlines()):
        file = site / path
        if not file.is_file() or file.is_symlink():
            continue
        if digest:
            data = file.read_bytes()
            digest = "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            size = str(len(data))
        rows.append((path, digest, size))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    record.write_text(text.getvalue(), encoding="utf-8")


def _pytorch_orgs(torch: Torch) -> list[BridgePackage]:
    libraries, others = _split(torch)
    bundled = {conda_name(wheel.name) for wheel in torch.bundled}
    libraries = [spec for spec in libraries if spec.split()[0] not in bundled]
    mutex = BridgePackage(
        name="pytorch-mutex",
        version=_MUTEX,
        inputs=("cuda",),
        stage=lambda folder: None,
        build_prefix="cuda",
        summary="Metapackage to select a torch with CUDA",
    )
    pytorch_cuda = BridgePackage(
        name="pytorch-cuda",
        version=torch.cuda,
        inputs=(torch.cuda,),
        stage=lambda folder: None,
        depends=tuple(libraries),
        summary="NVIDIA's libraries that torch loads",
    )
    pytorch = BridgePackage(
        name="pytorch",
        version=torch.version,
        inputs=(torch.wheel.artifact.sha256, *(wheel.artifact.sha256 for wheel in torch.bundled), torch.python),
        stage=lambda folder: _stage_egg(torch, folder),
        depends=(
            *(f"torchtriton{spec.removeprefix('triton')}" if spec.split()[0] == "triton" else spec for spec in others),
            _cuda_range(torch.cuda),
            f"pytorch-cuda {torch.cuda}.*",
            f"pytorch-mutex {_MUTEX} cuda*",
            f"python {torch.python}.*",
            f"python_abi {torch.python}.* *_cp{torch.tag}",
        ),
        constrains=("cpuonly <0",),
        build_prefix=f"{torch.prefix}_py{torch.tag}",
        license=torch.dists["torch"].license,
        summary=torch.dists["torch"].summary,
        size=torch.wheel.artifact.size + sum(wheel.artifact.size for wheel in torch.bundled),
    )
    return [mutex, pytorch_cuda, pytorch]


def _stage_egg(torch: Torch, folder: Path) -> None:
    install_wheel(torch.wheel, folder, torch.python, torch.workspace)
    site = folder / torch.site
    moves = ((r"lib/([^/]+\.so[^/]*)", f"{torch.site}/torch/lib/\\1"),)
    place(folder, moves, torch.bundled, torch.workspace, name="pytorch")
    for wheel in torch.bundled:
        # Only what was moved: torch's own libraries find each other, and NVIDIA's by the interpreter's rpath.
        names = file_names(wheel, r"lib/[^/]+\.so[^/]*", torch.workspace)
        find_libraries_beside(site / "torch/lib", names)
    (info,) = site.glob("torch-*.dist-info")
    _as_egg(info, site / f"torch-{torch.version}-py{torch.python}.egg-info")
    compile_bytecode(torch.interpreter, folder, site)


def _as_egg(info: Path, egg: Path) -> None:
    """The metadata as setuptools wrote it before there were wheels, with fsspec in it as pytorch.org's has it."""
    egg.mkdir()
    head, blank, body = (info / "METADATA").read_text(encoding="utf-8").partition("\n\n")
    lines = [line for line in head.splitlines() if not _NOT_IN_METADATA.match(line)]
    requires = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    plain = [text for text in requires if ";" not in text]
    (egg / "PKG-INFO").write_text(
        "\n".join(line for line in lines if not line.startswith("Requires-Dist")) + blank + body, encoding="utf-8"
    )
    (egg / "requires.txt").write_text("\n".join(sorted({*plain, "fsspec"})) + "\n")
    for name in ("top_level.txt", "entry_points.txt"):
        if (info / name).exists():
            shutil.copy(info / name, egg / name)
    for notice in sorted(info.rglob("LICENSE*")):
        if notice.is_file():
            shutil.copy(notice, egg / notice.name)
    shutil.rmtree(info)
