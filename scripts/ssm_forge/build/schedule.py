"""How long a build takes on other machines: its compilers placed one after the other, as ninja places them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One compiler run.

    Attributes:
        name: source file.
        seconds: CPU seconds; a compiler uses one core.
        memory_bytes: the peak of its processes.
    """

    name: str
    seconds: float
    memory_bytes: int = 0


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    """The order that leaves the least idle time at the end (Graham's LPT rule); equal ones by name."""
    return sorted(jobs, key=lambda job: (-job.seconds, job.name))


def simulate(jobs: Sequence[Job], cores: int) -> float:
    """Seconds until all are done when each free core takes the next of ``jobs``.

    Raises:
        ValueError: for fewer than one core.
    """
    if cores < 1:
        raise ValueError(f"{cores} cores")
    free_at = [0.0] * cores
    for job in jobs:
        heapq.heappush(free_at, heapq.heappop(free_at) + job.seconds)
    return max(free_at)
