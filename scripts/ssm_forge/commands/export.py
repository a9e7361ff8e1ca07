"""``export``: a locked environment in the formats of other tools."""

from __future__ import annotations

from pathlib import Path

import click

from ssm_forge import owners
from ssm_forge.paths import workspace
from ssm_forge.ui import say


@click.command()
@click.argument("name")
@click.option(
    "--format",
    "form",
    type=click.Choice(["explicit", "environment", "conda-lock", "cyclonedx"]),
    default="explicit",
    show_default=True,
    help="explicit: URLs and hashes for conda; environment: environment.yml; cyclonedx: bill of materials.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File; default: stdout.")
@click.option("--lock", "lock_file", type=click.Path(dir_okay=False, path_type=Path), help="Another lock.")
@click.option("--channel", metavar="URL", help="Where others have packages of the local channel from.")
def export(name: str, form: str, output: Path | None, lock_file: Path | None, channel: str | None) -> None:
    """Write what is locked for environment NAME in another tool's format.

    Of a lock with recipes (recipes/pixi.lock), the finished packages in the local channel are written.
    """
    from ssm_forge import lock, source_packages
    from ssm_forge.export import FORMATS
    from ssm_forge.toolbox import require

    if form == "cyclonedx":
        require("cyclonedx")
    path = lock_file or workspace().lock
    locked = source_packages.finished(lock.environment(path, name), path, workspace(), published=channel or "")
    text = FORMATS[form](locked)
    if output is None:
        click.echo(text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{owners.mark()}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(output)
    say(f"{output}: {len(locked.records)} packages.")
