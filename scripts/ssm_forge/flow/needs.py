"""What a plan takes: compilers, memory, downloads, disk, and GPUs that can run what it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ssm_forge.base import machine
from ssm_forge.base.arch import ArchList, resolve
from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.machine import Gpu
from ssm_forge.base.paths import Workspace
from ssm_forge.build import costs as compile_costs
from ssm_forge.build.jobs import choose_jobs, memory_needed
from ssm_forge.flow import disks
from ssm_forge.flow.plan import Plan
from ssm_forge.manifest.variants import Variant


def choose_archs(
    variant: Variant,
    requested: str | None,
    gpus: Sequence[Gpu],
    *,
    require: Callable[[ArchList], None],
    instead: str | None,
) -> ArchList:
    """The compute capabilities that a variant's kernels are made for.

    Args:
        requested: what ``--cuda-arch`` says; None for the default.
        gpus: those of this machine.
        require: refuses what the toolkit can't make, in its own words.
        instead: what else to do where a GPU of this machine can't run the kernels; None where they are for another.

    Raises:
        UsageError: for a list that can't be read, or can't be made, or that a GPU of this machine can't run.
    """
    archs = resolve(
        requested,
        supported=variant.supported_archs,
        upstream=variant.upstream_archs,
        default=variant.default_archs,
        gpus=[gpu.capability for gpu in gpus],
    )
    require(archs)
    for gpu in gpus if instead is not None else ():
        if archs.support(gpu.capability) == "none":
            raise UsageError(
                f"this machine's {gpu.name} ({gpu.capability}) can't run kernels made for {archs}.", fix=instead or ""
            )
    return archs


def with_needs(plan: Plan, jobs: int | None, workspace: Workspace, *, environment: bool = True) -> Plan:
    """The plan with what it takes: compilers side by side, bytes of memory, of downloads and of disk.

    Args:
        jobs: compilers that were asked for; None for as many as fit.
        environment: whether packages that are built already still have to be downloaded for and linked.

    Raises:
        MachineError: when the machine has too little memory or disk.
    """
    builds = plan.to_build
    if builds:
        check_build_folder(workspace)
        costs = compile_costs.load(workspace, [package.name for package in builds])
        chosen = choose_jobs(jobs, costs)
        plan = replace(plan, jobs=chosen, memory_bytes=memory_needed(chosen, costs))
    if builds or (environment and not plan.nothing_to_do):
        taken = disks.packages(plan.variant, plan.parts, workspace)
        wanted = disks.needs(taken, plan.prefix, len(builds), len(plan.archs.sass), workspace)
        disks.check(wanted)
        plan = replace(plan, download_bytes=taken.download_bytes, disk_bytes=sum(need.bytes for need in wanted))
    return plan


def check_build_folder(workspace: Workspace) -> None:
    """Refuse a cache in which nothing can be compiled.

    Raises:
        MachineError: when compiling in the cache would fail: torch splits the command of the compiler at spaces. A link
            does not help, because the engine follows it.
    """
    if any(character.isspace() for character in str(workspace.cache)):
        raise MachineError(
            f"packages are built in the cache, and its path '{workspace.cache}' has a space, at which torch's build "
            "tools split the compiler's path.",
            fix="Set SSM_FORGE_CACHE_DIR to a folder without a space in its path.",
        )


def jit_note(plan: Plan) -> str:
    """What to tell a user whose GPU would compile the kernels on first use; empty when none would."""
    slow = [gpu for gpu in machine.gpus() if plan.archs.support(gpu.capability) == "jit"]
    if slow:
        return (
            f"{slow[0].name} ({slow[0].capability}) has no machine code in {plan.archs}: its driver compiles the "
            "PTX at the first forward and backward, which takes minutes. --cuda-arch native avoids that."
        )
    if plan.archs.ptx and not machine.gpus():
        majors = ", ".join(dict.fromkeys(f"{c.major}.x" for c in plan.archs.sass))
        return (
            f"No GPU was seen; the kernels are made for {plan.archs}: native on {majors} from these on. A newer "
            "GPU compiles the PTX at the first forward and backward, which takes minutes; name yours with "
            "--cuda-arch to avoid that."
        )
    return ""
