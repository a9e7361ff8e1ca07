"""Each kernel over lengths, widths and precisions: against this GPU's memory and against plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssm_forge.kernels import backends, machine
from ssm_forge.kernels.as_upstream import NOTHING_TO_SWITCH
from ssm_forge.kernels.checks import FAIL, NOT_RUN, PASS, Check
from ssm_forge.kernels.draws import DTYPES
from ssm_forge.kernels.extensions import Build, ConvInputs, Point, ScanInputs
from ssm_forge.kernels.timing import Call, Clock, copy_bandwidth, free_memory
from ssm_forge.kernels.versus import ANY_ORDER, UPSTREAM_KERNELS, Versus, compare_builds, compare_kernels, switched

Say = Callable[[str], None]

CLOCK_STEP_SECONDS = 1e-6
CONV_TARGET, SCAN_TARGET, SCAN_LENGTH, SLOWER_TARGET = 0.90, 100.0, 4096, 0.01
FIXED_ORDER_TARGET, CONV = 0.15, "causal_conv1d"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        seconds: median time of the kernel.
        bandwidth: least traffic over time, bytes per second.
        fraction: that over the measured copy bandwidth.
        plain: the plain PyTorch ways -> seconds.
    """

    point: Point
    direction: str
    seconds: float
    bandwidth: float
    fraction: float
    plain: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with the speedup over each plain way."""
        speedup = {name: seconds / self.seconds for name, seconds in self.plain.items()}
        rest = {k: v for k, v in asdict(self).items() if k != "point"}
        return {**asdict(self.point), **rest, "speedup": speedup}


def grid(*, small: bool = False) -> list[Point]:
    """The sizes that are measured; ``small`` for a look of some seconds."""
    lengths = (2048, 16384) if small else (256, 1024, 2048, 4096, 8192, 16384, 65536)
    points = [
        Point("causal_conv1d", dtype, 8 if length <= 16384 else 2, 4096, length, 4, last)
        for dtype in DTYPES
        for length in lengths
        for last in (False, True)
    ]
    if not small:
        points += [Point("causal_conv1d", "bf16", 8, 4096, 4096, width) for width in (2, 3)]
    lengths = (1024, 4096) if small else (256, 1024, 2048, 4096, 8192, 16384, 32768)
    points += [Point("selective_scan", dtype, 2, 2048, length, 16) for dtype in DTYPES for length in lengths]
    return points


def sequential_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    z: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """The recurrence as most would write it: a loop over time on float32 tensors (B, D, N)."""
    step = F.softplus(delta.float() + delta_bias[:, None])
    wide, b, c = u.float(), b[:, 0].float(), c[:, 0].float()
    state = wide.new_zeros(u.shape[0], u.shape[1], a.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        decay = torch.exp(step[:, :, t, None] * a)
        state = decay * state + (step[:, :, t] * wide[:, :, t])[:, :, None] * b[:, None, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, c[:, :, t]))
    out = torch.stack(outputs, dim=2) + d[:, None] * wide
    return (out * F.silu(z.float())).to(u.dtype)


def _layer(inputs: ConvInputs) -> Any:
    dim, width = inputs.weight.shape
    return torch.nn.Conv1d(dim, dim, width, groups=dim, padding=width - 1).to(inputs.x)


def _plain_conv(inputs: ConvInputs) -> dict[str, Call]:
    layer, length = _layer(inputs), inputs.x.shape[2]
    return {"nn.Conv1d + SiLU": lambda: F.silu(layer(inputs.x)[..., :length])}


def _plain_scan(inputs: ScanInputs) -> dict[str, Call]:
    ways: dict[str, Call] = {"sequential scan": lambda: sequential_scan(*inputs.arguments())}
    needed = 8 * 4 * inputs.u.numel() * inputs.a.shape[1]
    if needed < free_memory(inputs.u.device):
        run: backends.Function = backends.parallel_scan
        ways["parallel scan"] = lambda: run(*inputs.arguments(), True)
    return ways


def _plain_backward(inputs: ConvInputs) -> dict[str, Call]:
    layer = _layer(inputs)
    x = inputs.x.detach().requires_grad_()
    with torch.enable_grad():
        out = F.silu(layer(x)[..., : x.shape[2]])
    leaves = [x, *layer.parameters()]
    return {
        "nn.Conv1d + SiLU": lambda: torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True),
    }


def measure(point: Point, build: Build, clock: Clock, copy: float, *, device: str = "cuda") -> Iterator[Row]:
    """The times of forward and backward at one size, with the plain ways beside them.

    Args:
        copy: the measured copy bandwidth, bytes per second.
    """
    inputs = point.inputs(device)
    for direction in ("forward", "backward"):
        backward = direction == "backward"
        call = inputs.backward(build) if backward else inputs.forward(build)
        seconds = clock.median(call)
        plain: dict[str, Call] = {}
        if isinstance(inputs, ConvInputs):
            plain = _plain_backward(inputs) if backward else _plain_conv(inputs)
        elif not backward and point.length <= 16384:
            plain = _plain_scan(inputs)
        # A loop over time takes up to a second: a few runs are plenty.
        times = {name: clock.median(way, repeats=3 if "scan" in name else 15, warmup=1) for name, way in plain.items()}
        rate = inputs.bytes_moved(backward=backward) / seconds
        yield Row(point, direction, seconds, rate, rate / copy, times)


def _why_not(point: Point, deadline: float | None) -> str:
    if deadline is not None and time.monotonic() > deadline:
        return "the time given was used up"
    free = free_memory(torch.device("cuda"))
    if point.bytes_needed > free:
        return f"needs {point.bytes_needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free"
    return ""


def _fitting(points: Iterable[Point], deadline: float | None, not_run: list[dict[str, Any]]) -> Iterator[Point]:
    """Those for which there is memory and time when their turn comes; the others are noted."""
    for point in points:
        torch.cuda.empty_cache()
        reason = _why_not(point, deadline)
        if reason:
            not_run.append({**asdict(point), "reason": reason})
        else:
            yield point


def run(
    installed: Build,
    others: list[Build],
    *,
    small: bool = False,
    dtypes: Sequence[str] = (),
    deadline: float | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measure everything; the document of ``kernels bench`` comes out.

    Args:
        others: builds to compare the installed one with.
        small: a few sizes only.
        dtypes: only these; all when empty.
        deadline: ``time.monotonic()`` after which the sizes that are left are listed as not run.
    """
    device = torch.device("cuda")
    clock = Clock(device)
    document: dict[str, Any] = {**machine.header(), "copy_bandwidth": copy_bandwidth(clock, device)}
    say(f"copy: {document['copy_bandwidth'] / 1e9:.0f} GB/s")
    rows, versus = [], []
    not_run: list[dict[str, Any]] = []
    with torch.no_grad():
        # Two builds against each other first: few sizes, and what the defaults stand on.
        for other in others:
            for result in compare_builds(installed, other, clock, dtypes or tuple(DTYPES)):
                versus.append(result)
                say(str(result))
        points = _fitting(switched(dtypes or tuple(DTYPES)), deadline, not_run)
        for result in compare_kernels(installed, clock, points):
            versus.append(result)
            say(str(result))
        wanted = (point for point in grid(small=small) if not dtypes or point.dtype in dtypes)
        for point in _fitting(wanted, deadline, not_run):
            for row in measure(point, installed, clock, document["copy_bandwidth"]):
                rows.append(row)
                say(f"{point} {row.direction}: {row.seconds * 1e6:.1f} us, {row.fraction:.2f} of copy")
    document["rows"] = [row.as_dict() for row in rows]
    document["builds"] = [v.as_dict() for v in versus]
    document["not_run"] = not_run
    checks = targets(rows, versus)
    if not hasattr(installed.modules["selective_scan"], "calls"):
        checks.append(Check(NOTHING_TO_SWITCH.name, NOT_RUN, NOTHING_TO_SWITCH.skipped))
    document["checks"] = [c.as_dict() for c in checks]
    return document


def targets(rows: list[Row], versus: list[Versus]) -> list[Check]:
    """One check for each promise about speed, by what was measured; not run where that size was not."""
    conv = [r for r in rows if (r.point.kernel, r.point.dtype, r.direction) == ("causal_conv1d", "bf16", "forward")]
    best = max((r.fraction for r in conv if not r.point.channel_last), default=None)
    scans = [
        r.plain["sequential scan"] / r.seconds
        for r in rows
        if r.point.kernel == "selective_scan" and r.point.length == SCAN_LENGTH and "sequential scan" in r.plain
    ]
    checks = [
        _target(
            f"causal_conv1d forward bf16 reaches {CONV_TARGET:.0%} of copy bandwidth",
            None if best is None else best >= CONV_TARGET,
            "" if best is None else f"{best:.1%}",
        ),
        _target(
            f"selective_scan forward at length {SCAN_LENGTH} is {SCAN_TARGET:.0f} times the sequential scan",
            None if not scans else min(scans) >= SCAN_TARGET,
            "" if not scans else f"{min(scans):.0f} to {max(scans):.0f} times",
        ),
    ]
    for label in sorted({v.other for v in versus}):
        # Of the convolution's fixed order the share of the bandwidth says more.
        against_other = [v for v in versus if v.other == label and (label != ANY_ORDER or v.point.kernel != CONV)]
        ratios = [v.ratio for v in against_other] or [1.0]
        limit = FIXED_ORDER_TARGET if label == ANY_ORDER else SLOWER_TARGET
        # The clock counts in half microseconds.
        is_met = all(v.ratio <= 1 + limit or v.seconds - v.other_seconds < CLOCK_STEP_SECONDS for v in against_other)
        slower = f"times from {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%} of the other's"
        other = label if label in (UPSTREAM_KERNELS, ANY_ORDER) else f"build '{label}'"
        what = "a fixed order of the scan " if label == ANY_ORDER else ""
        name = f"{what}never more than {limit:.0%} slower than {other}"
        checks.append(_target(name, is_met if against_other else None, slower))
    return checks


def _target(name: str, is_met: bool | None, detail: str) -> Check:
    if is_met is None:
        return Check(name, NOT_RUN, "that size was not measured")
    return Check(name, PASS if is_met else FAIL, detail)
