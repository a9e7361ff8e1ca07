"""NVIDIA's wheels: what their libraries are called in conda, and their files laid out anew below a prefix."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ssm_forge.base.errors import IntegrityError, MachineError
from ssm_forge.base.fetch import checked
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge.deb_file import unpack
from ssm_forge.bridge.debian import Deb
from ssm_forge.bridge.metadata import CUDA_LIBRARIES, Distribution, conda_depends, conda_name, project
from ssm_forge.bridge.package import BridgePackage
from ssm_forge.bridge.pylock import LockedWheel
from ssm_forge.package import libraries as elf

LICENSE = "LicenseRef-NVIDIA-End-User-License-Agreement"

# A wheel's toolkit is below nvidia/cu13/, nvidia/cuda_nvcc/, cusparselt/ and so on.
_ROOT = re.compile(r"(?:nvidia/)?[^/]+/((?:bin|include|lib|nvvm)/.+)")
_NOTICE = re.compile(r"[^/]+\.dist-info/(?:licenses/)?License\.txt")

_DEBIAN_HOME = "usr/lib/nvidia-cuda-toolkit/bin"
# Of what Debian's package has in usr/bin, the tools of a compilation.
_DEBIAN_TOOLS = ("bin2c", "cudafe++", "cuobjdump", "fatbinary", "nvdisasm", "nvlink", "nvprune", "ptxas")

# Libraries whose headers are packages of their own, as conda-forge's: torch's headers include them, cuDNN's is checked.
_WITH_HEADERS = ("libcublas", "libcudnn", "libcusolver", "libcusparse")

# (pattern of a path in the toolkit, where it goes below the prefix; None: nowhere)
Moves = Sequence[tuple[str, str | None]]


def place(
    folder: Path,
    moves: Moves,
    wheels: Iterable[LockedWheel],
    workspace: Workspace,
    *,
    name: str,
    debs: Sequence[Deb] = (),
) -> list[str]:
    """Put the files of wheels, and Debian's in place of theirs, where ``moves`` says; the first pattern that fits wins.

    Returns:
        What is there then, below ``folder``.

    Raises:
        IntegrityError: when a wheel has a path that leads out of the folder.
    """
    placed = []
    for wheel in wheels:
        with zipfile.ZipFile(checked(wheel.artifact, workspace)) as archive:
            for member in archive.infolist():
                target = _target(member.filename, moves, name, wheel)
                if target is None or member.is_dir():
                    continue
                if ".." in Path(target).parts:
                    raise IntegrityError(f"{wheel.artifact.name} holds '{member.filename}', which leads out of it.")
                (folder / target).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, (folder / target).open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                placed.append(target)
    for deb in debs:
        scratch = folder / ".unpacked"
        unpack(checked(deb.artifact(), workspace), scratch)
        for path, file in _debian_toolkit(scratch).items():
            target = _moved(path, moves)
            if target is not None:
                (folder / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(file, folder / target)
                placed.append(target)
        shutil.rmtree(scratch)
    # Zip archives drop the permission to execute.
    for target in placed:
        if re.fullmatch(r"(bin|nvvm/bin)/[^/]+", target) and not target.endswith(".profile"):
            (folder / target).chmod(0o755)
    return sorted(set(placed))


def _target(member: str, moves: Moves, name: str, wheel: LockedWheel) -> str | None:
    if _NOTICE.fullmatch(member):
        return f"share/licenses/{name}/{wheel.name}.txt"
    inside = _ROOT.fullmatch(member)
    return _moved(inside.group(1), moves) if inside and not member.endswith("/__init__.py") else None


def _moved(path: str, moves: Moves) -> str | None:
    for pattern, target in moves:
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(target) if target is not None else None
    return None


def _debian_toolkit(unpacked: Path) -> dict[str, Path]:
    """The files of Debian's package by their paths in NVIDIA's toolkit."""
    home = unpacked / _DEBIAN_HOME
    sources = {f"bin/{tool}": unpacked / "usr/bin" / tool for tool in _DEBIAN_TOOLS}
    sources |= {"bin/nvcc": home / "nvcc", "nvvm/bin/cicc": home / "cicc"}
    sources |= {f"bin/crt/{path.name}": path for path in (home / "crt").glob("*")}
    return {path: source for path, source in sources.items() if source.is_file()}


def file_names(wheel: LockedWheel, pattern: str, workspace: Workspace) -> list[str]:
    """The names of the wheel's files whose path in the toolkit fits ``pattern``."""
    with zipfile.ZipFile(checked(wheel.artifact, workspace)) as archive:
        paths = (_ROOT.fullmatch(name) for name in archive.namelist())
        return sorted(Path(path.group(1)).name for path in paths if path and re.fullmatch(pattern, path.group(1)))


def is_library(name: str) -> bool:
    """Whether a wheel of this name is one of NVIDIA's libraries that torch loads."""
    return name.startswith("nvidia-") and project(name) in CUDA_LIBRARIES


def library_packages(
    wheel: LockedWheel, dists: Mapping[str, Distribution], *, python: str, cuda: str, workspace: Workspace
) -> list[BridgePackage]:
    """A library as conda has it: in ``lib/``, with no trace of a Python package; of some the headers, apart."""
    name, version, major = conda_name(wheel.name), dists[wheel.name].version, int(cuda.split(".")[0])

    def package(name: str, moves: Moves, depends: Sequence[str], summary: str) -> BridgePackage:
        def stage(folder: Path) -> None:
            place(folder, moves, [wheel], workspace, name=name)
            find_libraries_beside(folder / "lib")

        return BridgePackage(
            name=name,
            version=version,
            inputs=(wheel.artifact.sha256, *(f"{pattern} {target}" for pattern, target in moves)),
            stage=stage,
            depends=(*depends, f"cuda-version >={major},<{major + 1}"),
            license=LICENSE,
            summary=summary,
            size=wheel.artifact.size,
        )

    needs = library_depends(conda_depends(dists[wheel.name], dists, python), cuda)
    summary = dists[wheel.name].summary
    packages = [package(name, ((r"lib/([^/]+\.so[^/]*|[^/]+\.bc)", r"lib/\1"),), needs, summary)]
    if name in _WITH_HEADERS:
        packages.append(
            package(f"{name}-dev", ((r"(include/.*)", r"\1"),), [f"{name} =={version}"], f"{summary} (headers)")
        )
    return packages


def library_depends(depends: Iterable[str], cuda: str) -> list[str]:
    """Requirements on NVIDIA's libraries; the CUDA runtime is the toolkit's, which is never older."""
    major = int(cuda.split(".")[0])
    libraries = (spec for spec in depends if spec.split()[0] in CUDA_LIBRARIES.values())
    return [f"cuda-cudart >={cuda},<{major + 1}" if s.split()[0] == "cuda-cudart" else s for s in libraries]


def find_libraries_beside(folder: Path, names: Sequence[str] | None = None) -> None:
    """Let libraries that name folders of other wheels find what they need beside themselves.

    Those that name none are left alone: the interpreter's own rpath leads here.

    Args:
        names: the libraries; None for all of the folder.
    """
    for path in sorted(folder.glob("*.so*")):
        if path.is_symlink() or (names is not None and path.name not in names):
            continue
        with path.open("rb") as stream:
            if stream.read(4) != b"\x7fELF":
                continue
        rpaths = [rpath.rstrip("/").replace("${ORIGIN}", "$ORIGIN") for rpath in elf.rpaths(path)]
        if not rpaths or "$ORIGIN" in rpaths:
            continue
        tool = shutil.which("patchelf")
        if tool is None:
            raise MachineError("patchelf is missing from the tools.", fix="Delete .pixi/tools and run again.")
        subprocess.run([tool, "--set-rpath", "$ORIGIN", os.fspath(path)], check=True)
