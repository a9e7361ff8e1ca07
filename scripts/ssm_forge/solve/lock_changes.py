"""What changed between two locks, as a person would want to read it."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rattler import RepoDataRecord
from rattler.version import Version

from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.package.intact import digest
from ssm_forge.solve import lock_sources
from ssm_forge.solve.lock import LockedEnvironment, counterpart, read
from ssm_forge.solve.lock_sources import SourcePackage

Kind = Literal["upgraded", "downgraded", "rebuilt", "moved", "bytes changed", "added", "removed"]
KINDS: tuple[Kind, ...] = ("bytes changed", "upgraded", "downgraded", "rebuilt", "moved", "added", "removed")


@dataclass(frozen=True)
class Change:
    """How one package of one environment changed.

    Attributes:
        kind: ``rebuilt`` is another build of the same version, ``moved`` the same build from another channel,
            ``bytes changed`` the same URL with another hash, which no honest channel does.
        old: version and build before, empty when added.
        new: version and build after, empty when removed.
        asked_for: pixi.toml names the package; others came along as dependencies.
    """

    kind: Kind
    package: str
    old: str
    new: str
    asked_for: bool = False


@dataclass(frozen=True)
class EnvironmentChange:
    """What changed in one environment: ``notes`` about the environment itself, then its packages."""

    environment: str
    notes: tuple[str, ...]
    changes: tuple[Change, ...]


def at_revision(workspace: Workspace, revision: str, path: Path | None = None) -> tuple[LockedEnvironment, ...]:
    """The environments of a lock as committed at a git revision.

    Args:
        path: of a lock in the checkout; None for that of the root.

    Raises:
        UsageError: when there is no such revision, or it has no lock.
        MachineError: without git.
    """
    if not revision or revision.startswith("-"):
        # git would take it for an option, and write files with some of them.
        raise UsageError(f"'{revision}' is no revision of git.", fix="Name a commit, tag or branch.")
    name = f"{revision}:./{(path or workspace.lock).relative_to(workspace.root)}"
    try:
        shown = subprocess.run(["git", "-C", str(workspace.root), "show", name], capture_output=True, check=False)
    except OSError as error:
        raise MachineError(f"git can't be started ({error.strerror}).", fix="Install git.") from error
    if shown.returncode != 0:
        reason = shown.stderr.decode(errors="replace").strip().removeprefix("fatal: ")
        raise UsageError(
            f"no lock at revision '{revision}': {reason}.", fix="Name a commit, tag or branch that has one."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / workspace.lock.name
        path.write_bytes(shown.stdout)
        return read(path)


def compare(
    old: Sequence[LockedEnvironment], new: Sequence[LockedEnvironment], asked_for: dict[str, set[str]]
) -> list[EnvironmentChange]:
    """Changes of every environment that has any, in the order of ``new``; removed environments last.

    Args:
        old: the earlier lock.
        new: the later lock.
        asked_for: environment -> packages that pixi.toml names.
    """
    before = list(old)
    result = []
    for environment in new:
        candidates = [e for e in before if e.name == environment.name]
        earlier = counterpart(environment.platform, candidates, environment.platform.name)
        if earlier is not None:
            before.remove(earlier)
        change = _compare_environment(earlier, environment, asked_for.get(environment.name, set()))
        if change.notes or change.changes:
            result.append(change)
        if earlier is not None:
            result += _compare_sources(earlier, environment)
    result += [EnvironmentChange(e.name, (f"removed (platform {e.platform.name})",), ()) for e in before]
    return result


def _compare_environment(
    old: LockedEnvironment | None, new: LockedEnvironment, asked_for: set[str]
) -> EnvironmentChange:
    if old is None:
        return EnvironmentChange(new.name, (f"new, {len(new.records)} packages for {new.platform.name}",), ())
    notes = []
    if old.channels != new.channels:
        notes.append(f"channels: {', '.join(old.channels)} -> {', '.join(new.channels)}")
    if set(old.platform.virtual) != set(new.platform.virtual):
        removed = sorted(set(old.platform.virtual) - set(new.platform.virtual))
        added = sorted(set(new.platform.virtual) - set(old.platform.virtual))
        notes.append(
            f"machine: {', '.join(map(str, removed)) or 'nothing'} -> {', '.join(map(str, added)) or 'nothing'}"
        )
    return EnvironmentChange(new.name, tuple(notes), _compare_records(old.records, new.records, asked_for))


def _compare_records(
    old: Sequence[RepoDataRecord], new: Sequence[RepoDataRecord], asked_for: set[str]
) -> tuple[Change, ...]:
    before: dict[str, Any] = {r.name.normalized: r for r in old}
    after: dict[str, Any] = {r.name.normalized: r for r in new}
    changes = []
    for name in sorted(set(before) | set(after)):
        change = _compare_package(name, before.get(name), after.get(name), name in asked_for)
        if change is not None:
            changes.append(change)
    changes.sort(key=lambda c: (KINDS.index(c.kind), not c.asked_for, c.package))
    return tuple(changes)


def _compare_sources(old: LockedEnvironment, new: LockedEnvironment) -> list[EnvironmentChange]:
    """What the environment's packages from source are built with; what is the same for several is said once."""
    before, after = ({s.name: s for s in e.sources} for e in (old, new))
    notes = [f"{name} is no longer built from source" for name in before if name not in after]
    notes += [f"{name} is built from source now" for name in after if name not in before]
    names_by_changes: dict[tuple[str, tuple[Change, ...]], list[str]] = {}
    for name in sorted(set(before) & set(after)):
        notes += [f"{name}: {text}" for text in _compare_recipe(before[name], after[name])]
        for kind in lock_sources.KINDS:
            changes = _compare_records(before[name].built_with(kind), after[name].built_with(kind), set())
            if changes:
                names_by_changes.setdefault((kind, changes), []).append(name)
    result = [EnvironmentChange(f"{new.name}, from source", tuple(notes), ())] if notes else []
    titles = {"build": "is compiled with", "host": "is linked to"}
    return result + [
        EnvironmentChange(f"{new.name}: what {' and '.join(names)} {titles[kind]}", (), changes)
        for (kind, changes), names in names_by_changes.items()
    ]


def _compare_recipe(old: SourcePackage, new: SourcePackage) -> list[str]:
    keys = sorted(set(old.variants) | set(new.variants))
    notes = [f"from {old.location} -> {new.location}"] if old.location != new.location else []
    notes += [
        f"{key}: {old.variants.get(key, 'nothing')} -> {new.variants.get(key, 'nothing')}"
        for key in keys
        if old.variants.get(key) != new.variants.get(key)
    ]
    removed = [text for text in old.depends if text not in new.depends]
    added = [text for text in new.depends if text not in old.depends]
    if removed or added:
        notes.append(f"needs: {', '.join(removed) or 'nothing'} -> {', '.join(added) or 'nothing'}")
    return notes


def _compare_package(name: str, old: Any, new: Any, asked_for: bool) -> Change | None:
    if old is None:
        return Change("added", name, "", _text(new), asked_for)
    if new is None:
        return Change("removed", name, _text(old), "", asked_for)
    if old.version != new.version:
        newer = Version(str(new.version)) > Version(str(old.version))
        kind: Kind = "upgraded" if newer else "downgraded"
        return Change(kind, name, str(old.version), str(new.version), asked_for)
    if str(old.build) != str(new.build):
        return Change("rebuilt", name, _text(old), _text(new), asked_for)
    if old.url != new.url:
        return Change("moved", name, old.url, new.url, asked_for)
    # A channel that starts to publish sha256 where it had only md5 has changed nothing.
    if old.md5 != new.md5 or (old.sha256 and new.sha256 and old.sha256 != new.sha256):
        return Change("bytes changed", name, ":".join(digest(old)), ":".join(digest(new)), asked_for)
    return None


def _text(record: Any) -> str:
    return f"{record.version} {record.build}"
