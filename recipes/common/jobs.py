"""How many compilers to run side by side: no more than asked for, and as many as there is memory for.

usage: jobs.py COSTS EXTENSION AT_MOST

pixi tells a build how many cores there are, and nothing of memory. The rule is that of ssm_forge.build.run.
"""

import sys
from pathlib import Path

# What a build takes beside its compilers, and what they take beyond what was measured.
MEMORY_BASE = 800_000_000
MEMORY_MARGIN = 1.25


def free_memory(system: Path = Path("/")) -> int:
    """Bytes that can be used without swapping, the limit of a container included."""
    fields = dict(line.split(":") for line in (system / "proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = system / "sys/fs/cgroup"
    limit = group / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files are charged too, and given back when memory is asked for.
        cached = int(used.get("active_file", 0)) + int(used.get("inactive_file", 0))
        free = min(free, int(limit.read_text()) - int((group / "memory.current").read_text()) + cached)
    return free


def fitting(megabytes: list[int], free: int, at_most: int) -> int:
    """With the files that take most side by side; one compiler is always tried."""
    left = free - MEMORY_BASE
    jobs = 0
    for size in sorted(megabytes, reverse=True)[:at_most]:
        left -= round(size * 1_000_000 * MEMORY_MARGIN)
        if left < 0:
            break
        jobs += 1
    return max(1, jobs)


def main(costs: Path, extension: str, at_most: int) -> None:
    rows = [line.split() for line in costs.read_text().splitlines() if line and not line.startswith("#")]
    print(fitting([int(megabytes) for name, _, _, megabytes in rows if name == extension], free_memory(), at_most))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
