"""What a build with upstream's kernels as they are can't pass is named and not run; everything else is run."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here; ./run test runs this in an installed env")

from ssm_forge.kernels import as_upstream, backends, large, plans  # noqa: E402
from ssm_forge.kernels.cases import ConvCase, ScanCase  # noqa: E402
from ssm_forge.kernels.inner import InnerCase  # noqa: E402
from ssm_forge.kernels.plans import Plan  # noqa: E402


def named(found: list[Plan], text: str) -> list[Plan]:
    return [plan for plan in found if text in plan.name]


def test_a_build_that_counts_its_calls_is_ours() -> None:
    theirs = backends.emulated()
    assert as_upstream.is_upstreams(theirs)
    ours = backends.Backend("ours", *(theirs.conv,) * 4, blocks={}, calls=lambda: {"forward along": 0})
    assert not as_upstream.is_upstreams(ours)


def test_there_is_nothing_to_switch_and_that_is_said() -> None:
    first = as_upstream.applicable(plans.quick())[0]
    assert (first.name, first.cases) == ("SSM_FORGE_KERNELS", ())
    assert "nothing to switch" in first.skipped


@pytest.mark.parametrize("extent", [plans.quick, plans.full])
def test_no_case_is_lost_without_a_word(extent: object) -> None:
    before = extent()  # type: ignore[operator]
    after = as_upstream.applicable(before)
    for plan in before:
        kept = [case for other in after if other.name == plan.name for case in other.cases]
        left = [case for case in plan.cases if case not in kept]
        assert bool(left) == any(
            not other.cases and "not applicable" in other.skipped for other in named(after, plan.name) if left
        )
        assert all("along the sequence" in plan.name or as_upstream.known_fault(case) for case in left)
    assert sum(len(plan.cases) for plan in after) > 0.6 * sum(len(plan.cases) for plan in before)


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (ConvCase(dtype="bf16", length=2049), True),
        (ConvCase(dtype="fp32", length=515), True),
        (ConvCase(dtype="fp32", length=516), False),
        (ConvCase(dtype="bf16", length=515), False),
        (ConvCase(dtype="bf16", length=1024), False),
        (ConvCase(dtype="bf16", length=7), False),
        (ConvCase(dtype="bf16", length=2049, silu=False), False),
        (ConvCase(dtype="bf16", length=2049, backward=False), False),
        (ConvCase(dtype="bf16", length=2049, channel_last=True), False),
        (ScanCase(complex_a=True, groups=2), True),
        (ScanCase(complex_a=True, groups=1), False),
        (ScanCase(groups=2), False),
        (ScanCase(constant_b=True), True),
        (ScanCase(constant_b=True, last_state=False), False),
        (InnerCase(), True),
    ],
)
def test_what_upstream_gets_wrong_is_known_case_by_case(case: object, fault: bool) -> None:
    assert bool(as_upstream.known_fault(case)) == fault  # type: ignore[arg-type]


def test_beyond_32_bits_only_this_projects_kernels_are_checked() -> None:
    found = as_upstream.applicable(large.plans(1 << 40))
    run = [plan for plan in found if plan.cases]
    assert run
    assert all("below 2^31" in plan.name for plan in run)
    left = [plan for plan in found if " above " in plan.name]
    assert left
    assert all(plan.skipped.startswith("not applicable: ") for plan in left)
