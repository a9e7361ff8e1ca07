"""CUDA 13's compiler and a torch's headers, out of the bridge's wheels; nothing is installed."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from ssm_forge.base import fetch
from ssm_forge.base.paths import workspace
from ssm_forge.bridge import pylock

_TOOLKIT = {"nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-nvvm"}


def toolkit(folder: Path) -> Path:
    """CUDA 13 for one architecture of machines: ``bin``, ``include``, ``nvvm``."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine to compile with")
    wheels = pylock.read(pylock.lock_path(workspace(), "cu130", "toolkit"), "3.11")
    for wheel in (wheel for wheel in wheels if wheel.name in _TOOLKIT):
        _unpack(wheel, "nvidia/cu13/", folder)
    root = folder / "nvidia/cu13"
    for program in (*(root / "bin").iterdir(), root / "nvvm/bin/cicc"):
        if program.is_file():
            program.chmod(0o755)
    return root


def torch_headers(folder: Path) -> Path:
    """The headers of the torch that the bridge's cu130 has."""
    wheels = pylock.read(pylock.lock_path(workspace(), "cu130", "py311"), "3.11")
    _unpack(next(wheel for wheel in wheels if wheel.name == "torch"), "torch/include/", folder)
    return folder / "torch/include"


def _unpack(wheel: pylock.LockedWheel, below: str, folder: Path) -> None:
    found = fetch.fetch_all([wheel.artifact], workspace())[wheel.artifact]
    with zipfile.ZipFile(found) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(below)])
