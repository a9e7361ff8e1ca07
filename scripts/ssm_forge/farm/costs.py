"""What a job takes: cores, memory, time and disk, from what was measured of each source file and of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssm_forge.base.paths import Workspace
from ssm_forge.build import costs as compile_costs
from ssm_forge.build.jobs import memory_needed
from ssm_forge.build.schedule import Job as Compile
from ssm_forge.build.schedule import longest_first, simulate
from ssm_forge.farm.cells import Cell
from ssm_forge.manifest.variants import Source

# Seen beside the compilers in a build from the bridge: solving, two environments, pip, tests, packing
# (docs/results/2026-11-25-builds).
PACKAGE_SECONDS = 14.0
# What is still to download comes on top, at this many bytes a second. Those of conda are guesses, on the safe side.
TOOLCHAIN_SECONDS = {"bridge": 10.0, "conda": 30.0}
# A torch of the bridge: its Python packages, then so much for each byte of its wheels.
_TORCH_SECONDS = {"bridge": 30.0, "conda": 60.0}
_ASSEMBLED_BYTES_PER_SECOND = 40_000_000
DOWNLOAD_BYTES_PER_SECOND = 50_000_000
WHEEL_SECONDS = 5.0
# Peak memory: the engine, which packs on several cores.
OTHER_MEMORY_BYTES = 1_500_000_000
# Work folder, environments that are copies, objects and package, for each capability.
BUILD_DISK_BYTES = 400_000_000
# A scheduler kills what takes longer than was declared: room for a slower machine and for neighbours.
TIME_MARGIN = 3.0
# Beyond this many idle core seconds for each that works, more cores are left to other jobs.
_MOST_IDLE = 0.15


@dataclass(frozen=True)
class Need:
    """What a job is declared to take.

    Attributes:
        cores: that it keeps busy.
        memory: bytes, at the most.
        seconds: wall time on ``cores``, as measured.
        cpu: CPU seconds.
        disk: bytes while it runs.
    """

    cores: int
    memory: int
    seconds: float
    cpu: float
    disk: int

    @property
    def minutes(self) -> int:
        """The limit in minutes that a scheduler is told."""
        return max(5, round(self.seconds * TIME_MARGIN / 60))


def compiles(cell: Cell, workspace: Workspace, *, shared: bool) -> list[Compile]:
    """The compilers that a package runs, with seconds and bytes of memory each, longest first.

    Args:
        shared: whether another Python has had the kernels compiled, so that only what binds to Python is left.
    """
    # cicc and ptxas run once for each capability; C++ files do not know of any.
    times = max(1, len(set(cell.archs.sass) | set(cell.archs.ptx)))
    compilers = []
    for job in compile_costs.load(workspace, [cell.project], cell.kernels):
        is_kernel = job.name.endswith(".cu")
        if not (is_kernel and shared):
            compilers.append(Compile(job.name, job.seconds * (times if is_kernel else 1), job.memory_bytes))
    return longest_first(compilers)


def package(cell: Cell, workspace: Workspace, *, shared: bool, cores: int | None, most: int, memory: int) -> Need:
    """What the job takes that makes the cell's package.

    Args:
        shared: as in :func:`compiles`.
        cores: that it is to have; None for as many as it keeps busy.
        most: cores that there are for one job.
        memory: bytes that there are for one job; with less than one compiler needs, what one needs is declared.
    """
    # An object that is in the compile cache is not there for sure: memory is declared for all files.
    costs = compiles(cell, workspace, shared=False)
    jobs = compiles(cell, workspace, shared=shared)
    chosen = cores or busy(jobs, min(most, len(costs)))
    while chosen > 1 and memory_needed(chosen, costs) > memory:
        chosen -= 1
    return Need(
        cores=chosen,
        memory=memory_needed(chosen, costs),
        seconds=PACKAGE_SECONDS + simulate(jobs, chosen),
        cpu=PACKAGE_SECONDS + sum(job.seconds for job in jobs),
        disk=BUILD_DISK_BYTES * max(1, len(cell.archs.sass)),
    )


def busy(jobs: Sequence[Compile], most: int) -> int:
    """How many cores, up to ``most``, these compilers keep busy but for a small part of the time."""
    total = sum(job.seconds for job in jobs)
    return max(
        (n for n in range(1, most + 1) if simulate(jobs, n) * n * (1 - _MOST_IDLE) <= total),
        default=1,
    )


def torch_seconds(source: Source, files: int) -> float:
    """Wall time in seconds to have a torch, downloads apart.

    Args:
        files: bytes of wheels and .deb files that packages are made of.
    """
    return _TORCH_SECONDS[source] + files / _ASSEMBLED_BYTES_PER_SECOND


def other(seconds: float, *, most: int, download: int = 0, disk: int = 0) -> Need:
    """What a job takes that compiles nothing.

    Args:
        seconds: wall time without what is downloaded.
        most: cores that there are for one job.
        download: bytes still to be fetched.
        disk: bytes while it runs.
    """
    return Need(min(2, most), OTHER_MEMORY_BYTES, seconds + download / DOWNLOAD_BYTES_PER_SECOND, seconds, disk)
