"""How many compilers a build runs where nobody else chose: by memory, with the rule of our own engine."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from ssm_forge.build.jobs import memory_needed
from ssm_forge.build.schedule import Job

ROOT = Path(__file__).parents[3]
JOBS = ROOT / "recipes/common/jobs.py"
SIZES = [500, 1600, 700, 600]

_script = runpy.run_path(str(JOBS))
fitting = cast("Callable[[list[int], int, int], int]", _script["fitting"])
free_memory = cast("Callable[[Path], int]", _script["free_memory"])


@pytest.mark.parametrize("jobs", [1, 2, 3, 4])
def test_the_rule_is_that_of_the_own_engine(jobs: int) -> None:
    needed = memory_needed(jobs, [Job("", 1.0, size * 1_000_000) for size in SIZES])
    assert fitting(SIZES, needed, 9) == jobs
    assert fitting(SIZES, needed - 1, 9) == max(1, jobs - 1)


def test_no_more_than_asked_for_and_never_none() -> None:
    assert fitting(SIZES, 10**12, 2) == 2
    assert fitting(SIZES, 0, 8) == 1


def machine(root: Path, *, available: int, **group: str) -> Path:
    files = {f"sys/fs/cgroup/memory.{name}": text for name, text in group.items()}
    for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_limit_of_a_container_counts_without_its_cached_files(tmp_path: Path) -> None:
    assert free_memory(machine(tmp_path / "plain", available=1000)) == 1_024_000
    unlimited = machine(tmp_path / "max", available=1000, max="max\n")
    assert free_memory(unlimited) == 1_024_000
    group = {"max": "500000\n", "current": "400000\n", "stat": "anon 9\nactive_file 30000\ninactive_file 20000\n"}
    assert free_memory(machine(tmp_path / "limited", available=1000, **group)) == 150_000


def test_it_answers_for_each_extension_of_the_recorded_costs() -> None:
    costs = ROOT / "recipes/compile-costs.txt"
    for extension in ("causal_conv1d_cuda", "selective_scan_cuda"):
        answer = subprocess.check_output([sys.executable, "-I", JOBS, costs, extension, "1"], text=True)
        assert answer == "1\n"
