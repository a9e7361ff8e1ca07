"""``reproduce``: build a package again from what it says of itself, and show where the two differ."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from ssm_forge.base.errors import VerifyError
from ssm_forge.base.paths import workspace
from ssm_forge.base.ui import out, say
from ssm_forge.flow import reproduce as reproducing
from ssm_forge.flow.reproduce import Outcome
from ssm_forge.package.differences import Difference

# Differences that are listed below the first one; the log has them all.
_LISTED = 20
_STYLES = {"+": "green", "-": "red", "@": "cyan"}


@click.command()
@click.argument("package", metavar="PACKAGE.conda", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--jobs", type=click.IntRange(min=1), help="Parallel compilers.  [default: what fits]")
@click.option("--no-cache", is_flag=True, help="Compile everything anew, take no object from the compile cache.")
@click.option("--keep", metavar="DIR", type=click.Path(file_okay=False, path_type=Path), help="Keep the rebuilt one.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def reproduce(package: Path, jobs: int | None, no_cache: bool, keep: Path | None, as_json: bool) -> None:
    """Build a package again from its own metadata, and compare the two byte by byte.

    Its recipe, patches and locks must be those of this checkout. The rebuilt package reaches no channel.
    """

    outcome = reproducing.reproduce(package, workspace(), jobs=jobs, cache=not no_cache, keep=keep)
    if as_json:
        out.print_json(json.dumps(_as_dict(outcome)))
    else:
        _print(outcome)
    if outcome.kept is not None:
        say(f"Kept: {outcome.kept}")
    if not outcome.comparison.same:
        first = outcome.comparison.differences[0]
        raise VerifyError(
            f"{package.name} was not reproduced: its rebuild differs, first in {first.where}.",
            fix="" if outcome.kept else "Keep the rebuilt one with --keep DIR to look further.",
            log=outcome.log,
        )
    if not no_cache:
        say("Objects may have come from the compile cache; --no-cache compiles every one anew.")


def _as_dict(outcome: Outcome) -> dict[str, object]:
    comparison = outcome.comparison
    return {
        "package": str(outcome.package),
        "reproduced": comparison.same,
        "sha256": comparison.sha256[0],
        "rebuilt": outcome.rebuilt,
        "rebuilt_sha256": comparison.sha256[1],
        "differences": [asdict(difference) for difference in comparison.differences],
        "kept": str(outcome.kept) if outcome.kept else None,
        "log": str(outcome.log),
    }


def _print(outcome: Outcome) -> None:
    comparison = outcome.comparison
    if comparison.same:
        out.print(f"reproduced: sha256 {comparison.sha256[0]}", markup=False)
        return
    first, *others = comparison.differences
    out.print(f"not reproduced: sha256 {comparison.sha256[0]}, rebuilt {comparison.sha256[1]}", markup=False)
    _print_first(first)
    if others:
        out.print(f"and {len(others)} more:")
    for difference in others[:_LISTED]:
        out.print(f"  {difference.where}: {difference.what}", markup=False)
    if len(others) > _LISTED:
        out.print(f"  ... {len(others) - _LISTED} more in {outcome.log}", markup=False)


def _print_first(difference: Difference) -> None:
    out.print(f"first difference: {difference.where}: {difference.what}", style="bold", markup=False)
    for line in difference.detail:
        out.print(f"  {line}", style=_STYLES.get(line[:1], ""), markup=False)
