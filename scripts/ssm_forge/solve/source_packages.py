"""The finished packages that a lock's recipes make, out of the channel: for tools that install and do not build."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rattler import Channel, RepoDataRecord, SparseRepoData
from rattler.package import PackageName

from ssm_forge.base.errors import SolveError, UsageError
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.manifest import recipe
from ssm_forge.manifest.recipe import Rendered
from ssm_forge.manifest.virtual import channel_url
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.lock_sources import SourcePackage


def rendered(source: SourcePackage, lock: Path) -> Rendered:
    """The package that a locked recipe makes; its build string follows from what is locked.

    Args:
        lock: the file that ``source`` was read from, whose folder its place is relative to.

    Raises:
        UsageError: when the recipe is not in a folder on this machine.
        BuildError: when it does not render.
    """
    path = lock.parent / source.location / "recipe.yaml"
    if not path.is_file():
        raise UsageError(
            f"{lock} has {source.name} from '{source.location}', and there is no recipe.yaml in that folder beside it.",
            fix="Name the lock of the checkout that holds the recipes.",
        )
    return recipe.render_file(path, {key: [value] for key, value in source.variants.items()})


def finished(locked: LockedEnvironment, lock: Path, workspace: Workspace, *, published: str = "") -> LockedEnvironment:
    """The environment with finished packages, out of the workspace's channel, for what it has from source.

    Args:
        lock: the file that ``locked`` was read from.
        published: URL of a channel that the packages are to be had from by others; default: the folder here.

    Raises:
        SolveError: when the channel lacks one.
        UsageError, BuildError: as :func:`rendered`.
    """
    if not locked.sources:
        return locked
    folder = workspace.channel.resolve().as_uri()
    base = channel_url(published or folder)
    built = [_record(rendered(source, lock), locked, workspace) for source in locked.sources]
    addressed = [RepoDataRecord(r, r.file_name, f"{base}{r.subdir}/{r.file_name}", base) for r in built]
    records = sorted([*locked.records, *addressed], key=lambda r: r.name.normalized)
    return replace(locked, channels=(base, *locked.channels), records=tuple(records))


def _record(package: Rendered, locked: LockedEnvironment, workspace: Workspace) -> RepoDataRecord:
    index = workspace.channel / locked.platform.subdir / "repodata.json"
    candidates: Sequence[RepoDataRecord] = ()
    if index.exists():
        sparse = SparseRepoData(Channel(workspace.channel.resolve().as_uri()), locked.platform.subdir, str(index))
        candidates = sparse.load_records(PackageName(package.name))
    record = next((r for r in candidates if r.file_name == package.filename), None)
    if record is None:
        raise SolveError(
            f"{locked.name} is locked with {package.filename} built from its recipe, and {workspace.channel} does not "
            "hold it.",
            fix=f"'{launcher()} install-mamba --variant {shlex.quote(locked.name)}' builds it.",
        )
    return record
