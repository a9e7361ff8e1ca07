"""What ``build`` does: the packages of a variant or of an environment's torch, and their wheels where wanted."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ssm_forge.base import paths
from ssm_forge.base.errors import UsageError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import say
from ssm_forge.build.leftovers import sweep
from ssm_forge.build.make_wheel import make
from ssm_forge.channel import simple_index as index
from ssm_forge.existing import job as existing_job
from ssm_forge.existing import plan as existing_plan
from ssm_forge.existing.plan import Wishes
from ssm_forge.flow import planning
from ssm_forge.flow.pipeline import build_packages
from ssm_forge.flow.plan import Options, Plan
from ssm_forge.manifest import variants
from ssm_forge.package.pip_torch import pages, torch_of
from ssm_forge.package.read_wheel import FOLDER, origin_of
from ssm_forge.package.write import read_json
from ssm_forge.trees import target
from ssm_forge.trees.build import build as build_tree

Kind = Literal["conda", "wheel", "both"]


@dataclass(frozen=True)
class Made:
    """What there is now.

    Attributes:
        plan: the plan's plain values.
        packages: conda packages, in the channel.
        wheels: in the channel's index; none where none were wanted.
    """

    plan: dict[str, Any]
    packages: tuple[Path, ...]
    wheels: tuple[Path, ...]


def build(options: Options, kind: Kind, env: Path | None, trees: Sequence[str] = ()) -> Made:
    """Build what the channel lacks, and put wheels into its index where ``kind`` asks for them.

    Args:
        env: an environment whose torch all of it is for.
        trees: addresses of source trees to build, instead of causal-conv1d and mamba-ssm.

    Raises:
        ForgeError: whatever the step that failed says.
    """
    workspace = paths.workspace()
    sweep(workspace)
    plan = _plan(options, kind, env, workspace, with_projects=not trees)
    if trees:
        built = [build_tree(address, plan, options.jobs, workspace) for address in trees]
        plan, packages = target.merged(plan, built), [one.file for one in built]
    else:
        packages = build_packages(plan, workspace)
    wheels = wheels_of(packages, workspace.channel) if kind != "conda" else []
    return Made(plan.as_dict(), tuple(packages), tuple(wheels))


def wheels_of(packages: Sequence[Path], channel: Path) -> list[Path]:
    """The wheels of finished packages in the channel's index; those that it lacks are made.

    Raises:
        BuildError: when a package was not made for a torch of pip's.
    """
    return [_find_wheel(package, channel) or _add_wheel(package, channel) for package in packages]


def _plan(options: Options, kind: Kind, env: Path | None, workspace: Workspace, *, with_projects: bool) -> Plan:
    """What is built for; without the two projects where trees are built in their place."""
    if env is not None:
        existing = existing_plan.applies(env, workspace)
        if existing is None:
            raise UsageError(
                f"{env} is no environment with a torch of pip's.",
                fix="Name a --variant to build for, instead of --for.",
            )
        if not with_projects:
            return target.of_existing(existing, options, workspace)[0]
        existing_job.check_options(existing, options)
        return existing_plan.make(existing, options, Wishes({}, with_deps=True), workspace).plan
    if kind != "conda":
        _require_wheels_possible(options, workspace)
        options = replace(options, source="bridge")
    return planning.make(options, workspace) if with_projects else target.of_variant(options, workspace)


def _require_wheels_possible(options: Options, workspace: Workspace) -> None:
    """Refuse what is built for a torch of conda's.

    Raises:
        UsageError: when ``options`` name a source or a variant that has no torch of pip's.
    """
    if options.source == "conda":
        raise UsageError(
            "wheels are for pip's torch, and --source conda builds for conda's, which differs in what it links to.",
            fix="Leave --source out.",
        )
    sources = variants.load(workspace.variants).sources(options.variant)
    if sources and "bridge" not in sources:
        raise UsageError(
            f"variant {options.variant} comes from conda channels only, and wheels are for the torch of pip.",
            fix="Choose a variant that the bridge has (see variants), or name an environment with --for.",
        )


def _find_wheel(package: Path, channel: Path) -> Path | None:
    """The wheel of this very package, where the index has it."""
    entry = read_json(package, "index.json")
    package_sha256 = sha256_of(package)
    for folder in pages(torch_of(entry)):
        for filename in index.entries(channel, folder, str(entry["name"])):
            path = channel / FOLDER / folder / filename
            if path.is_file() and origin_of(path).get("sha256") == package_sha256:
                return path
    return None


def _add_wheel(package: Path, channel: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=channel) as scratch:
        wheel = index.add(channel, make(package, Path(scratch)))
    say(f"Made {wheel.name}")
    return wheel
