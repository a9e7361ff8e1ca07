"""``bundle``: packages and their checks as one file for a machine with Python, torch and a GPU."""

from __future__ import annotations

from pathlib import Path

import click

from ssm_forge.base import paths
from ssm_forge.base.ui import human_bytes, out
from ssm_forge.bundle import write as bundles
from ssm_forge.verify import installed as verify


@click.command()
@click.option("--prefix", type=click.Path(path_type=Path), help="Environment to take.  [default: the last one]")
@click.option(
    "--package",
    "packages",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A .conda file, instead of --prefix.  Give both.",
)
@click.option(
    "--also",
    multiple=True,
    metavar="LABEL=PATH",
    help="Another build to compare with: its .conda files, or a folder with its extensions.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="dist",
    show_default=True,
    help="File or folder to write.",
)
def bundle(prefix: Path | None, packages: tuple[Path, ...], also: tuple[str, ...], output: Path) -> None:
    """Pack packages and their checks into one file for a machine with only Python, torch and a GPU."""

    workspace = paths.workspace()
    files = list(packages) or bundles.installed_packages(verify.choose_prefix(prefix), workspace)
    others = bundles.parse_others(also)
    if output.suffix != ".pyz":
        output.mkdir(parents=True, exist_ok=True)
    written = bundles.make(files, others, output, workspace)
    out.print(f"{written} ({human_bytes(written.stat().st_size)})", markup=False)
    out.print(f"There: python3 {written.name} --output RESULTS", markup=False)
