"""``lock``: solve all environments, check the lock against the manifest, or show what changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssm_forge.errors import VerifyError
from ssm_forge.paths import launcher, workspace
from ssm_forge.ui import console, out, say

if TYPE_CHECKING:
    from ssm_forge.lockdiff import EnvironmentChange
    from ssm_forge.manifest import Manifest


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
    """Write pixi.lock: every environment of pixi.toml, each package with its URL and hash."""
    from ssm_forge import lock as locks
    from ssm_forge import manifest as manifests

    if only_check and revision is not None:
        raise click.UsageError("--check and --diff exclude each other.")
    place = workspace()
    manifest = manifests.load(place.manifest)
    if only_check:
        _check(manifest, place.lock, as_json)
    elif revision is not None:
        _diff(manifest, revision, as_json)
    else:
        before = place.lock.read_bytes() if place.lock.exists() else b""
        environments = locks.write(manifest, place.lock, snapshot=snapshot, progress=say)
        changed = place.lock.read_bytes() != before
        say(f"{place.lock} {'written' if changed else 'is unchanged'}.")
        if as_json:
            counts = {e.name: len(e.records) for e in environments}
            out.print_json(json.dumps({"lock": str(place.lock), "changed": changed, "packages": counts}))


def _check(manifest: Manifest, path: Path, as_json: bool) -> None:
    from ssm_forge import lock as locks

    result = locks.check(manifest, path)
    if as_json:
        listed = {
            name: [{"package": p.package, "reason": p.reason} for p in problems] for name, problems in result.items()
        }
        out.print_json(json.dumps({"agree": not any(result.values()), "environments": listed}))
    else:
        for name, problems in result.items():
            out.print(f"{name}: {'agrees' if not problems else 'differs'}")
            for problem in problems:
                out.print(
                    f"  {problem.package}: {problem.reason}" if problem.package else f"  {problem.reason}",
                    markup=False,
                )
    wrong = [problem for problems in result.values() for problem in problems]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise VerifyError(f"{path.name} does not match pixi.toml: {wrong[0]}{more}.", fix=f"Run '{launcher()} lock'.")


def _diff(manifest: Manifest, revision: str, as_json: bool) -> None:
    from dataclasses import asdict

    from rattler import MatchSpec

    from ssm_forge import lock as locks
    from ssm_forge import lockdiff

    place = workspace()
    asked = {e.name: {str(MatchSpec(s).name.normalized) for s in e.specs} for e in manifest.environments}
    changes = lockdiff.compare(lockdiff.at_revision(place, revision), locks.read(place.lock), asked)
    if as_json:
        out.print_json(json.dumps([asdict(c) for c in changes]))
        return
    if not changes:
        console.print(f"{place.lock.name} is the same as at {revision}.", markup=False)
    for change in changes:
        _print_change(change)


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
