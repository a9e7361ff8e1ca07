"""What the results were measured on, and whether there is a GPU to measure on."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("torch", "triton", "causal-conv1d", "mamba-ssm", "einops", "transformers")


def missing_gpu() -> str:
    """Why nothing can run on a GPU here; empty when it can."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch finds no usable NVIDIA GPU on this machine{_torchs_reason()}"
    return ""


def _torchs_reason() -> str:
    """What torch says of it: a driver that is too old, none at all, or that all are hidden."""
    try:
        torch.cuda.init()
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f" ({lines[0].rstrip('.')})" if lines else ""
    return ""


def unusable_devices() -> dict[str, str]:
    """Every GPU that torch sees -> why it can't use it, empty where it can: it may have no code for it."""
    reasons = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = f"GPU {index}: {properties.name} ({properties.major}.{properties.minor})"
        try:
            # A kernel of torch's own, and a copy back.
            good = (torch.ones(2, device=f"cuda:{index}") + 1).tolist() == [2.0, 2.0]
            reasons[name] = "" if good else "1 + 1 is not 2 there"
        except Exception as error:
            lines = str(error).strip().splitlines()
            reasons[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return reasons


def missing_packages() -> str:
    """Why the kernels can't be loaded; empty when they can.

    mamba-ssm decides when it is imported how many tile sizes each of its Triton kernels tries on first use.
    Trying all takes minutes, and says nothing about results: here each gets one.
    """
    name = "MAMBA_DETERMINISTIC"
    chosen = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return _import_packages()
    finally:
        if chosen is None:
            del os.environ[name]
        else:
            os.environ[name] = chosen


def _import_packages() -> str:
    try:
        import causal_conv1d
        import causal_conv1d_cuda
        import mamba_ssm
        import selective_scan_cuda
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert causal_conv1d and causal_conv1d_cuda and mamba_ssm and selective_scan_cuda
    return ""


def versions() -> dict[str, str | None]:
    """Python, CUDA and the packages -> installed version; None for what is not installed."""
    result: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = None
    return result


def gpu() -> dict[str, Any] | None:
    """The current GPU's name, compute capability, memory in bytes and multiprocessors; None without a GPU."""
    if missing_gpu():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


def free_bytes() -> int:
    """Bytes of GPU memory that are free; 0 without a GPU."""
    return 0 if missing_gpu() else int(torch.cuda.mem_get_info()[0])


def header(seed: int | None = None) -> dict[str, Any]:
    """The start of every JSON document: date, GPU, versions, and the seed where there is one."""
    document: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": gpu(),
        "versions": versions(),
    }
    if seed is not None:
        document["seed"] = seed
    return document
