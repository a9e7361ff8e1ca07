"""Tests of the checks themselves, on the CPU, with torch and the standard library only.

The references agree with each other and with torch; correct kernels pass; every wrong one is caught. The
same functions run under pytest (``tests/unit/kernels``) and as ``python -m ssm_forge.kernels selftest``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from ssm_forge.kernels import backends, blocks, checks, faults, inner, plans, reference, siso, tolerance
from ssm_forge.kernels.checks import FAIL, NOT_RUN, PASS, Check
from ssm_forge.kernels.plans import Plan

CPU = torch.device("cpu")


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape, f"{got.shape} instead of {wanted.shape}"
    error = float((got - wanted).abs().max())
    assert error < 1e-12 * max(1.0, float(wanted.abs().max())), f"differs by {error}"


def conv_equals_torch_conv1d() -> None:
    for width in (2, 3, 4):
        x, weight, bias = _random(2, 5, 11), _random(5, width, seed=1), _random(5, seed=2)
        plain = F.conv1d(F.pad(x, (width - 1, 0)), weight[:, None], bias, groups=5)
        _close(reference.causal_conv1d(x, weight, bias)[0], plain)
        _close(reference.causal_conv1d(x, weight, bias, activation="silu")[0], F.silu(plain))


def conv_in_two_parts_equals_conv_in_one() -> None:
    x, weight = _random(2, 3, 10), _random(3, 4, seed=1)
    for cut in (1, 2, 5):
        whole, end = reference.causal_conv1d(x, weight)
        first, middle = reference.causal_conv1d(x[..., :cut], weight)
        second, last = reference.causal_conv1d(x[..., cut:], weight, initial_states=middle)
        _close(torch.cat([first, second], dim=2), whole)
        _close(last, end)


def conv_with_seq_idx_equals_each_sequence_alone() -> None:
    x, weight, bias = _random(1, 3, 12), _random(3, 4, seed=1), _random(3, seed=2)
    owners = torch.tensor([[0] * 5 + [1] * 2 + [2] * 5], dtype=torch.int32)
    packed = reference.causal_conv1d(x, weight, bias, seq_idx=owners)[0]
    parts = [reference.causal_conv1d(part, weight, bias)[0] for part in x.split([5, 2, 5], dim=2)]
    _close(packed, torch.cat(parts, dim=2))
    owners[0, 11] = -1
    padded = reference.causal_conv1d(x, weight, bias, seq_idx=owners, activation="silu")[0]
    assert bool((padded[0, :, 11] == 0).all()), "padding must give 0"


def update_equals_conv_token_by_token() -> None:
    x, weight, bias = _random(2, 3, 9), _random(3, 4, seed=1), _random(3, seed=2)
    whole = reference.causal_conv1d(x, weight, bias, activation="silu")[0]
    for ring in (False, True):
        state, outs = torch.zeros(2, 3, 5, dtype=torch.float64), []
        for t in range(9):
            out, state = reference.causal_conv1d_update(
                x[..., t : t + 1],
                state,
                weight,
                bias,
                activation="silu",
                cache_seqlens=[t, t] if ring else None,
            )
            outs.append(out)
        _close(torch.cat(outs, dim=2), whole)


def varlen_states_equal_final_states() -> None:
    x, bounds = _random(20, 3), [0, 1, 9, 20]
    got = reference.varlen_states(x, bounds, 3)
    for row in range(3):
        part = x[bounds[row] : bounds[row + 1]].T[None]
        _close(got[row], reference.causal_conv1d(part, _random(3, 4))[1][0])


def scan_equals_closed_form() -> None:
    u, delta = _random(2, 4, 13), torch.rand(2, 4, 13, dtype=torch.float64)
    for complex_a in (False, True):
        a = -torch.exp(_random(4, 3, seed=3))
        last = 26 if complex_a else 13
        a = torch.complex(a, _random(4, 3, seed=4)) if complex_a else a
        constant = torch.complex(_random(4, 3), _random(4, 3, seed=9)) if complex_a else _random(4, 3)
        for b in (_random(2, 3, last, seed=5), _random(2, 2, 3, last, seed=6), constant):
            for c in (_random(2, 3, last, seed=7), _random(2, 2, 3, last, seed=8), constant):
                wanted = reference.selective_scan_closed_form(u, delta, a, b, c)
                _close(reference.selective_scan(u, delta, a, b, c)[0], wanted)


def scan_options_do_what_they_say() -> None:
    u, raw, z = _random(2, 4, 7), _random(2, 4, 7, seed=1), _random(2, 4, 7, seed=2)
    a, b, c = -torch.exp(_random(4, 3, seed=3)), _random(2, 3, 7, seed=4), _random(2, 3, 7, seed=5)
    d, bias = _random(4, seed=6), _random(4, seed=7)
    delta = F.softplus(raw + bias[:, None])
    wanted = (reference.selective_scan_closed_form(u, delta, a, b, c) + d[:, None] * u) * F.silu(z)
    got, state = reference.selective_scan(u, raw, a, b, c, d, z, delta_bias=bias, delta_softplus=True)
    _close(got, wanted)
    # The state after all but the last step, stepped once more by hand.
    before = reference.selective_scan(u[..., :-1], delta[..., :-1], a, b[..., :-1], c[..., :-1])[1]
    step = delta[..., -1, None]
    _close(state, torch.exp(step * a) * before + step * b[:, None, :, -1] * u[..., -1, None])


def softplus_and_its_gradient_are_right_everywhere() -> None:
    x = torch.tensor([-800.0, -30.0, -1.0, 0.0, 1.0, 30.0, 800.0], dtype=torch.float64, requires_grad=True)
    got = reference.softplus(x)
    got.sum().backward()
    assert x.grad is not None
    _close(got.detach()[1:-1], torch.log1p(torch.exp(x.detach()[1:-1])))
    _close(got.detach()[[0, -1]], torch.tensor([0.0, 800.0], dtype=torch.float64))
    _close(x.grad, torch.sigmoid(x.detach()))


def references_have_right_gradients() -> None:
    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().requires_grad_()

    x, weight, bias = leaf(_random(1, 2, 5)), leaf(_random(2, 3, seed=1)), leaf(_random(2, seed=2))
    initial = leaf(_random(1, 2, 2, seed=3))

    def conv(*t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.causal_conv1d(*t[:3], initial_states=t[3], activation="silu")

    assert torch.autograd.gradcheck(conv, (x, weight, bias, initial))
    u, delta, z = leaf(_random(1, 2, 4)), leaf(_random(1, 2, 4, seed=1)), leaf(_random(1, 2, 4, seed=2))
    a = leaf(torch.complex(-torch.exp(_random(2, 2, seed=3)), _random(2, 2, seed=4)))
    b, c = leaf(_random(1, 2, 8, seed=5)), leaf(_random(1, 2, 8, seed=6))
    d, delta_bias = leaf(_random(2, seed=7)), leaf(_random(2, seed=8))

    def scan(*t: torch.Tensor) -> torch.Tensor:
        return reference.selective_scan(*t[:7], delta_bias=t[7], delta_softplus=True)[0]

    assert torch.autograd.gradcheck(scan, (u, delta, a, b, c, d, z, delta_bias))


def nan_never_passes() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    for value in (math.nan, math.inf, -math.inf):
        got = torch.ones(4)
        got[2] = value
        assert not tolerance.compare("t", got, exact, terms=1).ok
        assert not tolerance.compare("t", torch.ones(4), exact * value, terms=1).ok
    assert not tolerance.compare("t", torch.ones(3), exact, terms=1).ok
    assert not tolerance.Comparison("t", math.nan, math.nan).ok


def tolerance_follows_the_dtype() -> None:
    exact = _random(1000, seed=3)
    for dtype, unit in ((torch.float32, 2.0**-24), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        assert tolerance.compare("t", exact.to(dtype), exact, terms=1).ok
        allowed = 16 * 2.0**-24 * float(exact.abs().max())
        off = exact + 4 * unit * exact.abs() + 2 * allowed
        assert not tolerance.compare("t", off.to(dtype), exact, terms=1).ok


def differences_are_judged_by_what_was_taken_off() -> None:
    exact = torch.zeros(4, dtype=torch.float64)
    rounded = torch.full((4,), 2.0**-24)
    assert not tolerance.compare("t", rounded, exact, terms=1).ok
    assert tolerance.compare("t", rounded, exact, terms=1, cancelled=1.0).ok
    assert not tolerance.compare("t", rounded * 64, exact, terms=1, cancelled=1.0).ok


def unwritten_memory_is_poisoned() -> None:
    with backends.poisoned(CPU) as how:
        if how == "torch":
            assert bool(torch.isnan(torch.empty(100)).all())
    assert not torch.are_deterministic_algorithms_enabled()


def correct_kernels_pass() -> None:
    for plan in plans.quick():
        check = checks.run_plan(plan, backends.emulated(), CPU, 20260101)
        assert check.status == PASS, f"{check.name}: {check.detail}"


def correct_kernels_pass_in_every_mode() -> None:
    for plan in plans.full():
        # Every mode, not every length: the long scans take a minute on a CPU.
        short = tuple(case for case in plan.cases if getattr(case, "length", 0) <= 200)
        check = checks.run_plan(Plan(plan.name, short[::3], plan.skipped), backends.emulated(), CPU, 7)
        assert check.status == (PASS if short else NOT_RUN), f"{check.name}: {check.detail}"


def correct_blocks_pass() -> None:
    own = [Plan("mamba3 SISO", (siso.SisoCase(length=70),)), *inner.full()]
    for plan in [*blocks.full(), *own]:
        if plan.name.startswith("mamba ") or plan in own:
            check = checks.run_plan(Plan(plan.name, plan.cases[:1]), faults.honest(), CPU, 3)
            assert check.status == PASS, f"{check.name}: {check.detail}"


def fault_is_caught(fault: faults.Fault) -> None:
    check = checks.run_plan(Plan(fault.name, (fault.case,)), fault.backend(), CPU, 11)
    assert check.status == FAIL, f"not caught: {check.detail}"
    assert f" {fault.shows_in}:" in check.detail, check.detail
    assert fault.smallest in check.detail, check.detail
    assert "seed=11" in check.detail
    # Without the fault the very same case passes: it is the fault that was seen.
    honest = checks.run_plan(Plan(fault.name, (fault.case,)), faults.honest(), CPU, 11)
    assert honest.status == PASS, honest.detail


def deadline_leaves_the_rest_not_run() -> None:
    results = checks.run_plans(plans.quick(), backends.emulated(), CPU, 1, deadline=time.monotonic() - 1)
    assert {c.status for c in results} == {NOT_RUN}


def same_seed_same_inputs() -> None:
    case = plans.quick()[0].cases[0]
    first, again, other = (case.run(backends.emulated(), CPU, seed)[0].error for seed in (5, 5, 6))
    assert first == again != other


def tests() -> dict[str, Callable[[], None]]:
    """Name -> test, in the order they run."""
    plain = (
        conv_equals_torch_conv1d,
        conv_in_two_parts_equals_conv_in_one,
        conv_with_seq_idx_equals_each_sequence_alone,
        update_equals_conv_token_by_token,
        varlen_states_equal_final_states,
        scan_equals_closed_form,
        scan_options_do_what_they_say,
        softplus_and_its_gradient_are_right_everywhere,
        references_have_right_gradients,
        nan_never_passes,
        tolerance_follows_the_dtype,
        differences_are_judged_by_what_was_taken_off,
        unwritten_memory_is_poisoned,
        correct_kernels_pass,
        correct_kernels_pass_in_every_mode,
        correct_blocks_pass,
        deadline_leaves_the_rest_not_run,
        same_seed_same_inputs,
    )
    by_name: dict[str, Callable[[], None]] = {test.__name__.replace("_", " "): test for test in plain}
    by_name.update({f"caught: {fault.name}": partial(fault_is_caught, fault) for fault in faults.every()})
    return by_name


def run(on_done: Callable[[Check], None] = lambda check: None) -> list[Check]:
    """Run every test, as checks."""
    results = []
    for name, test in tests().items():
        started = time.monotonic()
        try:
            test()
            status, detail = PASS, ""
        except Exception as error:
            status, detail = FAIL, f"{type(error).__name__}: {error}"
        results.append(Check(name, status, detail, seconds=time.monotonic() - started))
        on_done(results[-1])
    return results
