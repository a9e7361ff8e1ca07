"""What of the checks a build with upstream's kernels as they are can't pass, or has not: named as such, and not run.

Such a build is known by what its scan lacks: ``calls``, which this project's patches add together with the choice of
kernels at run time. The two projects' packages come with the same kernels.
"""

from __future__ import annotations

from dataclasses import replace

from ssm_forge.kernels.backends import Backend
from ssm_forge.kernels.cases import ConvCase, ScanCase
from ssm_forge.kernels.draws import Case
from ssm_forge.kernels.gpus import OtherGpuCase
from ssm_forge.kernels.inner import InnerCase
from ssm_forge.kernels.plans import Plan

ONLY = "this build has upstream's kernels only"
NOTHING_TO_SWITCH = Plan("SSM_FORGE_KERNELS", (), f"nothing to switch: {ONLY}")
TWO_GROUPS = "upstream's backward puts the gradients of a complex B and C with several groups at wrong places"
_NOT_OURS = f"not applicable: {ONLY}, and"
_SHORT_CHUNK = "upstream's backward reads too little before a last chunk of a few tokens (channel-first, with SiLU)"
_LAST_STATE = "upstream's last state lacks a B that is constant in time"
_NORMS = "upstream's backward of mamba_inner_fn passes its norms by"
_CURRENT_GPU = "upstream starts some of it on the current GPU, whichever holds the tensors"
# Tokens of a chunk, and those that a thread reads at once, by precision.
_CHUNKS = {"fp32": (512, 4), "fp16": (1024, 8), "bf16": (1024, 8)}


def is_upstreams(backend: Backend) -> bool:
    """Whether the functions under test are upstream's as they are."""
    return not backend.calls()


def applicable(plans: list[Plan]) -> list[Plan]:
    """``plans`` without what upstream's kernels can't pass or have not, which is named in plans of its own."""
    found = [NOTHING_TO_SWITCH]
    for plan in plans:
        if "along the sequence" in plan.name:
            found.append(replace(plan, cases=(), skipped=f"{_NOT_OURS} not the scan along the sequence"))
        elif plan.name.startswith("large:") and " above " in plan.name:
            found.append(replace(plan, cases=(), skipped=f"{_NOT_OURS} not this project's offsets of 64 bits"))
        else:
            found += _divided(plan)
    return found


def _divided(plan: Plan) -> list[Plan]:
    faults = {case: why for case in plan.cases if (why := known_fault(case))}
    if not faults:
        return [plan]
    kept = tuple(case for case in plan.cases if case not in faults)
    why = "; ".join(dict.fromkeys(faults.values()))
    count = f"{len(faults)} of {len(plan.cases)} cases"
    left = Plan(f"{plan.name}, known faults of upstream's", (), f"{_NOT_OURS} fails here ({count}): {why}")
    return [*([replace(plan, cases=kept)] if kept else []), left]


def known_fault(case: Case) -> str:
    """What upstream's kernels are known to get wrong in a case, mended by this project's patches; empty for nothing."""
    if isinstance(case, ConvCase) and case.silu and case.backward and not case.channel_last:
        chunk, at_once = _CHUNKS[case.dtype]
        if case.length > chunk and 0 < case.length % chunk < at_once:
            return _SHORT_CHUNK
    if isinstance(case, ScanCase):
        if case.complex_a and case.groups > 1 and case.backward:
            return TWO_GROUPS
        if case.constant_b and case.last_state:
            return _LAST_STATE
    if isinstance(case, OtherGpuCase) and case.what in ("mamba2", "mamba3", "generation"):
        return _CURRENT_GPU
    return _NORMS if isinstance(case, InnerCase) else ""
