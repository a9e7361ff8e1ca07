"""Each kernel over lengths, widths and precisions: against this GPU's memory and against plain PyTorch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssm_forge.kernels import backends, machine
from ssm_forge.kernels.checks import FAIL, NOT_RUN, PASS, Check
from ssm_forge.kernels.draws import DTYPES, environment
from ssm_forge.kernels.extensions import Build, ConvInputs, ScanInputs
from ssm_forge.kernels.timing import Call, Clock, copy_bandwidth, free_memory

Say = Callable[[str], None]

UPSTREAM_KERNELS = "upstream's kernels in this build"
CLOCK_STEP_SECONDS = 1e-6
CONV_TARGET, SCAN_TARGET, SCAN_LENGTH, SLOWER_TARGET = 0.90, 100.0, 4096, 0.01


@dataclass(frozen=True)
class Point:
    """One size to measure. ``size`` is the filter width of a convolution, the states of a scan."""

    kernel: str
    dtype: str
    batch: int
    dim: int
    length: int
    size: int
    channel_last: bool = False

    @property
    def bytes_needed(self) -> int:
        """About how many bytes of GPU memory inputs, outputs and the plain PyTorch way take together."""
        return 12 * self.batch * self.dim * self.length * (4 if self.dtype == "fp32" else 2)

    def inputs(self, device: str = "cuda") -> ConvInputs | ScanInputs:
        """Random inputs of this size, on the device."""
        shape = (self.batch, self.dim, self.length, self.size, DTYPES[self.dtype])
        if self.kernel == "causal_conv1d":
            return ConvInputs.make(*shape, channel_last=self.channel_last, device=device)
        return ScanInputs.make(*shape, device=device)


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


@dataclass(frozen=True)
class Versus:
    """The installed build and another one on the same inputs, taken in turns.

    Attributes:
        ratio: installed time over the other's; 1.01 is one percent slower.
        same_bits: whether the forward results are bit for bit the same.
    """

    other: str
    point: Point
    direction: str
    seconds: float
    other_seconds: float
    ratio: float
    same_bits: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rest = {k: v for k, v in asdict(self).items() if k != "point"}
        return {**asdict(self.point), **rest}


def compare_builds(installed: Build, other: Build, clock: Clock, dtypes: Sequence[str]) -> Iterator[Versus]:
    """Times of two builds against each other: both kernels, both directions, at sizes that fill the chip."""
    points = [
        *(Point("causal_conv1d", dtype, 8, 4096, 4096, 4, last) for dtype in dtypes for last in (False, True)),
        *(Point("selective_scan", dtype, 2, 2048, 4096, 16) for dtype in dtypes),
    ]
    for point in points:
        if point.kernel not in other.modules:
            continue
        inputs = point.inputs()
        for direction in ("forward", "backward"):
            pair = [
                inputs.backward(build) if direction == "backward" else inputs.forward(build)
                for build in (installed, other)
            ]
            same = _same_bits(inputs, pair) if direction == "forward" else None
            first, second = clock.interleaved(pair, repeats=60)
            yield Versus(other.label, point, direction, first, second, first / second, same)


def compare_kernels(build: Build, clock: Clock, dtypes: Sequence[str]) -> Iterator[Versus]:
    """Times of the scan's kernels as chosen by size against upstream's in the same build, from few channels to many.

    Nothing for a build that has upstream's kernels only.
    """
    if not hasattr(build.modules["selective_scan"], "calls"):
        return
    sizes = ((2, 2048, 256), (2, 2048, 1024), (2, 2048, 4096), (2, 2048, 16384), (64, 1536, 256), (8, 4096, 2048))
    points = [Point("selective_scan", dtype, *size, 16) for dtype in dtypes for size in sizes]

    def with_kernels(name: str, call: Call) -> Call:
        def run() -> Any:
            os.environ["SSM_FORGE_KERNELS"] = name
            return call()

        return run

    with environment("SSM_FORGE_KERNELS", ""):
        for point in points:
            inputs = point.inputs()
            for direction in ("forward", "backward"):
                pair = []
                for name in ("", "upstream"):
                    # The backward's states come from the forward of the same kernels.
                    os.environ["SSM_FORGE_KERNELS"] = name
                    call = inputs.backward(build) if direction == "backward" else inputs.forward(build)
                    pair.append(with_kernels(name, call))
                same = _same_bits(inputs, pair) if direction == "forward" else None
                first, second = clock.interleaved(pair, repeats=30)
                yield Versus(UPSTREAM_KERNELS, point, direction, first, second, first / second, same)


def _why_not(point: Point, deadline: float | None) -> str:
    if deadline is not None and time.monotonic() > deadline:
        return "the time given was used up"
    free = free_memory(torch.device("cuda"))
    if point.bytes_needed > free:
        return f"needs {point.bytes_needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free"
    return ""


def _same_bits(inputs: ConvInputs | ScanInputs, pair: list[Call]) -> bool:
    results = []
    for call in pair:
        returned = call()
        results.append(inputs.out.clone() if isinstance(inputs, ConvInputs) else returned[2].clone())
    return bool(torch.equal(results[0], results[1]))


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
    rows, versus, not_run = [], [], []
    with torch.no_grad():
        # Two builds against each other first: few sizes, and what the defaults stand on.
        for other in others:
            for result in compare_builds(installed, other, clock, dtypes or tuple(DTYPES)):
                versus.append(result)
                say(f"{result.other}: {result.point} {result.direction} {result.ratio:.3f}")
        for result in compare_kernels(installed, clock, dtypes or tuple(DTYPES)):
            versus.append(result)
            say(f"{result.other}: {result.point} {result.direction} {result.ratio:.3f}")
        for point in grid(small=small):
            if dtypes and point.dtype not in dtypes:
                continue
            reason = _why_not(point, deadline)
            if reason:
                not_run.append({**asdict(point), "reason": reason})
                continue
            for row in measure(point, installed, clock, document["copy_bandwidth"]):
                rows.append(row)
                say(f"{point} {row.direction}: {row.seconds * 1e6:.1f} us, {row.fraction:.2f} of copy")
            torch.cuda.empty_cache()
    document["rows"] = [row.as_dict() for row in rows]
    document["builds"] = [v.as_dict() for v in versus]
    document["not_run"] = not_run
    document["checks"] = [c.as_dict() for c in targets(rows, versus)]
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
        against_other = [v for v in versus if v.other == label]
        ratios = [v.ratio for v in against_other]
        # The clock counts in half microseconds.
        is_met = all(
            v.ratio <= 1 + SLOWER_TARGET or v.seconds - v.other_seconds < CLOCK_STEP_SECONDS for v in against_other
        )
        slower = f"times from {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%} of the other's"
        other = label if label == UPSTREAM_KERNELS else f"build '{label}'"
        name = f"never more than {SLOWER_TARGET:.0%} slower than {other}"
        checks.append(_target(name, is_met, slower))
    return checks


def _target(name: str, is_met: bool | None, detail: str) -> Check:
    if is_met is None:
        return Check(name, NOT_RUN, "that size was not measured")
    return Check(name, PASS if is_met else FAIL, detail)
