"""``ci-matrix``: a workflow that builds the matrix on other people's runners."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from ssm_forge.base.files import write_whole
from ssm_forge.base.paths import workspace
from ssm_forge.base.ui import out, say
from ssm_forge.farm import cells, ci
from ssm_forge.manifest import recipe, variants


@click.command("ci-matrix")
@click.option("--format", "format_", type=click.Choice(ci.FORMATS), required=True, help="Whose runners it is for.")
@click.option("--select", default="", metavar="EXPR", help="Which packages, as for 'farm'.  [default: all from conda]")
@click.option(
    "--cuda-arch",
    "archs",
    multiple=True,
    metavar="ARCH",
    help='Compute capabilities: families, all, or a list such as "8.0;9.0+PTX". May be repeated: a job for each.',
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write it there, such as .github/workflows/packages.yml or .gitlab-ci.yml.  [default: stdout]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the matrix alone, as JSON.")
def ci_matrix(format_: ci.Format, select: str, archs: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    """Write a workflow that builds the matrix, and on a tag signs and publishes it."""
    every = cells.every(variants.load(workspace().variants), recipe.PROJECTS, archs)
    # Runners reach conda's channels.
    picked = cells.select([cell for cell in every if cell.variant.source == "conda"], select)
    if as_json:
        out.print_json(json.dumps([asdict(entry) for entry in ci.entries(picked, format_)]))
        return
    text = ci.workflow(picked, format_)
    if output is None:
        out.print(text, end="", markup=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, text.encode())
    say(f"{output}: {len(ci.entries(picked, format_))} jobs.")
