"""How many compilers run side by side, and the memory that they take."""

from __future__ import annotations

from collections.abc import Sequence

from ssm_forge.base.errors import MachineError
from ssm_forge.base.machine import cores, free_memory
from ssm_forge.base.ui import human_bytes
from ssm_forge.build.schedule import Job

# What a build takes beside its compilers: the engine, pip, the tests' Python.
MEMORY_BASE_BYTES = 800_000_000


# Other toolkits and more capabilities than the costs were measured with take somewhat more.
MEMORY_MARGIN = 1.25


def memory_needed(jobs: int, costs: Sequence[Job]) -> int:
    """Bytes that a build with ``jobs`` compilers may take: with the files that take most side by side."""
    return MEMORY_BASE_BYTES + sum(_largest(jobs, costs))


def _largest(jobs: int, costs: Sequence[Job]) -> list[int]:
    sizes = sorted((round(job.memory_bytes * MEMORY_MARGIN) for job in costs), reverse=True)
    return sizes[:jobs]


def choose_jobs(requested: int | None, costs: Sequence[Job]) -> int:
    """How many compilers run side by side: as many as there are cores and memory for, where nobody asks for a number.

    Args:
        requested: the number that was asked for; None for what fits.
        costs: of the files that are compiled.

    Raises:
        MachineError: when the memory is too small for the jobs asked for, or for a single one.
    """
    free = free_memory()
    # More compilers than files are of no use.
    fitting = max((n for n in range(1, len(costs) + 1) if memory_needed(n, costs) <= free), default=0)
    wanted = requested or max(1, min(cores(), fitting))
    if wanted > fitting and memory_needed(wanted, costs) > free:
        largest = _largest(wanted, costs)
        sums = f"{human_bytes(MEMORY_BASE_BYTES)} + {' + '.join(map(human_bytes, largest[:4]))}"
        sums += f" + {human_bytes(sum(largest[4:]))} for {len(largest) - 4} more" if len(largest) > 4 else ""
        needed = human_bytes(memory_needed(wanted, costs))
        raise MachineError(
            f"{wanted} compile job{'s' if wanted > 1 else ''} need {sums} = {needed} of memory, and "
            f"{human_bytes(free)} are free.",
            fix=f"Use --jobs {fitting}." if fitting >= 1 else "Free memory, or build on a larger machine.",
        )
    return wanted
