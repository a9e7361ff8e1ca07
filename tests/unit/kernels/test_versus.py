"""Two ways beside each other: which environment each call is made and run under, and what is left behind."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here: ./run test runs this elsewhere")

from ssm_forge.kernels import versus  # noqa: E402
from ssm_forge.kernels.extensions import Build, Point  # noqa: E402

_NAMES = ("SSM_FORGE_KERNELS", "MAMBA_DETERMINISTIC")


class CountingClock:
    """Runs each call once; the first is said to take 2 seconds, the second 3, and so on."""

    def interleaved(self, calls: list[Any], *, repeats: int = 1, warmup: int = 0) -> list[float]:
        for call in calls:
            call()
        return [2.0 + place for place in range(len(calls))]


class RecordingScan:
    """Notes under which environment it is called, and whether a gate and its ungated output came along."""

    def __init__(self) -> None:
        self.forwards: list[tuple[str, ...]] = []
        self.backwards: list[tuple[str, ...]] = []
        self.gates: set[tuple[bool, bool]] = set()

    def calls(self) -> dict[str, int]:
        return {}

    def fwd(self, u: Any, delta: Any, a: Any, b: Any, c: Any, d: Any, z: Any, bias: Any, softplus: bool) -> list[Any]:
        self.forwards.append(tuple(os.environ[name] for name in _NAMES))
        return [u.clone(), u, *([u] if z is not None else [])]

    def bwd(self, u: Any, *rest: Any) -> None:
        z, states, out = rest[5], rest[8], rest[9]
        assert states is u
        self.gates.add((z is not None, out is not None))
        self.backwards.append(tuple(os.environ[name] for name in _NAMES))


def _compared(scan: Any, point: Point) -> list[versus.Versus]:
    clock: Any = CountingClock()
    return list(versus.compare_kernels(Build("fake", {"selective_scan": scan}), clock, [point], device="cpu"))


def test_each_way_has_its_kernels_and_its_order_and_the_environment_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSM_FORGE_KERNELS", "along")
    monkeypatch.delenv("MAMBA_DETERMINISTIC", raising=False)
    scan = RecordingScan()
    rows = _compared(scan, Point("selective_scan", "fp32", 1, 4, 8, 2))
    assert [(row.other, row.direction, round(row.ratio, 3)) for row in rows] == [
        (versus.UPSTREAM_KERNELS, "forward", 0.667),
        (versus.UPSTREAM_KERNELS, "backward", 0.667),
        (versus.ANY_ORDER, "backward", 2.0),
    ]
    # Each forward twice (the bits, the time), then one for the states of each backward.
    ours, upstreams, fixed = ("", "0"), ("upstream", "0"), ("", "1")
    assert scan.forwards == [ours, upstreams, ours, upstreams, ours, upstreams, fixed]
    assert scan.backwards == [ours, upstreams, fixed]
    assert os.environ["SSM_FORGE_KERNELS"] == "along" and "MAMBA_DETERMINISTIC" not in os.environ


@pytest.mark.parametrize("gated", [True, False])
def test_only_a_gate_brings_its_ungated_output_to_the_backward(gated: bool) -> None:
    scan = RecordingScan()
    _compared(scan, Point("selective_scan", "fp32", 1, 4, 8, 2, gated=gated))
    assert scan.gates == {(gated, gated)}


def test_a_build_with_upstreams_kernels_only_has_nothing_to_compare() -> None:
    assert _compared(SimpleNamespace(), Point("selective_scan", "fp32", 1, 4, 8, 2)) == []


def test_a_row_says_what_ran_and_how_many_times_as_fast() -> None:
    point = Point("selective_scan", "bf16", 8, 4096, 2048, 16, gated=False)
    row = versus.Versus(versus.UPSTREAM_KERNELS, point, "forward", 2e-6, 5e-6, 0.4, None)
    assert str(row) == (
        "upstream's kernels in this build: selective_scan bf16 8 x 4096 x 2048 without gate forward "
        "5.0 -> 2.0 us (2.50 times)"
    )
