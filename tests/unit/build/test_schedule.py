"""Schedules against what can be worked out by hand, and against bounds that hold for any."""

from __future__ import annotations

import random

import pytest

from ssm_forge.build.schedule import Job, longest_first, simulate


def _jobs(*seconds: float) -> list[Job]:
    return [Job(f"{i}.cu", s) for i, s in enumerate(seconds)]


def test_one_core_does_one_after_the_other_and_many_as_long_as_the_longest() -> None:
    jobs = _jobs(3, 1, 2)
    assert simulate(jobs, 1) == 6
    assert simulate(jobs, 3) == simulate(jobs, 16) == 3


def test_the_order_decides_what_is_idle_at_the_end() -> None:
    assert simulate(_jobs(1, 1, 4), 2) == 5
    assert simulate(longest_first(_jobs(1, 1, 4)), 2) == 4


def test_longest_first_is_never_worse_than_four_thirds_of_the_best_possible() -> None:
    draw = random.Random(7)
    for _ in range(200):
        jobs = _jobs(*(draw.uniform(1, 60) for _ in range(draw.randint(1, 30))))
        cores = draw.randint(1, 16)
        bound = max(sum(j.seconds for j in jobs) / cores, max(j.seconds for j in jobs))
        found = simulate(longest_first(jobs), cores)
        assert bound <= found + 1e-9
        assert found <= bound * (4 / 3 - 1 / (3 * cores)) + max(j.seconds for j in jobs)


def test_no_core_is_refused() -> None:
    with pytest.raises(ValueError, match="0 cores"):
        simulate(_jobs(1), 0)
