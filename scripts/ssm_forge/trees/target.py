"""What source trees are built for: a variant or the torch of an environment, as a plan without our two projects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ssm_forge.base.paths import Workspace
from ssm_forge.existing import job
from ssm_forge.existing import plan as existing_plan
from ssm_forge.existing.plan import Wishes
from ssm_forge.existing.reader import Existing
from ssm_forge.existing.torch import Torch
from ssm_forge.flow import planning
from ssm_forge.flow.plan import Options, Plan
from ssm_forge.trees.build import Built


def of_variant(options: Options, workspace: Workspace) -> Plan:
    """The variant, Python and capabilities that ``options`` choose; what a tree takes is not in it yet.

    Raises:
        ForgeError: as :func:`ssm_forge.flow.planning.make`.
    """
    return planning.make(options, workspace, projects=())


def of_existing(existing: Existing, options: Options, workspace: Workspace) -> tuple[Plan, Torch]:
    """The same for the torch of an environment, and that torch.

    Raises:
        UsageError: when an option asks for what the environment has decided.
        ForgeError: as :func:`ssm_forge.existing.plan.make`.
    """
    job.check_options(existing, options)
    work = existing_plan.make(existing, options, Wishes({}, projects=()), workspace)
    # What is installed lies in the root; with --target that is not the environment.
    return replace(work.plan, prefix=existing.root), work.torch


def merged(plan: Plan, built: Sequence[Built]) -> Plan:
    """The plan with the packages that were built by it, and what they took; they are built one after the other."""
    return replace(
        plan,
        packages=tuple(one.package for one in built),
        jobs=max(one.plan.jobs for one in built),
        memory_bytes=max(one.plan.memory_bytes for one in built),
        download_bytes=max(one.plan.download_bytes for one in built),
        disk_bytes=max(one.plan.disk_bytes for one in built),
    )
