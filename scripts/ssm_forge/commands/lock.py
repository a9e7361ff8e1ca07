"""``lock``: solve all environments, check the lock against the manifest, or show what changed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

from ssm_forge.base import paths
from ssm_forge.base.errors import UsageError, VerifyError
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.ui import console, out, say
from ssm_forge.manifest import environments as manifests
from ssm_forge.manifest import source_workspace
from ssm_forge.solve import lock as locks
from ssm_forge.solve import lock_changes
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.lock_changes import EnvironmentChange


@click.command()
@click.option(
    "--snapshot",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Solve offline from a folder of recorded repodata.",
)
@click.option(
    "--check", "only_check", is_flag=True, help="Only say whether pixi.lock and pixi.toml agree, and why not."
)
@click.option("--diff", "revision", metavar="REV", help="Only list what changed since a git revision.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def lock(snapshot: Path | None, only_check: bool, revision: str | None, as_json: bool) -> None:
    """Write pixi.lock: every environment of pixi.toml, each package with its URL and hash.

    The same for recipes/, the workspace in which pixi builds the kernels: its pixi.toml, which is made from the root's
    and from recipes/variants.yaml, and its lock, which holds the compilers too.
    """
    if only_check and revision is not None:
        raise click.UsageError("--check and --diff exclude each other.")
    workspace = paths.workspace()
    if only_check:
        _check(workspace, as_json)
    elif revision is not None:
        _diff(workspace, revision, as_json)
    else:
        _write(workspace, snapshot, as_json)


def _write(workspace: Workspace, snapshot: Path | None, as_json: bool) -> None:

    documents = []
    source_workspace.write(workspace)
    for manifest_path, lock_path in _pairs(workspace):
        before = lock_path.read_bytes() if lock_path.exists() else b""
        environments = locks.write(manifests.load(manifest_path), lock_path, snapshot=snapshot, progress=say)
        changed = lock_path.read_bytes() != before
        say(f"{lock_path} {'written' if changed else 'is unchanged'}.")
        counts = {e.name: len(e.records) + len(e.sources) for e in environments}
        documents.append({"lock": str(lock_path), "changed": changed, "packages": counts})
    if as_json:
        out.print_json(json.dumps({**documents[0], "recipes": documents[1]}))


def _pairs(workspace: Workspace) -> list[tuple[Path, Path]]:
    """The manifests, each with its lock: the root's, then that of recipes/."""
    return [(workspace.manifest, workspace.lock), (workspace.source_manifest, workspace.source_lock)]


def _check(workspace: Workspace, as_json: bool) -> None:

    results = [locks.check(manifests.load(workspace.manifest), workspace.lock)]
    stale = source_workspace.check(workspace)
    if not stale:
        results.append(locks.check(manifests.load(workspace.source_manifest), workspace.source_lock))
    listed = [
        {name: [{"package": p.package, "reason": p.reason} for p in problems] for name, problems in result.items()}
        for result in results
    ]
    problems_by_lock = [[problem for problems in result.values() for problem in problems] for result in results]
    if as_json:
        agree = not stale and not any(problems_by_lock)
        recipes = {
            "agree": not stale and not any(problems_by_lock[1:]),
            "manifest": stale,
            "environments": (*listed, {})[1],
        }
        out.print_json(json.dumps({"agree": agree, "environments": listed[0], "recipes": recipes}))
    else:
        for prefix, result in zip(("", "recipes/"), results, strict=False):
            for name, problems in result.items():
                out.print(f"{prefix}{name}: {'agrees' if not problems else 'differs'}")
                for problem in problems:
                    text = f"{problem.package}: {problem.reason}" if problem.package else problem.reason
                    out.print(f"  {text}", markup=False)
    for (manifest_path, lock_path), problems in zip(_pairs(workspace), problems_by_lock, strict=False):
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            names = [str(p.relative_to(workspace.root)) for p in (lock_path, manifest_path)]
            raise VerifyError(f"{names[0]} does not match {names[1]}: {problems[0]}{more}.", fix=_fix())
    if stale:
        raise VerifyError(f"{stale}.", fix=_fix())


def _fix() -> str:
    return f"Run '{launcher()} lock'."


def _diff(workspace: Workspace, revision: str, as_json: bool) -> None:
    from rattler import MatchSpec

    changes = []
    for manifest_path, lock_path in _pairs(workspace):
        manifest = manifests.load(manifest_path)
        asked = {e.name: {str(MatchSpec(s).name.normalized) for s in e.specs} for e in manifest.environments}
        compared = lock_changes.compare(_earlier(workspace, revision, lock_path), locks.read(lock_path), asked)
        prefix = "" if lock_path == workspace.lock else "recipes/"
        changes += [replace(change, environment=f"{prefix}{change.environment}") for change in compared]
    if as_json:
        out.print_json(json.dumps([asdict(c) for c in changes]))
        return
    if not changes:
        console.print(f"{workspace.lock.name} is the same as at {revision}.", markup=False)
    for change in changes:
        _print_change(change)


def _earlier(workspace: Workspace, revision: str, lock_path: Path) -> tuple[LockedEnvironment, ...]:
    """A lock at a revision; before there was one in recipes/, all of it is new."""

    try:
        return lock_changes.at_revision(workspace, revision, lock_path)
    except UsageError:
        if lock_path == workspace.lock:
            raise
        return ()


def _print_change(change: EnvironmentChange) -> None:
    from rich.table import Table
    from rich.text import Text

    out.print(change.environment, style="bold")
    for note in change.notes:
        out.print(f"  {note}")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    for _ in range(3):
        table.add_column(overflow="fold")
    for item in change.changes:
        what = " -> ".join(part for part in (item.old, item.new) if part)
        name = Text(item.package, "bold" if item.asked_for else "")
        table.add_row(f"  {item.kind}", name, what)
    if change.changes:
        out.print(table)
