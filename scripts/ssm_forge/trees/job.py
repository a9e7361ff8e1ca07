"""What ``build`` does: the packages of a variant or of an environment's torch, and their wheels where wanted."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ssm_forge.base.errors import UsageError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.base.ui import say
from ssm_forge.build.leftovers import sweep
from ssm_forge.build.make_wheel import make
from ssm_forge.channel import simple_index as index
from ssm_forge.existing import plan as existing_plan
from ssm_forge.existing.plan import Wishes
from ssm_forge.flow import planning
from ssm_forge.flow.pipeline import build_packages
from ssm_forge.flow.plan import Options, Plan
from ssm_forge.manifest import variants
from ssm_forge.package.pip_torch import pages, torch_of
from ssm_forge.package.read_wheel import FOLDER, origin_of
from ssm_forge.package.write import read_json
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
        trees: source trees to build, instead of causal-conv1d and mamba-ssm.

    Raises:
        ForgeError: whatever the step that failed says.
    """
    place = workspace()
    sweep(place)
    work = _plan(options, kind, env, place)
    if trees:
        packages = [build_tree(where, work, options.jobs, place).file for where in trees]
    else:
        packages = build_packages(work, place)
    made = wheels_of(packages, place.channel) if kind != "conda" else []
    return Made(work.as_dict(), tuple(packages), tuple(made))


def wheels_of(packages: Sequence[Path], channel: Path) -> list[Path]:
    """The wheels of finished packages in the channel's index; those that it lacks are made.

    Raises:
        BuildError: when a package was not made for a torch of pip's.
    """
    return [_there(package, channel) or _add(package, channel) for package in packages]


def _plan(options: Options, kind: Kind, env: Path | None, place: Workspace) -> Plan:
    if env is not None:
        existing = existing_plan.applies(env, place)
        if existing is None:
            raise UsageError(
                f"{env} is no environment with a torch of pip's.",
                fix="Name a --variant to build for, instead of --for.",
            )
        return existing_plan.make(existing, options, Wishes({}, with_deps=True), place).plan
    if kind == "conda":
        return planning.make(options, place)
    if options.source == "conda":
        raise UsageError(
            "wheels are for pip's torch, and --source conda builds for conda's, which differs in what it links to.",
            fix="Leave --source out.",
        )
    offered = variants.load(place.variants).sources(options.variant)
    if offered and "bridge" not in offered:
        raise UsageError(
            f"variant {options.variant} comes from conda channels only, and wheels are for the torch of pip.",
            fix="Choose a variant that the bridge has (see variants), or name an environment with --for.",
        )
    return planning.make(replace(options, source="bridge"), place)


def _there(package: Path, channel: Path) -> Path | None:
    """The wheel of this very package, where the index has it."""
    name = read_json(package, "index.json")
    digest = sha256_of(package)
    for where in pages(torch_of(name)):
        for filename in index.entries(channel, where, str(name["name"])):
            path = channel / FOLDER / where / filename
            if path.is_file() and origin_of(path).get("sha256") == digest:
                return path
    return None


def _add(package: Path, channel: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=channel) as scratch:
        made = index.add(channel, make(package, Path(scratch)))
    say(f"Made {made.name}")
    return made
