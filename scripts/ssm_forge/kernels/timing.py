"""How long a call takes on the GPU, and how fast this GPU copies memory."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssm_forge.kernels.sequences import zipped

# More than any L2 cache, and a third of a millisecond to read: until then all launches of the next call are queued.
FLUSH_BYTES = 1 << 30
COPY_BYTES = 2 << 30

Call = Callable[[], Any]


class Clock:
    """Times calls with CUDA events, each from a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self._sum = torch.empty((), device=device)

    def _once(self, call: Call) -> tuple[Any, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Read, not written: what is written still leaves the cache while the call runs, and is counted as its traffic.
        torch.sum(self._flush, dim=0, out=self._sum)
        start.record()
        call()
        end.record()
        return start, end

    def median(self, call: Call, *, repeats: int = 30, warmup: int = 3) -> float:
        """Seconds of one call, the median of ``repeats`` after ``warmup`` unmeasured ones."""
        return self.interleaved([call], repeats=repeats, warmup=warmup)[0]

    def interleaved(self, calls: Sequence[Call], *, repeats: int = 30, warmup: int = 3) -> list[float]:
        """Medians of several calls taken in turns, so that drifting clocks touch all of them alike."""
        for _ in range(warmup):
            for call in calls:
                call()
        torch.cuda.synchronize()
        events = [[self._once(call) for call in calls] for _ in range(repeats)]
        torch.cuda.synchronize()
        columns = zipped(*events)
        return [statistics.median(float(start.elapsed_time(end)) for start, end in c) / 1e3 for c in columns]


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU; off a GPU (in tests of this code) sizes are small, and anything fits."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else sys.maxsize


def copy_bandwidth(clock: Clock, device: torch.device) -> float:
    """Bytes per second of a large copy within GPU memory, read and written counted both."""
    size = min(COPY_BYTES, free_memory(device) // 8)
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / clock.median(lambda: target.copy_(source), repeats=20)
