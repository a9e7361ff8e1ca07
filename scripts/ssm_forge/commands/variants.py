"""``variants``: the build matrix, as this machine sees it."""

from __future__ import annotations

import json

import click

from ssm_forge.base import paths, platforms
from ssm_forge.base.ui import out
from ssm_forge.flow import overview as matrix


@click.command()
@click.option("--platform", metavar="linux-64|linux-aarch64", help="What it is for.  [default: this machine's]")
@click.option("--json", "as_json", is_flag=True, help="Print the matrix as JSON.")
def variants(platform: str | None, as_json: bool) -> None:
    """Print the build matrix: every variant, whether it can be had here, what is built and installed."""

    workspace = paths.workspace()
    rows = matrix.rows(workspace, platforms.of(platform) if platform else platforms.here())
    if as_json:
        out.print_json(json.dumps([row.as_dict() for row in rows]))
    else:
        matrix.show(rows, workspace)
