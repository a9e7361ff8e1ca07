"""Two ways to compute the same, timed in turns: two builds, the kernels of one build, two orders of adding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssm_forge.kernels.draws import environment
from ssm_forge.kernels.extensions import Build, ConvInputs, Point, ScanInputs
from ssm_forge.kernels.timing import Call, Clock

UPSTREAM_KERNELS = "upstream's kernels in this build"
ANY_ORDER = "sums in any order"

_DETERMINISTIC = {"causal_conv1d": "CAUSAL_CONV1D_DETERMINISTIC", "selective_scan": "MAMBA_DETERMINISTIC"}
_SWITCH = "SSM_FORGE_KERNELS"


@dataclass(frozen=True)
class Versus:
    """The installed build and another one, or another way, on the same inputs, taken in turns.

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

    def __str__(self) -> str:
        layout = " channel-last" if self.point.channel_last else "" if self.point.gated else " without gate"
        size = f"{self.point.batch} x {self.point.dim} x {self.point.length}{layout}"
        times = f"{self.other_seconds * 1e6:.1f} -> {self.seconds * 1e6:.1f} us ({1 / self.ratio:.2f} times)"
        return f"{self.other}: {self.point.kernel} {self.point.dtype} {size} {self.direction} {times}"


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


def switched(dtypes: Sequence[str]) -> list[Point]:
    """The sizes at which a build's kernels are compared with upstream's in it, from few channels to many."""
    scans = (
        *((2, 2048, length) for length in (256, 1024, 4096, 16384)),
        (1, 1536, 4096),
        (64, 1536, 256),
        (32, 2048, 1024),
        (8, 4096, 2048),
        (8, 4096, 8192),
    )
    ungated = ((2, 2048, 4096), (32, 2048, 1024), (8, 4096, 2048))
    convolutions = (*((8, 4096, length) for length in (256, 1024, 4096, 16384)), (2, 4096, 65536))
    return [
        point
        for dtype in dtypes
        for point in (
            *(Point("selective_scan", dtype, *size, 16) for size in scans),
            *(Point("selective_scan", dtype, *size, 16, gated=False) for size in ungated),
            *(Point("causal_conv1d", dtype, *size, 4, channel_last=True) for size in convolutions),
        )
    ]


def compare_kernels(build: Build, clock: Clock, points: Iterable[Point], *, device: str = "cuda") -> Iterator[Versus]:
    """Times of kernels as chosen by size against upstream's in the same build; backward also against a fixed order.

    Nothing for a build that has upstream's kernels only.
    """
    with ExitStack() as stack:
        for name in (_SWITCH, *_DETERMINISTIC.values()):
            stack.enter_context(environment(name, ""))
        for point in points:
            if hasattr(build.modules[point.kernel], "calls"):
                yield from _compared(point, build, clock, device)


def _compared(point: Point, build: Build, clock: Clock, device: str) -> Iterator[Versus]:
    inputs, mode = point.inputs(device), _DETERMINISTIC[point.kernel]
    forward = [_under({_SWITCH: name, mode: "0"}, inputs.forward, build) for name in ("", "upstream")]
    same = _same_bits(inputs, forward)
    first, second = clock.interleaved(forward)
    yield Versus(UPSTREAM_KERNELS, point, "forward", first, second, first / second, same)
    orders = ({_SWITCH: "", mode: "0"}, {_SWITCH: "upstream", mode: "0"}, {_SWITCH: "", mode: "1"})
    first, second, fixed = clock.interleaved([_under(words, inputs.backward, build) for words in orders])
    yield Versus(UPSTREAM_KERNELS, point, "backward", first, second, first / second, None)
    yield Versus(ANY_ORDER, point, "backward", fixed, first, fixed / first, None)


def _under(words: dict[str, str], make: Callable[[Build], Call], build: Build) -> Call:
    """A call made and run with these environment variables: a backward's states come from its own forward."""

    def run() -> Any:
        os.environ.update(words)
        return call()

    os.environ.update(words)
    call = make(build)
    return run


def _same_bits(inputs: ConvInputs | ScanInputs, pair: list[Call]) -> bool:
    results = []
    for call in pair:
        returned = call()
        # Of a scan with a gate, its last output: the others are what that is made of.
        written = inputs.out if isinstance(inputs, ConvInputs) else returned[0 if inputs.z is None else 2]
        results.append(written.clone())
    return bool(torch.equal(results[0], results[1]))
