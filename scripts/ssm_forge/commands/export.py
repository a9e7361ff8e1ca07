"""``export``: a locked environment in the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from ssm_forge.base.files import write_whole
from ssm_forge.base.own_tools import require
from ssm_forge.base.paths import workspace
from ssm_forge.base.ui import say
from ssm_forge.manifest.variants import DEFAULT_VARIANT
from ssm_forge.solve import lock, pixi_export, source_packages
from ssm_forge.solve.export import FORMATS


@click.command()
@click.argument("name", metavar="NAME|DIR")
@click.option(
    "--format",
    "form",
    type=click.Choice(["explicit", "environment", "conda-lock", "cyclonedx", "pixi"]),
    default="explicit",
    show_default=True,
    help="explicit: URLs and hashes for conda; environment: environment.yml; cyclonedx: bill of materials; pixi: a "
    "workspace of your own in DIR.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File; default: stdout.")
@click.option("--lock", "lock_file", type=click.Path(dir_okay=False, path_type=Path), help="Another lock.")
@click.option("--channel", metavar="URL", help="Where others have packages of the local channel from.")
@click.option("--variant", default=DEFAULT_VARIANT, show_default=True, help="With pixi: the row of the build matrix.")
@click.option(
    "--from",
    "origin",
    type=click.Choice(["channel", "git", "path"]),
    default="channel",
    show_default=True,
    help="With pixi: the kernels as packages, or from the recipes in a git repository or in this folder.",
)
@click.option("--git", metavar="URL", help="With --from git: the repository.  [default: origin of this one]")
def export(
    name: str,
    form: str,
    output: Path | None,
    lock_file: Path | None,
    channel: str | None,
    variant: str,
    origin: Literal["channel", "git", "path"],
    git: str | None,
) -> None:
    """Write what is locked for environment NAME in another tool's format.

    Of a lock with recipes (recipes/pixi.lock), the finished packages in the local channel are written. With
    --format pixi, DIR gets a pixi.toml and, where it can be written without pixi, a pixi.lock.
    """
    if form == "pixi":
        _export_workspace(Path(name), variant, origin, channel or "", git or "")
        return

    if form == "cyclonedx":
        require("cyclonedx")
    lock_path = lock_file or workspace().lock
    locked = source_packages.finished(
        lock.environment(lock_path, name), lock_path, workspace(), published=channel or ""
    )
    text = FORMATS[form](locked)
    if output is None:
        click.echo(text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, text.encode())
    say(f"{output}: {len(locked.records)} packages.")


def _export_workspace(
    folder: Path, variant: str, origin: Literal["channel", "git", "path"], channel: str, git: str
) -> None:

    written = pixi_export.write(folder, variant, origin, workspace(), channel=channel, git=git)
    say(f"{written.manifest} written{', and its pixi.lock' if written.locked else ''}.")
    if not written.locked:
        say(f"'pixi lock' in {folder} locks it to a commit.")
    say("In a pixi.toml of your own these lines name the kernels:")
    for line in written.lines:
        say(f"  {line}")
