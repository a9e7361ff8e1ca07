"""Two GPUs: what a machine with fewer is told, and that a wrong result of the second is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here; ./run test runs this in an installed env")

from ssm_forge.kernels import as_upstream, backends, checks, gpus, siso  # noqa: E402
from ssm_forge.kernels.gpus import OtherGpuCase  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("found", [0, 1])
def test_fewer_than_two_gpus_run_nothing_and_say_why(found: int) -> None:
    named = gpus.plans(found)
    assert {plan.cases for plan in named} == {()}
    assert {plan.skipped for plan in named} == {f"it takes two GPUs, and torch finds {found} here"}


def test_two_gpus_run_all_but_what_the_release_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siso, "available", lambda: False)
    left = {plan.name: plan.skipped for plan in gpus.plans(2) if not plan.cases}
    assert left == {"mamba3 block on the GPU that is not current": "this mamba-ssm has no Mamba-3"}
    monkeypatch.setattr(siso, "available", lambda: True)
    assert all(plan.cases for plan in gpus.plans(2))


@pytest.mark.parametrize("what", ["scan", "conv"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_the_same_numbers_pass(what: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "PAIR", ("cpu", "cpu"))
    honest = backends.emulated()
    calls = []

    def off_the_second_time(**inputs: Any) -> Any:
        calls.append(1)
        return getattr(honest, what)(**inputs) * (1 if len(calls) % 2 else 1.01)

    case = OtherGpuCase(what=what, dtype=dtype)
    assert all(c.ok for c in checks.attempt(case, honest, CPU, 3))
    bad = checks.attempt(case, replace(honest, **{what: off_the_second_time}), CPU, 3)
    assert "out" in {c.name for c in bad if not c.ok}


def test_what_upstream_starts_on_the_current_gpu_is_no_failure_of_its_builds() -> None:
    left = [plan for plan in as_upstream.applicable(gpus.plans(2)) if "known faults" in plan.name]
    assert {plan.name.partition(" ")[0] for plan in left} >= {"mamba2", "generation"}
    assert all(as_upstream._CURRENT_GPU in plan.skipped for plan in left)
