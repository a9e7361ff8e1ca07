"""A newer release in the workspace of recipes/: its manifest, and its lock with the same compilers as before."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest import recipe, source_workspace
from ssm_forge.manifest.recipe import Rendered
from ssm_forge.solve import lock
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.lock_sources import SourcePackage
from ssm_forge.solve.pixi_identity import identity
from ssm_forge.upkeep.projects import Update


def carried(update: Update, place: Workspace) -> Update:
    """The update with recipes/pixi.toml and recipes/pixi.lock, where it changes a recipe or the matrix.

    Nothing is solved: a release changes what is built, and not what it is built with. Where it does change that, the
    summary says that the lock has to be written anew.

    Raises:
        UsageError, BuildError: when the manifest can't be made, or a recipe does not render.
    """
    recipes = {place.recipes / name / "recipe.yaml" for name in recipe.PROJECTS}
    if not (recipes | {place.variants}) & set(update.files):
        return update
    with tempfile.TemporaryDirectory(prefix="ssm-forge-bump-") as folder:
        there = _copy(place, Path(folder) / "checkout")
        moved = {there.root / path.relative_to(place.root): text for path, text in update.files.items()}
        Update((), moved).write()
        source_workspace.write(there)
        told = _relock(there)
        files = {
            place.source_manifest: there.source_manifest.read_text(encoding="utf-8"),
            place.source_lock: there.source_lock.read_text(encoding="utf-8"),
        }
    return Update((*update.summary, told), {**update.files, **files})


def _copy(place: Workspace, root: Path) -> Workspace:
    for folder in (place.recipes, place.patches):
        shutil.copytree(folder, root / folder.name, ignore=shutil.ignore_patterns(".pixi", "bridge", "__pycache__"))
    for path in (place.manifest, place.lock):
        shutil.copy(path, root)
    return Workspace(root, place.cache)


def _relock(there: Workspace) -> str:
    """Lock the recipes as they are now with what they were locked with; a line about it."""
    workspace = manifest.load(there.source_manifest)
    given = {e.name: workspace.variants[e.platforms[0].name] for e in workspace.environments}
    locked = [_again(e, given.get(e.name, {}), there) for e in lock.read(there.source_lock)]
    # Those without a package have no platform in a lock, and are not read.
    names = {e.name for e in locked}
    empty = [e for e in workspace.environments if e.name not in names and not e.specs and not e.sources]
    locked += [LockedEnvironment(e.name, e.channels, locked[0].platform, ()) for e in empty]
    lock.write_locked(tuple(locked), there.source_lock)
    problems = [problem for found in lock.check(workspace, there.source_lock).values() for problem in found]
    if problems:
        return f"recipes/pixi.lock does not fit any more ({problems[0]}): write it anew with '{launcher()} lock'."
    return "recipes/pixi.toml and pixi.lock go with it, with the same compilers."


def _again(environment: LockedEnvironment, given: Mapping[str, Sequence[str]], there: Workspace) -> LockedEnvironment:
    sources = tuple(_source(source, given, there) for source in environment.sources)
    return replace(environment, sources=sources)


def _source(source: SourcePackage, given: Mapping[str, Sequence[str]], there: Workspace) -> SourcePackage:
    path = there.recipes / source.location / "recipe.yaml"
    rendered = recipe.render_file(path, given)
    variants = dict(rendered.engine.variant)
    return replace(source, variants=variants, identity=_identity(source, rendered, variants))


def _identity(source: SourcePackage, rendered: Rendered, variants: Mapping[str, str]) -> str:
    return identity(
        source.location,
        variants=variants,
        build_packages=[r.url for r in source.build],
        host_packages=[r.url for r in source.host],
        version=rendered.version,
        build=rendered.build,
        build_number=rendered.build_number,
        subdir=rendered.subdir,
        depends=source.depends,
        constrains=source.constrains,
    )
