"""``variants``: the build matrix, as this machine sees it."""

from __future__ import annotations

import json

import click

from ssm_forge.base import paths
from ssm_forge.base.ui import out
from ssm_forge.flow import overview as matrix


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the matrix as JSON.")
def variants(as_json: bool) -> None:
    """Print the build matrix: every variant, whether it can be had here, what is built and installed."""

    workspace = paths.workspace()
    rows = matrix.rows(workspace)
    if as_json:
        out.print_json(json.dumps([row.as_dict() for row in rows]))
    else:
        matrix.show(rows, workspace)
