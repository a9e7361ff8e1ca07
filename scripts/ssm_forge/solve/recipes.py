"""Do the recipes fit the channels? Renders them and solves every environment of a build, before or without building."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rattler import MatchSpec, RepoDataRecord

from ssm_forge.base import platforms
from ssm_forge.base.paths import Workspace
from ssm_forge.manifest import environments as manifests
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.recipe import PROJECTS, Rendered, render, requirements
from ssm_forge.manifest.variants import Variant
from ssm_forge.manifest.virtual import VirtualPackage
from ssm_forge.solve.solver import Request, solve

Kind = Literal["build", "host", "run"]
KINDS: tuple[Kind, ...] = ("build", "host", "run")


@dataclass(frozen=True)
class SolvedEnvironment:
    """One environment of one recipe.

    Attributes:
        package: file name that the recipe gives.
        requested: the recipe's requirements, with the variant's pins.
        records: what they solve to, sorted by name.
    """

    project: str
    package: str
    kind: Kind
    requested: tuple[str, ...]
    records: tuple[RepoDataRecord, ...]

    def answer(self, spec: str) -> RepoDataRecord:
        """The record of the package that one of ``requested`` names."""
        name = MatchSpec(spec).name.normalized
        return next(r for r in self.records if r.name.normalized == name)


def solve_recipes(
    variant: Variant, key: BuildKey, *, workspace: Workspace, snapshot: Path | None
) -> list[SolvedEnvironment]:
    """Render both recipes for a conda variant and solve their build, host and run environments.

    Channels and target machine are those of the environment in pixi.toml that has the variant's name. A
    package that another recipe here gives is solved with the record that this recipe would give.

    Raises:
        SolveError: naming recipe, environment and what is missing.
        BuildError: when a recipe does not render.
    """
    target = manifests.load(workspace.manifest).environment(variant.name)
    platform = target.platforms[0]
    rendered = [render(project, key, workspace) for project in PROJECTS]
    return solve_builds(
        rendered, target.channels, platform.virtual, f"for {variant.name} with Python {key.python}", snapshot=snapshot
    )


def solve_builds(
    recipes: Sequence[Rendered],
    channels: tuple[str, ...],
    virtual: tuple[VirtualPackage, ...],
    made_for: str,
    *,
    snapshot: Path | None = None,
) -> list[SolvedEnvironment]:
    """Solve the build, host and run environments of builds that are about to be made, in their order.

    What a build runs is of this machine's platform; the rest is of the package's.

    Args:
        channels: URLs to take build and host packages from, first wins.
        virtual: the machine to solve for.
        made_for: whom the builds are for, the end of a sentence in error messages.

    Raises:
        SolveError: naming recipe, environment and what is missing.
    """
    entries: dict[str, dict[str, Any]] = {}
    solved = []
    for rendered in recipes:
        needs = requirements(rendered)
        entries[rendered.filename] = _record(rendered, needs["run"])
        # In the end both packages are installed, not only what they run with.
        specs = {**needs, "run": (f"{rendered.name} =={rendered.version} {rendered.build}", *needs["run"])}
        for kind in KINDS:
            request = Request(
                specs=specs[kind],
                channels=channels,
                virtual=virtual,
                subdir=platforms.here().subdir if kind == "build" else rendered.subdir,
                snapshot=snapshot,
                offers_snapshot=True,
                extra=entries if kind == "run" else {},
                purpose=f"the {kind} environment of {rendered.name} {made_for}",
            )
            records = tuple(solve(request))
            solved.append(SolvedEnvironment(rendered.name, rendered.filename, kind, specs[kind], records))
    return solved


def pending(recipes: Sequence[Rendered]) -> dict[str, dict[str, Any]]:
    """The index entries of packages that are still to be built: file name -> entry."""
    return {rendered.filename: _record(rendered, requirements(rendered)["run"]) for rendered in recipes}


def _record(rendered: Rendered, run: Sequence[str]) -> dict[str, Any]:
    """The repodata entry that the built package would have."""
    return {
        "name": rendered.name,
        "version": rendered.version,
        "build": rendered.build,
        "build_number": rendered.build_number,
        "depends": list(run),
        "subdir": rendered.subdir,
    }
