"""The checks at scale: their plans, and that they see a kernel whose offsets wrap."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here; ./run test runs this in an installed env")

from ssm_forge.kernels import backends, large, large_tensors, plans  # noqa: E402
from ssm_forge.kernels.plans import Plan  # noqa: E402


def test_what_does_not_fit_says_what_it_needs() -> None:
    named = large.plans(20_000_000_000)
    run, left = [p for p in named if p.cases], [p for p in named if not p.cases]
    assert run
    assert left
    assert all("needs" in p.skipped and "20 GB are free" in p.skipped for p in left)
    assert len(large.plans(1 << 40)) == len(named)
    assert all(p.cases for p in large.plans(1 << 40))


@pytest.mark.parametrize("edge", large.EDGES)
def test_a_size_lies_on_its_side_of_the_edge(edge: str) -> None:
    elements = large.EDGES[edge]
    side, _, power = edge.partition(" 2^")
    for others, multiple in ((1024, 8), (33280, 256), (4352 * 256, 1)):
        size = large_tensors.fit(elements, others, multiple) * others
        assert (size < 2 ** int(power)) == (side == "below")


def test_no_large_case_is_made_smaller_when_it_fails() -> None:
    from ssm_forge.kernels.shrink import shrink

    case = large.LargeCase(what="conv", edge="above 2^32")
    assert shrink(case, lambda candidate: True) == (case, 0)


def _wrapped(function: Any, at: int) -> Any:
    """A kernel that from token ``at`` on begins again at the start."""

    def wrong(x: Any, *args: Any, **kwargs: Any) -> Any:
        out = function(x, *args, **kwargs)
        return torch.cat([out[..., :at], out[..., : out.shape[-1] - at]], dim=-1)

    return wrong


@pytest.mark.parametrize("right", [True, False])
def test_an_offset_that_wraps_is_seen(right: bool) -> None:
    make = large_tensors.Maker(torch.device("cpu"), torch.Generator().manual_seed(3))
    honest = backends.emulated()
    conv = honest.conv if right else _wrapped(honest.conv, 2000)
    wrong = backends.Backend("wraps", conv, honest.conv_update, honest.conv_states, honest.scan, {})
    # The same check on a small tensor: 2,048 channels of 2,056 tokens.
    found = large._conv(wrong, make, 2048 * 2056, last=True)
    assert all(c.ok for c in found) == right


def test_bfloat16_below_8_0_is_named_as_unsupported() -> None:
    both = [Plan("scan fp16", plans.quick()[0].cases), Plan("scan bf16", plans.quick()[0].cases)]
    half, brain = plans.supported(both, "7.5")
    assert half.cases
    assert not brain.cases
    assert "not supported on compute capability 7.5" in brain.skipped
    assert plans.supported(both, "8.0") == plans.supported(both, None) == both
