"""How long a user waits for the first forward and backward in a fresh process.

A build without machine code for the GPU is compiled from PTX by the driver at that moment. The driver's
cache is off here, so every run measures the first time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ssm_forge.kernels import extensions

STEPS = ("conv forward", "conv backward", "scan forward", "scan backward")


def worker(folder: Path | None) -> Iterator[tuple[str, float]]:
    """Time the first call of each kernel in this process; step and seconds come out as each is done.

    Args:
        folder: of another build; None for the installed one.
    """
    started = time.monotonic()
    build = extensions.installed() if folder is None else extensions.load("other", folder)
    torch.zeros(1, device="cuda")
    yield "load", time.monotonic() - started
    conv = extensions.ConvInputs.make(1, 64, 64, 4, torch.bfloat16, channel_last=False)
    scan = extensions.ScanInputs.make(1, 64, 64, 16, torch.bfloat16)
    for step in STEPS:
        kernel, direction = step.split()
        if {"conv": "causal_conv1d", "scan": "selective_scan"}[kernel] not in build.modules:
            continue
        inputs: Any = conv if kernel == "conv" else scan
        torch.cuda.synchronize()
        started = time.monotonic()
        (inputs.backward(build) if direction == "backward" else inputs.forward(build))()
        torch.cuda.synchronize()
        yield step, time.monotonic() - started


def measure(label: str, folder: Path | None, *, limit: float = 400.0) -> dict[str, Any]:
    """Run :func:`worker` in a fresh process without the driver's cache; label, times and any problem come out.

    Args:
        limit: seconds after which it is stopped; what it had measured by then is kept.
    """
    command = [sys.executable, "-m", "ssm_forge.kernels", "first-use-worker"]
    if folder is not None:
        command.append(str(folder))
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        env={**os.environ, "CUDA_CACHE_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    problem = ""
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        problem = f"stopped after {limit:.0f} s"
    if process.returncode and not problem:
        problem = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    seconds = dict(json.loads(line) for line in output.splitlines())
    return {"build": label, "seconds": seconds, "process": time.monotonic() - started, "problem": problem}
