"""Which cases make up a check: a few for ``--quick``, every mode that upstream supports for ``--full``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ssm_forge.kernels.cases import ConvCase, ScanCase, StatesCase, UpdateCase
from ssm_forge.kernels.draws import Case

PRECISIONS = ("fp32", "fp16", "bf16")
ON_OFF = (False, True)


@dataclass(frozen=True)
class Plan:
    """One line of the report.

    Attributes:
        name: what is checked.
        cases: run in order; the check passes when all pass.
        skipped: what of it is not run, and why.
    """

    name: str
    cases: tuple[Case, ...]
    skipped: str = ""


def quick() -> list[Plan]:
    """The plans of ``--quick``: forward and backward of both kernels in each precision, some seconds on a GPU."""
    plans = []
    for dtype in PRECISIONS:
        conv = [
            ConvCase(dtype=dtype, length=length, channel_last=last, dim=72)
            for length in (1, 129, 512)
            for last in ON_OFF
        ]
        plans.append(Plan(f"causal_conv1d forward and backward {dtype}", tuple(conv)))
        scan = [
            ScanCase(dtype=dtype, length=64),
            ScanCase(dtype=dtype, length=257, groups=2, states=16),
            ScanCase(dtype=dtype, length=33, constant_b=True, constant_c=True, z=False),
        ]
        plans.append(Plan(f"selective_scan forward and backward {dtype}", tuple(scan)))
    return plans


def full() -> list[Plan]:
    """The plans of ``--full``: every mode that upstream supports, in each precision."""
    plans = []
    for dtype in PRECISIONS:
        plans += [
            Plan(f"causal_conv1d {dtype}", tuple(_valid(_conv_basic(dtype)))),
            Plan(f"causal_conv1d channel-last {dtype}", tuple(_valid(_conv_channel_last(dtype)))),
            Plan(f"causal_conv1d seq_idx {dtype}", tuple(_valid(_conv_seq_idx(dtype)))),
            Plan(f"causal_conv1d lengths and slices {dtype}", tuple(_valid(_conv_lengths(dtype)))),
            Plan(f"causal_conv1d deterministic backward {dtype}", tuple(_valid(_conv_deterministic(dtype)))),
            Plan(f"causal_conv1d channel-last many blocks {dtype}", tuple(_valid(_conv_many(dtype)))),
            Plan(f"causal_conv1d_update {dtype}", tuple(_valid(_update(dtype)))),
            Plan(f"causal_conv1d_varlen_states {dtype}", tuple(_states(dtype))),
            Plan(f"selective_scan real A {dtype}", tuple(_valid(_scan_modes(dtype, complex_a=False)))),
            Plan(
                f"selective_scan complex A {dtype}",
                tuple(_valid(_scan_modes(dtype, complex_a=True))),
            ),
            Plan(f"selective_scan lengths {dtype}", tuple(_valid(_scan_lengths(dtype)))),
            Plan(f"selective_scan along the sequence {dtype}", tuple(_valid(_scan_along(dtype)))),
        ]
    return plans + upstream_limits()


def with_kernels(plans: list[Plan], *, along: bool) -> list[Plan]:
    """``plans``, with those of the scan along the sequence not run where a build has upstream's kernels only."""
    reason = "this build has upstream's kernels only"
    return [replace(p, cases=(), skipped=reason) if not along and "along the sequence" in p.name else p for p in plans]


def supported(plans: list[Plan], capability: str | None) -> list[Plan]:
    """``plans``, with those of bfloat16 said to be unsupported on a GPU below 8.0, which has no such numbers.

    Args:
        capability: such as ``7.5``; None where there is no GPU.
    """
    if capability is None or int(capability.partition(".")[0]) >= 8:
        return plans
    reason = f"bfloat16 is not supported on compute capability {capability}: it needs 8.0"
    return [replace(p, cases=(), skipped=reason) if p.name.endswith(" bf16") else p for p in plans]


def upstream_limits() -> list[Plan]:
    """Plans without cases, which say what upstream's kernels are known to get wrong, by their source."""
    return [
        Plan(
            "causal_conv1d seq_idx, gradient arriving at padding",
            (),
            "upstream's forward gives 0 at padding (seq_idx < 0), its backward counts what arrives there; "
            "checked with zeros there instead",
        ),
    ]


def _valid(cases: Iterator[Case]) -> Iterator[Case]:
    return (case for case in cases if not case.invalid())


def _conv_basic(dtype: str) -> Iterator[Case]:
    for width, bias, silu, weight in product((2, 3, 4), ON_OFF, ON_OFF, sorted({"fp32", dtype})):
        for length in (7, 128, 1134):
            yield ConvCase(dtype=dtype, weight_dtype=weight, width=width, bias=bias, silu=silu, length=length, dim=67)


def _conv_channel_last(dtype: str) -> Iterator[Case]:
    for width, bias, silu, initial, final in product((2, 3, 4), ON_OFF, ON_OFF, ON_OFF, ON_OFF):
        for length in (1, 2, 151):
            yield ConvCase(
                dtype=dtype,
                width=width,
                bias=bias,
                silu=silu,
                initial=initial,
                final=final,
                length=length,
                dim=104,
                channel_last=True,
            )


def _conv_seq_idx(dtype: str) -> Iterator[Case]:
    for width, bias, silu, initial, padding in product((2, 3, 4), ON_OFF, ON_OFF, ON_OFF, ON_OFF):
        yield ConvCase(
            dtype=dtype,
            width=width,
            bias=bias,
            silu=silu,
            initial=initial,
            padding=padding,
            sequences=5,
            length=200,
            dim=104,
            channel_last=True,
        )


def _conv_lengths(dtype: str) -> Iterator[Case]:
    # Chunks are 512 or 1024 tokens: full ones, and one, three or nearly all tokens over.
    for length, last, sliced in product((8, 63, 64, 65, 515, 1024, 2047, 2049, 4096, 16387), ON_OFF, ON_OFF):
        yield ConvCase(dtype=dtype, length=length, channel_last=last, sliced=sliced, dim=40)
    for last in ON_OFF:
        yield ConvCase(dtype=dtype, batch=3, dim=4128, length=130, channel_last=last)


def _conv_deterministic(dtype: str) -> Iterator[Case]:
    for length, last, bias in product((100, 129, 2048), ON_OFF, ON_OFF):
        yield ConvCase(dtype=dtype, length=length, channel_last=last, bias=bias, deterministic=True)


def _conv_many(dtype: str) -> Iterator[Case]:
    # A batch beyond a grid's 65535, and enough blocks for the backward to give each warp more tokens.
    yield ConvCase(dtype=dtype, batch=70000, dim=8, length=5, channel_last=True)
    many = ConvCase(dtype=dtype, batch=32, dim=4104, length=515, channel_last=True)
    yield many
    yield replace(many, deterministic=True, width=3)
    yield replace(many, initial=True, final=True)
    yield replace(many, sequences=7, width=2)


def _update(dtype: str) -> Iterator[Case]:
    modes = product((2, 3, 4), (1, 4, 5), (0, 1, 9), ON_OFF, ON_OFF, ON_OFF)
    for width, length, more, ring, gather, padding in modes:
        yield UpdateCase(
            dtype=dtype,
            width=width,
            length=length,
            state_len=width - 1 + more,
            ring=ring,
            gather=gather,
            padding=padding,
            dim=72,
        )
    for bias, silu, weight in product(ON_OFF, ON_OFF, sorted({"fp32", dtype})):
        yield UpdateCase(dtype=dtype, bias=bias, silu=silu, weight_dtype=weight, batch=65, dim=2064)


def _states(dtype: str) -> Iterator[Case]:
    for packed, dim, state_len in product((1, 4, 17), (64, 272), (1, 3, 20)):
        yield StatesCase(dtype=dtype, packed=packed, dim=dim, state_len=state_len)


def _scan_modes(dtype: str, *, complex_a: bool) -> Iterator[Case]:
    for constant_b, constant_c, groups in ((False, False, 0), (False, False, 2), (True, False, 0)):
        for d, z, bias, softplus in product(ON_OFF, ON_OFF, ON_OFF, ON_OFF):
            yield ScanCase(
                dtype=dtype,
                length=65,
                groups=groups,
                complex_a=complex_a,
                constant_b=constant_b,
                constant_c=constant_c,
                d=d,
                z=z,
                delta_bias=bias,
                softplus=softplus,
            )
    for constant_b, constant_c in ((False, True), (True, True)):
        for z, last in product(ON_OFF, ON_OFF):
            yield ScanCase(
                dtype=dtype,
                length=65,
                complex_a=complex_a,
                constant_b=constant_b,
                constant_c=constant_c,
                z=z,
                last_state=last,
            )
    for states in (1, 3, 64, 256):
        yield ScanCase(dtype=dtype, length=40, states=states, complex_a=complex_a)
    yield ScanCase(dtype=dtype, length=300, complex_a=complex_a, groups=1, dim=24)


def _scan_lengths(dtype: str) -> Iterator[Case]:
    # The kernel changes its tile at 128, 256, 512, 1024 and 2048, and takes another path off multiples.
    for length in (1, 2, 31, 128, 129, 256, 372, 512, 784, 1024, 1134, 2048, 2049, 4096, 6145):
        yield ScanCase(dtype=dtype, length=length, groups=2, states=4)
    yield ScanCase(dtype=dtype, length=2500, complex_a=True, states=4)
    yield ScanCase(dtype=dtype, length=200, batch=3, dim=96, states=16)


def _scan_along(dtype: str) -> Iterator[Case]:
    case = ScanCase(dtype=dtype, along=True, states=16)
    for groups, d, z, bias, softplus in product((0, 2), ON_OFF, ON_OFF, ON_OFF, ON_OFF):
        yield replace(case, length=65, groups=groups, d=d, z=z, delta_bias=bias, softplus=softplus)
    for states in (1, 3, 8, 15):
        yield replace(case, length=40, states=states)
    # Tiles are 16 and 32 steps, windows 256, and a sequence of several windows is divided into segments.
    for length in (1, 2, 7, 16, 17, 33, 255, 256, 257, 512, 784, 1030, 2048, 2049, 4096):
        yield replace(case, length=length, groups=2)
    # A block has 64 channels, a warp 16.
    for dim in (1, 15, 63, 65, 200):
        yield replace(case, dim=dim, length=300)
    # More blocks than a GPU has room for at a time: equal shares, which begin and end within a sequence.
    shares = replace(case, batch=12, dim=64, groups=32, length=520)
    yield shares
    for deterministic in (case, replace(case, length=600, dim=200, groups=2), shares):
        yield replace(deterministic, deterministic=True)
