"""Run plans, and say for each whether it passed, failed (with the smallest failing case) or did not run."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssm_forge.kernels.backends import Backend
from ssm_forge.kernels.draws import Case
from ssm_forge.kernels.plans import Plan
from ssm_forge.kernels.shrink import shrink
from ssm_forge.kernels.tolerance import Comparison

PASS, FAIL, NOT_RUN = "pass", "fail", "not-run"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was checked.
        status: ``pass``, ``fail`` or ``not-run``.
        detail: figures for a pass, the reason for the others.
        cases: how many cases ran.
        worst: largest error, in units of what is allowed.
        seconds: time it took.
    """

    name: str
    status: str
    detail: str
    cases: int = 0
    worst: float | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class GpuLostError(Exception):
    """The GPU context is lost: nothing that follows in this process means anything."""


def attempt(case: Case, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
    """Run a case; an exception of the kernel is a failed comparison.

    Raises:
        GpuLostError: when the error leaves the GPU unusable (an illegal address, say).
    """
    try:
        comparisons = case.run(backend, device, seed)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return comparisons
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if device.type == "cuda" and not _gpu_alive(device):
            raise GpuLostError(f"{case}: {text}") from error
        return [Comparison("call", float("inf"), float("inf"), text)]


def _gpu_alive(device: torch.device) -> bool:
    try:
        torch.ones(1, device=device).cpu()
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def run_plan(plan: Plan, backend: Backend, device: torch.device, seed: int) -> Check:
    """Run a plan's cases until one fails, then look for the smallest case that fails.

    Raises:
        GpuLostError: see :func:`attempt`.
    """
    started = time.monotonic()
    if not plan.cases:
        return Check(plan.name, NOT_RUN, plan.skipped or "no cases")
    worst, worst_at = 0.0, ""
    with warnings.catch_warnings():
        # Poisoning uses torch's deterministic mode, which warns of every atomic addition.
        warnings.simplefilter("ignore")
        for count, case in enumerate(plan.cases, 1):
            comparisons = attempt(case, backend, device, seed)
            bad = [c for c in comparisons if not c.ok]
            if bad:
                detail = explain(case, bad, backend, device, seed)
                ratio = max((c.ratio for c in bad), default=float("inf"))
                return Check(plan.name, FAIL, detail, count, ratio, time.monotonic() - started)
            largest = max(comparisons, key=lambda c: c.ratio)
            if largest.ratio >= worst:
                worst, worst_at = largest.ratio, f"{largest.name}, {case}"
    detail = f"{len(plan.cases)} cases; worst error {worst:.2f} of what is allowed ({worst_at})"
    return Check(plan.name, PASS, detail, len(plan.cases), worst, time.monotonic() - started)


def explain(case: Case, bad: list[Comparison], backend: Backend, device: torch.device, seed: int) -> str:
    """A failure in words, on the smallest case found that fails as clearly in the same tensors.

    Args:
        case: the case that failed.
        bad: its failed comparisons.
    """
    names = {c.name for c in bad}
    # In a tensor of one or two values a sum can cancel almost wholly, and honest rounding then looks large
    # beside it. So a smaller case counts only where it fails as clearly, and in the same tensors.
    clear = min(max(c.ratio for c in bad), 30.0)

    def failures(candidate: Case) -> list[Comparison]:
        comparisons = attempt(candidate, backend, device, seed)
        return [c for c in comparisons if not c.ok and c.name in names and c.ratio >= clear]

    smallest, tries = shrink(case, lambda candidate: bool(failures(candidate)))
    failed = failures(smallest) or bad
    problems = "; ".join(f"{c.name}: {c.problem}" for c in failed[:4])
    return f"smallest failing case ({tries} tried): {type(smallest).__name__} {smallest} seed={seed}: {problems}"


def run_plans(
    plans: Iterable[Plan],
    backend: Backend,
    device: torch.device,
    seed: int,
    *,
    on_done: Callable[[Check], None] = lambda check: None,
    deadline: float | None = None,
) -> list[Check]:
    """Run all plans; a check of each comes out.

    Args:
        on_done: called with each check as it comes.
        deadline: ``time.monotonic()`` after which the rest is reported as not run.
    """
    results: list[Check] = []
    lost = ""
    for plan in plans:
        if lost:
            check = Check(plan.name, NOT_RUN, f"the GPU was lost in an earlier check ({lost})")
        elif deadline is not None and time.monotonic() > deadline:
            check = Check(plan.name, NOT_RUN, "the time given was used up before this check")
        else:
            try:
                check = run_plan(plan, backend, device, seed)
            except GpuLostError as error:
                lost = str(error)
                check = Check(plan.name, FAIL, f"the GPU was lost: {lost}")
            except Exception as error:
                check = Check(plan.name, FAIL, f"the check itself broke: {type(error).__name__}: {error}")
            gc.collect()
        results.append(check)
        on_done(check)
    return results
