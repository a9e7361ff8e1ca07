"""``build``: so far only whether the recipes fit the channels; ``install-mamba`` builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssm_forge.errors import UsageError
from ssm_forge.paths import launcher, workspace
from ssm_forge.ui import open_log, out, say
from ssm_forge.variants import DEFAULT_VARIANT, SOURCES

if TYPE_CHECKING:
    from ssm_forge.solve_only import SolvedEnvironment


@click.command()
@click.option("--variant", default=DEFAULT_VARIANT, show_default=True, help="Row of the build matrix.")
@click.option(
    "--source",
    type=click.Choice(SOURCES),
    default="conda",
    show_default=True,
    help="Where its parts come from.",
)
@click.option("--python", "python_version", help="Python version; default: 3.12 where the variant has it.")
@click.option("--cuda-arch", help='native, families, all, or a list such as "8.0;9.0+PTX".')
@click.option("--solve-only", is_flag=True, help="Render the recipes and solve their environments, build nothing.")
@click.option(
    "--snapshot",
    envvar="SSM_FORGE_SNAPSHOT",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Solve offline from a folder of recorded repodata.",
)
@click.option("--all", "show_all", is_flag=True, help="Print every package, not only those that the recipes name.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def build(
    variant: str,
    source: str,
    python_version: str | None,
    cuda_arch: str | None,
    solve_only: bool,
    snapshot: Path | None,
    show_all: bool,
    as_json: bool,
) -> None:
    """Solve what a build of a variant needs, from the real channels or their record."""
    from ssm_forge import arch, variants
    from ssm_forge import solve_only as solving

    if not solve_only or source != "conda":
        raise UsageError(
            "build does only --source conda --solve-only so far.",
            fix=f"'{launcher()} install-mamba' builds and installs.",
        )
    place = workspace()
    row = variants.load(place.variants).get(variant, "conda")
    default = variants.DEFAULT_PYTHON if variants.DEFAULT_PYTHON in row.pythons else row.pythons[-1]
    python = python_version or default
    row.check_python(python)
    archs = arch.resolve(
        cuda_arch,
        supported=row.supported_archs,
        upstream=row.upstream_archs,
        default=row.default_archs,
        gpus=(),
    )
    if snapshot is None:
        snapshot = solving.choose_snapshot(row, place)
        if snapshot is not None:
            say(f"The channels can't be reached; solving against the recorded repodata in {snapshot}.")
    with open_log(place.logs, f"solve-{variant}") as log:
        solved = solving.solve_recipes(row, python, archs, workspace=place, snapshot=snapshot)
        for environment in solved:
            log(f"{environment.package}: {environment.kind}: {', '.join(environment.requested)}")
            log("\n".join(f"  {r.url}" for r in environment.records))
        if as_json:
            out.print_json(json.dumps([_as_dict(e) for e in solved]))
        else:
            for environment in solved:
                _print(environment, show_all)
        say("Not checked: run exports, which repodata does not hold; the recipes name their own pins.")
        say(f"Every package of every environment is in {log.path}.")


def _as_dict(environment: SolvedEnvironment) -> dict[str, Any]:
    return {
        "package": environment.package,
        "environment": environment.kind,
        "requested": list(environment.requested),
        "packages": [r.url for r in environment.records],
    }


def _print(environment: SolvedEnvironment, show_all: bool) -> None:
    if environment.kind == "build":
        out.print(environment.package, style="bold")
    out.print(f"  {environment.kind}: {len(environment.records)} packages")
    if show_all:
        rows = [(str(r.name.normalized), r) for r in environment.records]
    else:
        rows = [(spec, environment.answer(spec)) for spec in environment.requested]
    width = max((len(name) for name, _ in rows), default=0)
    for name, record in rows:
        what = f"{record.version} {record.build}"
        out.print(f"    {name:<{width}}  {what:<45}  {_channel(record)}", markup=False)


def _channel(record: Any) -> str:
    url = str(record.channel or "").rstrip("/")
    return "this recipe" if url.startswith("file:") else url.split("/", 3)[-1]
