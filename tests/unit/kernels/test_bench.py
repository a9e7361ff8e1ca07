"""The benchmark's own logic on the CPU: arguments in the right order, targets judged from figures."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here: ./run test runs this elsewhere")

from ssm_forge.kernels import backends, bench, plot  # noqa: E402
from ssm_forge.kernels.extensions import Build  # noqa: E402


class WallClock:
    """Stands in for CUDA events."""

    def interleaved(self, calls: list[Any], *, repeats: int = 1, warmup: int = 0) -> list[float]:
        times = []
        for call in calls:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return times

    def median(self, call: Any, **ignored: Any) -> float:
        return self.interleaved([call])[0]


def _conv_fwd(x, weight, bias, seq_idx, initial, out, final, silu) -> None:
    out.copy_(backends.conv(x, weight, bias, activation="silu" if silu else None))


def _conv_bwd(x, weight, bias, dout, seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu) -> None:
    assert dweight.shape == weight.shape and dbias.shape == bias.shape and dx.shape == x.shape == dout.shape


def _scan_fwd(u, delta, a, b, c, d, z, delta_bias, softplus) -> list[Any]:
    gated, state = backends.parallel_scan(u, delta, a, b, c, d, z, delta_bias, softplus, True)
    return [gated, state, gated]


def _scan_bwd(u, delta, a, b, c, d, z, delta_bias, dout, x, out, dz, softplus, recompute) -> None:
    assert dout.shape == u.shape == out.shape and dz is None


@pytest.fixture
def build() -> Build:
    conv = SimpleNamespace(causal_conv1d_fwd=_conv_fwd, causal_conv1d_bwd=_conv_bwd)
    return Build("fake", {"causal_conv1d": conv, "selective_scan": SimpleNamespace(fwd=_scan_fwd, bwd=_scan_bwd)})


def _rows(build: Build) -> list[bench.Row]:
    points = [
        bench.Point("causal_conv1d", "bf16", 1, 16, 64, 4),
        bench.Point("causal_conv1d", "bf16", 1, 16, 64, 4, True),
        bench.Point("selective_scan", "fp32", 1, 4, 32, 3),
    ]
    clock: Any = WallClock()
    with torch.no_grad():
        return [row for p in points for row in bench.measure(p, build, clock, 1e9, device="cpu")]


def test_every_point_is_measured_both_ways_beside_plain_pytorch(build: Build) -> None:
    rows = _rows(build)
    assert [(r.point.kernel, r.direction) for r in rows[-2:]] == [
        ("selective_scan", "forward"),
        ("selective_scan", "backward"),
    ]
    assert set(rows[0].plain) == {"nn.Conv1d + SiLU"}
    assert set(rows[4].plain) == {"sequential scan", "parallel scan"}
    assert all(r.seconds > 0 and r.bandwidth > 0 for r in rows)


def test_the_sequential_and_the_parallel_scan_agree() -> None:
    inputs = bench.ScanInputs.make(2, 4, 37, 3, torch.float32, device="cpu")
    one = bench.sequential_scan(*inputs.arguments())
    other = backends.parallel_scan(*inputs.arguments(), True)
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _row(kernel: str, fraction: float, plain: dict[str, float]) -> bench.Row:
    point = bench.Point(kernel, "bf16", 1, 1, 4096, 4)
    return bench.Row(point, "forward", 1.0, 1.0, fraction, plain)


@pytest.mark.parametrize(("fraction", "times", "wanted"), [(0.95, 150.0, "pass"), (0.89, 99.0, "fail")])
def test_promises_are_judged_from_what_was_measured(fraction: float, times: float, wanted: str) -> None:
    rows = [_row("causal_conv1d", fraction, {}), _row("selective_scan", 0.1, {"sequential scan": times})]
    assert [c.status for c in bench.targets(rows, [])] == [wanted, wanted]


def test_a_promise_nothing_was_measured_for_is_not_run() -> None:
    assert {c.status for c in bench.targets([], [])} == {"not-run"}


@pytest.mark.parametrize(("ratio", "wanted"), [(1.009, "pass"), (1.02, "fail"), (0.7, "pass")])
def test_one_percent_slower_than_another_build_fails(ratio: float, wanted: str) -> None:
    point = bench.Point("causal_conv1d", "bf16", 1, 1, 1, 4)
    versus = bench.Versus("upstream", point, "forward", ratio, 1.0, ratio, True)
    assert bench.targets([], [versus])[-1].status == wanted


@pytest.mark.parametrize(("ratio", "wanted"), [(1.14, "pass"), (1.16, "fail")])
def test_a_fixed_order_may_cost_a_little_more(ratio: float, wanted: str) -> None:
    point = bench.Point("selective_scan", "bf16", 1, 1, 1, 4)
    versus = bench.Versus(bench.ANY_ORDER, point, "backward", ratio, 1.0, ratio, None)
    assert bench.targets([], [versus])[-1].status == wanted


def test_a_size_that_does_not_fit_or_comes_too_late_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (bench.Point("causal_conv1d", "fp32", 1, 8, length, 4) for length in (8, 8192))
    monkeypatch.setattr(bench, "free_memory", lambda device: 1 << 20)
    noted: list[dict[str, Any]] = []
    assert list(bench._fitting([small, large], None, noted)) == [small]
    assert [(entry["length"], entry["reason"]) for entry in noted] == [
        (8192, "needs 0 GB of GPU memory, 0 GB are free"),
    ]
    assert list(bench._fitting([small], time.monotonic() - 1, noted)) == []
    assert noted[1]["reason"] == "the time given was used up"


def test_charts_are_drawn(build: Build, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed here")
    document = {
        "device": {"name": "a GPU"},
        "versions": {"torch": "2"},
        "date": "2026-01-01T",
        "rows": [row.as_dict() for row in _rows(build)],
    }
    charts = plot.draw(document, tmp_path)
    assert charts
    assert all(path.stat().st_size > 5000 for path in charts)
