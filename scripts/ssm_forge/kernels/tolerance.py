"""How far a correct kernel may be from the exact result.

The kernels take inputs of 32 or 16 bits, compute in float32 (with nvcc's fast math, as upstream does) and
round once when they store. So an output may differ from the exact value by

    r * u_out * |exact|  +  K * u_32 * sqrt(n) * scale  +  half the smallest number of the output's dtype

- ``u_out``: unit roundoff of the stored dtype (2^-24 float32, 2^-11 float16, 2^-8 bfloat16); ``r``: how many
  times that dtype was rounded to on the way (1; 2 where a stored 16-bit tensor is used again).
- ``u_32 * sqrt(n)``: float32 rounding through ``n`` additions or steps of the recurrence, whose errors have
  random signs; ``scale``: the largest exact value of the tensor, since sums cancel. For the gradient of A it
  is at least that of the two sums whose difference it is: the kernel takes exp(delta A) h[t-1] to be
  h[t] - delta B u, and what that rounds away stays where the difference is small, down to 0 for length 1.
  For those of a scan's D, delta and delta_bias it is at least the root of the sum of the squares of what they
  sum up: over the sequences and steps, the latter two over the states as well.
- ``K`` = 16: some operations per term, each up to a few units: fast exp is off by 2 + 1.16 |x| units, fast
  division by 2. With a complex A it is 128: fast sine and cosine are only good to 2^-21.4 (CUDA C++
  Programming Guide, "Intrinsic Functions").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.complex64: 2.0**-24}
# Half the smallest float16 above zero; for the others, what flush-to-zero may take away.
TINY = {dtype: 2.0**-25 if dtype == torch.float16 else 2.0**-126 for dtype in UNIT}
REAL, COMPLEX = 16.0, 128.0

STATEMENT = (
    "|kernel - exact| <= r*u_out*|exact| + K*2^-24*sqrt(n)*max|exact| + tiny; u_out = 2^-24 (float32), "
    "2^-11 (float16), 2^-8 (bfloat16); n = terms of the longest sum (length, or batch*length for weight "
    "gradients); K = 16 (128 with complex A); r = 1 (2 where a stored 16-bit tensor is used again); for dA, "
    "max|exact| or the larger of the two sums it is the difference of; for dD, ddelta and ddelta_bias, max|exact| or "
    "the root of the sum of the squares of the terms"
)


@dataclass(frozen=True)
class Comparison:
    """One tensor of a kernel against its exact value.

    Attributes:
        name: what was compared, such as ``out`` or ``dweight``.
        error: largest difference; infinite where the kernel gave NaN or infinity.
        ratio: largest difference in units of what is allowed; more than 1 is a failure.
        problem: what is wrong, in words; empty when nothing is.
    """

    name: str
    error: float
    ratio: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the tensor is close enough."""
        # Written so that a NaN ratio is a failure.
        return not self.problem and self.ratio <= 1.0


def compare(
    name: str,
    got: Tensor,
    exact: Tensor,
    *,
    terms: int,
    factor: float = REAL,
    roundings: int = 1,
    cancelled: float = 0.0,
) -> Comparison:
    """Compare a kernel's tensor with the exact one, by the bound above.

    Args:
        name: what it is, for the report.
        got: what the kernel gave.
        exact: float64 or complex128, of the same shape.
        terms: ``n`` of the bound above.
        factor: ``K`` of the bound above.
        roundings: ``r`` of the bound above.
        cancelled: the size of what was added and taken off again; a least value for ``scale``.
    """
    exact = exact.detach()
    scale = max(float(exact.abs().max()), cancelled)
    bound = (
        roundings * UNIT[got.dtype] * exact.abs()
        + factor * UNIT[torch.float32] * math.sqrt(terms) * scale
        + TINY[got.dtype]
    )
    return _within(name, got, exact, bound)


def compare_to_scale(name: str, got: Tensor, exact: Tensor, relative: float) -> Comparison:
    """Compare with one bound for the whole tensor, ``relative`` times its largest exact value."""
    bound = torch.full(exact.shape, relative * float(exact.detach().abs().max()), dtype=torch.float64)
    return _within(name, got, exact, bound.to(exact.device) + TINY[got.dtype])


def _within(name: str, got: Tensor, exact: Tensor, bound: Tensor) -> Comparison:
    exact = exact.detach()
    if got.shape != exact.shape:
        problem = f"shape {tuple(got.shape)} instead of {tuple(exact.shape)}"
        return Comparison(name, math.inf, math.inf, problem)
    if not bool(torch.isfinite(exact.abs()).all()):
        return Comparison(name, math.inf, math.inf, "the exact value itself is not finite")
    wrong = got.detach().to(exact.dtype)
    finite = torch.isfinite(wrong.abs())
    if not bool(finite.all()):
        count = int((~finite).sum())
        where = (~finite).nonzero()[0].tolist()
        problem = f"{count} of {finite.numel()} values are NaN or infinite, the first at {where}"
        return Comparison(name, math.inf, math.inf, problem)
    error = (wrong - exact).abs()
    ratios = error / bound
    worst = float(ratios.max())
    problem = ""
    if not worst <= 1.0:
        where = (ratios == ratios.max()).nonzero()[0].tolist()
        at = tuple(where)
        bad = int((ratios > 1).sum())
        problem = (
            f"{bad} of {error.numel()} values are off, the worst at {where}: "
            f"{_number(wrong[at])} instead of {_number(exact[at])} (allowed {float(bound[at]):.2e})"
        )
    return Comparison(name, float(error.max()), worst, problem)


def identical(name: str, got: Tensor, expected: Tensor) -> Comparison:
    """Compare bits: for what is copied, not computed."""
    same = got.shape == expected.shape and got.dtype == expected.dtype and torch.equal(got, expected)
    return Comparison(name, 0.0 if same else math.inf, 0.0 if same else math.inf, "" if same else "changed")


def _number(value: Tensor) -> str:
    return f"{complex(value.item()):.6g}" if value.is_complex() else f"{float(value):.6g}"
