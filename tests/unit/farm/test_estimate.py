"""What a farm would take, played through on machines that are not there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.farm import costs
from ssm_forge.farm.cells import Cell, every, select
from ssm_forge.farm.costs import Need
from ssm_forge.farm.estimate import Machine, estimate, machines
from ssm_forge.farm.jobs import Job
from ssm_forge.manifest import recipe, variants

CELL = every(variants.load(workspace().variants), recipe.PROJECTS)[0]
GB = 1_000_000_000


def job(name: str, seconds: float, *needs: str, cores: int = 1, memory: int = GB) -> Job:
    return Job(name, "package", name, needs, Need(cores, memory, seconds, seconds * cores, 10), CELL)


def test_machines_are_read_as_they_are_written() -> None:
    assert machines("2x16:64,4:8.5GB") == [Machine(16, 64 * GB), Machine(16, 64 * GB), Machine(4, 8_500_000_000)]
    for wrong in ("", "16", "x:4", "0:4", "4:0", "2x:4"):
        with pytest.raises(UsageError):
            machines(wrong)


def test_what_waits_starts_when_what_it_needs_has_ended() -> None:
    result = estimate([job("a", 10), job("b", 5, "a"), job("c", 7)], machines("2:64"))
    assert result.wall == 15
    assert result.cpu == 22
    assert result.disk == 20


def test_what_is_made_of_a_torch_stays_on_the_disk() -> None:
    torches = [replace(job(f"torch {python}", 5), kind="torch") for python in ("3.11", "3.12")]
    packages = [job(f"package {n}", 10, torch.name) for n, torch in enumerate(torches)]
    assert estimate([*torches, *packages], machines("1:64")).disk == 30
    assert estimate([*torches, *packages], machines("2:64")).disk == 40


def test_the_longest_chain_goes_first() -> None:
    # Taken in their order, the chain would start last and end at 30.
    jobs = [job("x", 10), job("y", 10), job("head", 5), job("tail", 15, "head")]
    assert estimate(jobs, machines("2:64")).wall == 20


@pytest.mark.parametrize(("there", "wall"), [("1:64", 40), ("4:64", 10), ("2x2:64", 10), ("4:2", 20)])
def test_cores_and_memory_both_limit_what_runs_side_by_side(there: str, wall: float) -> None:
    result = estimate([job(name, 10) for name in "abcd"], machines(there))
    assert result.wall == wall
    assert result.memory == {40: 1, 10: 4, 20: 2}[int(wall)] * GB


def test_a_job_that_fits_no_machine_is_refused() -> None:
    with pytest.raises(MachineError, match=r"big needs 2 cores and 8\.0 GB; no machine has that"):
        estimate([job("small", 1), job("big", 1, cores=2, memory=8 * GB)], machines("8:4,1:64"))


def test_ten_thousand_jobs_take_as_long_as_their_work_on_as_many_cores() -> None:
    jobs = [job(f"j{number}", 1 + number % 7) for number in range(10_000)]
    result = estimate(jobs, machines("100x16:64"))
    assert result.cpu / 1600 <= result.wall <= result.cpu / 1600 + 7


def cell(project: str, archs: str = "9.0") -> Cell:
    chosen = every(variants.load(workspace().variants), recipe.PROJECTS, (archs,))
    return select(chosen, f"variant=cu130 source=bridge python=3.12 project={project}")[0]


def need(cell: Cell, *, shared: bool = False, most: int = 16, memory: int = 64 * GB, cores: int | None = None) -> Need:
    return costs.package(cell, workspace(), shared=shared, cores=cores, most=most, memory=memory)


def test_another_python_of_the_same_kernels_costs_only_what_binds_to_python() -> None:
    first, second = need(cell("mamba-ssm"), most=2), need(cell("mamba-ssm"), most=2, shared=True)
    assert second.cpu < first.cpu / 5


def test_each_capability_is_compiled_for_and_cores_shorten_it() -> None:
    one, two = need(cell("mamba-ssm"), most=2), need(cell("mamba-ssm", "8.0;9.0"), most=2)
    assert 1.8 < two.cpu / one.cpu < 2.0
    wide = need(cell("mamba-ssm"))
    assert wide.cores > 2
    assert wide.seconds < one.seconds / 2


def test_where_memory_is_short_a_package_gets_fewer_cores() -> None:
    assert need(cell("causal-conv1d"), most=8, memory=3_000_000_000).cores == 1
    assert need(cell("causal-conv1d"), most=8).cores > 1


def test_the_estimate_is_what_the_builds_were_measured_to_take() -> None:
    """The same builds, on the machine of docs/builds.md: cold, and for a second Python."""
    file = workspace().root / "docs/results/2026-11-25-builds/builds.json"
    measured = json.loads(file.read_text(encoding="utf-8"))
    cores = measured["machine"]["cores"]
    for step, shared in (("cold", False), ("second Python", True)):
        needs = [need(cell(project), shared=shared, most=cores) for project in recipe.PROJECTS]
        chain = [Job(str(n), "package", "", (str(n - 1),), one, CELL) for n, one in enumerate(needs)]
        result = estimate(chain, [Machine(cores, 64 * GB)])
        assert result.wall == pytest.approx(measured["steps"][step]["wall"], rel=0.25), step
        assert result.cpu == pytest.approx(measured["steps"][step]["cpu"], rel=0.25), step
