"""How far off a kernel may be where its result is one sum whose terms cancel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here: ./run test runs this elsewhere")

from ssm_forge.kernels import faults  # noqa: E402
from ssm_forge.kernels.backends import Backend  # noqa: E402
from ssm_forge.kernels.cases import ScanCase  # noqa: E402

CASE = ScanCase(dtype="bf16", batch=2, dim=1, length=300, states=16)


def _off_by(error: float, name: str) -> Backend:
    """The emulated kernels, with a gradient that is off. It is a sum of 600 terms of about 0.3."""
    sound = faults.honest()

    def scan(**inputs: Any) -> Any:
        if inputs[name] is not None and inputs[name].requires_grad:
            inputs[name].register_hook(lambda gradient: gradient + error)
        return sound.scan(**inputs)

    return replace(sound, scan=scan)


@pytest.mark.parametrize("name", ["D", "delta_bias"])
@pytest.mark.parametrize("seed", range(12))
def test_rounding_in_a_sum_that_cancels_is_no_failure(name: str, seed: int) -> None:
    results = CASE.run(_off_by(2e-5, name), torch.device("cpu"), seed)
    assert [c.problem for c in results if not c.ok] == []


@pytest.mark.parametrize("name", ["D", "delta_bias"])
def test_a_wrong_term_of_such_a_sum_is_one(name: str) -> None:
    results = CASE.run(_off_by(0.01, name), torch.device("cpu"), 1)
    assert [c.name for c in results if not c.ok] == [f"d{name.lower()}"]


# Of its 16 terms, one for each state, channel 7's step sums up 200 times less than their sizes.
CANCELLED = ScanCase(dtype="fp32", batch=2, dim=8, length=1, states=16, groups=2, along=True), 1952448194


@pytest.mark.parametrize("name", ["delta", "delta_bias"])
def test_rounding_in_a_sum_over_the_states_that_cancels_is_no_failure(name: str) -> None:
    case, seed = CANCELLED
    results = case.run(_off_by(1e-6, name), torch.device("cpu"), seed)
    assert [c.problem for c in results if not c.ok] == []


@pytest.mark.parametrize("name", ["delta", "delta_bias"])
def test_a_wrong_term_of_a_sum_over_the_states_is_one(name: str) -> None:
    case, seed = CANCELLED
    results = case.run(_off_by(1e-4, name), torch.device("cpu"), seed)
    assert f"d{name}" in [c.name for c in results if not c.ok]
