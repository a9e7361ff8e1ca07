"""``bump``: newer releases of what is pinned here, written into recipes, patches and locks."""

from __future__ import annotations

import click

from ssm_forge.base import paths
from ssm_forge.base.paths import launcher
from ssm_forge.base.ui import out, say
from ssm_forge.upkeep import bump_lock
from ssm_forge.upkeep import parts as bump_parts
from ssm_forge.upkeep import projects as bumps
from ssm_forge.upkeep import symbols as bump_symbols


@click.command()
@click.argument("what", type=click.Choice(["mamba-ssm", "causal-conv1d", "torch", "bridge", "symbols"]))
@click.option("--check", is_flag=True, help="Report only, write nothing.")
def bump(what: str, check: bool) -> None:
    """For maintainers: look for newer releases, re-apply the patches, update URLs and hashes."""

    workspace = paths.workspace()
    if what == "torch":
        update = bump_parts.bump_torch(workspace)
    elif what == "bridge":
        update = bump_parts.bump_bridge(workspace)
    elif what == "symbols":
        update = bump_symbols.bump_symbols(workspace)
    else:
        update = bump_lock.carried(bumps.bump_project(what, workspace), workspace)
    for line in update.summary:
        out.print(line, markup=False)
    if not update.files:
        return
    if check:
        say(f"{len(update.files)} files would change; without --check they are written.")
        return
    update.write()
    say(f"Wrote {len(update.files)} files. Build and test them: {launcher()} test")
