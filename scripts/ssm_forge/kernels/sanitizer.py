"""compute-sanitizer over a small set of kernel calls: bad accesses, races, uninitialized reads."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ssm_forge.kernels import extensions
from ssm_forge.kernels.checks import FAIL, NOT_RUN, PASS, Check

TOOLS = ("memcheck", "racecheck", "initcheck")
_SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+)")
_FINDING = re.compile(r"=========\s+(Invalid|Race reported|Error: Race|Uninitialized|Warning: Race|Program hit).*")
_REFUSED = ("Device not supported", "Unable to find injection library", "not supported on this")


def find() -> Path | None:
    """The path of compute-sanitizer, on PATH or in a CUDA toolkit; None where there is none."""
    on_path = shutil.which("compute-sanitizer")
    if on_path:
        return Path(on_path)
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    for home in filter(None, homes):
        for location in ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"):
            if (Path(home) / location).is_file():
                return Path(home) / location
    return None


def worker() -> None:
    """The calls to be watched: every kernel, forward and backward, on sizes that leave tiles half full.

    Only the compiled modules run, on memory that is fully written before: what torch itself leaves
    uninitialized would drown what the kernels do.
    """
    build = extensions.installed()
    for dtype in (torch.float32, torch.bfloat16):
        for last, length in ((False, 131), (True, 131), (False, 64), (False, 1025)):
            conv = extensions.ConvInputs.make(1, 40, length, 4, dtype, channel_last=last)
            conv.forward(build)()
            conv.backward(build)()
        for kernels, dim, states in (("upstream", 4, 3), ("along", 70, 16)):
            os.environ["SSM_FORGE_KERNELS"] = kernels
            for length in (131, 128, 1040, 2049):
                scan = extensions.ScanInputs.make(1, dim, length, states, dtype)
                scan.forward(build)()
                scan.backward(build)()
        # More blocks than a GPU has room for, which hand on to each other; and with sums in a fixed order.
        os.environ["MAMBA_DETERMINISTIC"] = "1"
        scan = extensions.ScanInputs.make(320, 8, 272, 16, dtype)
        scan.forward(build)()
        scan.backward(build)()
        del os.environ["SSM_FORGE_KERNELS"], os.environ["MAMBA_DETERMINISTIC"]
        _sequences(build.modules["causal_conv1d"], dtype)
        _complex(build.modules["selective_scan"], dtype)
        _update(build.modules["causal_conv1d"], dtype)
    torch.cuda.synchronize()


def _sequences(module: Any, dtype: Any) -> None:
    """Channel-last with seq_idx, and with states before and after, forward and backward."""
    batch, dim, length, width = 2, 40, 131, 4

    def plane(tokens: int) -> Any:
        return torch.randn(batch, tokens, dim, device="cuda").to(dtype).transpose(1, 2)

    weight, bias = torch.randn(dim, width, device="cuda"), torch.randn(dim, device="cuda")
    owners = (torch.arange(length, device="cuda") // 50).to(torch.int32).repeat(batch, 1)
    for seq_idx in (owners, None):
        x, out, grad, dx = (plane(length) for _ in range(4))
        initial, d_initial = plane(width - 1), plane(width - 1)
        # Final states exist without seq_idx only.
        final, d_final = (None, None) if seq_idx is not None else (plane(width - 1), plane(width - 1))
        module.causal_conv1d_fwd(x, weight, bias, seq_idx, initial, out, final, True)
        sums = torch.zeros_like(weight), torch.zeros_like(bias)
        module.causal_conv1d_bwd(x, weight, bias, grad, seq_idx, initial, d_final, dx, *sums, d_initial, True)


def _complex(module: Any, dtype: Any) -> None:
    """A complex A with two groups, without gate, forward and backward; one with upstream's kernels as they are."""
    groups = 2 if hasattr(module, "calls") else 1
    batch, dim, length, states = 2, 4, 131, 3

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda").to(dtype)

    u, delta, grad = normal(batch, dim, length), normal(batch, dim, length).abs(), normal(batch, dim, length)
    a = torch.complex(-torch.rand(dim, states, device="cuda"), torch.rand(dim, states, device="cuda"))
    b, c = normal(batch, groups, states, 2 * length), normal(batch, groups, states, 2 * length)
    inputs = u, delta, a, b, c, torch.ones(dim, device="cuda"), None, None
    out, kept, *_ = module.fwd(*inputs, True)
    module.bwd(*inputs, grad, kept, out, None, True, False)


def _update(module: Any, dtype: Any) -> None:
    x = torch.randn(2, 40, 1, device="cuda").to(dtype)
    state = torch.randn(2, 40, 4, device="cuda").to(dtype)
    weight, bias = torch.randn(40, 4, device="cuda"), torch.randn(40, device="cuda")
    out = torch.zeros_like(x)
    module.causal_conv1d_update(x, state, weight, bias, out, True, None, None)


def run(tool: str, *, limit: float = 300.0) -> Check:
    """Watch :func:`worker` with one of compute-sanitizer's tools, for at most ``limit`` seconds."""
    name = f"compute-sanitizer {tool}"
    program = find()
    if program is None:
        return Check(name, NOT_RUN, "compute-sanitizer was not found on PATH or in a CUDA toolkit")
    command = [str(program), "--tool", tool, "--error-exitcode", "77", "--print-limit", "20"]
    command += [sys.executable, "-m", "ssm_forge.kernels", "sanitize-worker"]
    started = time.monotonic()
    # One allocation a tensor, so that a step over the end leaves it.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # A session of its own: stopping compute-sanitizer alone would leave the watched process on the GPU.
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Check(name, NOT_RUN, f"not done after {limit:.0f} s", seconds=limit)
    return judge(name, process.returncode, output, time.monotonic() - started)


def judge(name: str, status: int, output: str, seconds: float) -> Check:
    """The check that compute-sanitizer's exit status and output mean."""
    lines = output.splitlines()
    refused = next((line for line in lines if any(text in line for text in _REFUSED)), "")
    if refused:
        return Check(name, NOT_RUN, f"it can't run here: {refused.strip('= ')}", seconds=seconds)
    summary = _SUMMARY.search(output)
    findings = [line.strip("= ") for line in lines if _FINDING.match(line)]
    if summary is None:
        last = lines[-1] if lines else "no output"
        return Check(name, FAIL, f"it ended with status {status} and no summary: {last}", seconds=seconds)
    count = int(summary.group(2))
    if count or status:
        detail = f"{count} problems, status {status}; first: {findings[0] if findings else lines[-1]}"
        return Check(name, FAIL, detail, seconds=seconds)
    return Check(name, PASS, "no problems", seconds=seconds)


def run_all(*, limit: float = 300.0) -> list[Check]:
    """One check for each of compute-sanitizer's tools, each run for at most ``limit`` seconds."""
    return [run(tool, limit=limit) for tool in TOOLS]
