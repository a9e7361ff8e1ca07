"""Plays a farm through on machines that need not be there: when each job starts and ends, and what that takes."""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.ui import human_bytes
from ssm_forge.farm.jobs import Job

# Jobs that wait for more room than there is, which smaller ones may go past.
_MOST_PASSED = 64

_MACHINES = re.compile(r"(?:(\d+)x)?(\d+):(\d+(?:\.\d+)?)(?:GB)?", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """One machine that jobs may run on.

    Attributes:
        cores: for jobs.
        memory: bytes for jobs.
    """

    cores: int
    memory: int


@dataclass(frozen=True)
class Estimate:
    """What a farm takes.

    Attributes:
        wall: seconds from the first job's start to the last one's end.
        cpu: CPU seconds.
        memory: bytes that its jobs are declared to take at the same time, on all machines, at the most.
        disk: bytes that they need at the same time, at the most.
        jobs: how many there are.
    """

    wall: float
    cpu: float
    memory: int
    disk: int
    jobs: int


def machines(text: str) -> list[Machine]:
    """The machines that a text names: ``4x16:64,32:128`` is four of 16 cores with 64 GB each, and one of 32 with 128.

    Raises:
        UsageError: when it is written in another way.
    """
    result = []
    for item in text.split(","):
        match = _MACHINES.fullmatch(item.strip())
        if match is None or int(match[2]) < 1 or float(match[3]) <= 0:
            raise UsageError(
                f"'{item}' is no machine.", fix="Write COUNTxCORES:GB, such as 4x16:64, several between commas."
            )
        result += [Machine(int(match[2]), round(float(match[3]) * 1e9))] * int(match[1] or 1)
    return result


def estimate(jobs: Sequence[Job], at_hand: Sequence[Machine], *, at_once: int | None = None) -> Estimate:
    """What jobs take on these machines: each starts on the first one with room, the longest way to the end first.

    Args:
        at_once: jobs that may run side by side; None for as many as fit.

    Raises:
        MachineError: when no machine has room for a job.
    """
    for job in jobs:
        if not any(_fits(job, machine.cores, machine.memory) for machine in at_hand):
            largest = max(at_hand, key=lambda machine: machine.memory)
            raise MachineError(
                f"{job.name} needs {job.need.cores} cores and {human_bytes(job.need.memory)}; no machine has that (the "
                f"largest: {largest.cores} cores, {human_bytes(largest.memory)}).",
                fix="Name larger machines, or use --cores with a smaller number.",
            )
    by_name = {job.name: job for job in jobs}
    left = {job.name: {need for need in job.needs if need in by_name} for job in jobs}
    after = _after(jobs)
    urgency = _urgency(jobs, after)
    ready = [(-urgency[name], name) for name, needs in left.items() if not needs]
    heapq.heapify(ready)
    free = [[machine.cores, machine.memory] for machine in at_hand]
    running: list[tuple[float, str, int]] = []
    now = 0.0
    memory = disk = most_memory = most_disk = 0
    while ready or running:
        for job, number in _startable(ready, by_name, free, len(jobs) if at_once is None else at_once - len(running)):
            memory, disk = memory + job.need.memory, disk + job.need.disk
            most_memory, most_disk = max(most_memory, memory), max(most_disk, disk)
            heapq.heappush(running, (now + job.need.seconds, job.name, number))
        now, name, number = heapq.heappop(running)
        ended = by_name[name]
        free[number][0] += ended.need.cores
        free[number][1] += ended.need.memory
        memory, disk = memory - ended.need.memory, disk - ended.need.disk
        for other in after[name]:
            left[other].discard(name)
            if not left[other]:
                heapq.heappush(ready, (-urgency[other], other))
    return Estimate(now, sum(job.need.cpu for job in jobs), most_memory, most_disk, len(jobs))


def _startable(
    ready: list[tuple[float, str]], by_name: Mapping[str, Job], free: list[list[int]], most: int
) -> list[tuple[Job, int]]:
    """Take the jobs that fit now, and their machines, out of ``ready``; smaller ones go past a few that do not fit."""
    started: list[tuple[Job, int]] = []
    passed: list[tuple[float, str]] = []
    while ready and len(started) < most and len(passed) < _MOST_PASSED and any(cores for cores, _ in free):
        urgency, name = heapq.heappop(ready)
        job = by_name[name]
        number = next((i for i, room in enumerate(free) if _fits(job, *room)), None)
        if number is None:
            passed.append((urgency, name))
            continue
        free[number][0] -= job.need.cores
        free[number][1] -= job.need.memory
        started.append((job, number))
    for item in passed:
        heapq.heappush(ready, item)
    return started


def _fits(job: Job, cores: int, memory: int) -> bool:
    return job.need.cores <= cores and job.need.memory <= memory


def _after(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Job -> those that wait for it."""
    after: dict[str, list[str]] = {job.name: [] for job in jobs}
    for job in jobs:
        for need in job.needs:
            if need in after:
                after[need].append(job.name)
    return after


def _urgency(jobs: Sequence[Job], after: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Seconds from a job's start to the end of the longest chain that waits for it; needs come before what has them."""
    seconds_to_end: dict[str, float] = {}
    for job in reversed(jobs):
        seconds_to_end[job.name] = job.need.seconds + max(
            (seconds_to_end[other] for other in after[job.name]), default=0.0
        )
    return seconds_to_end
