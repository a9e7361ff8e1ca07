"""``build``: packages for any GPU into the local channel, without installing; or only what their builds solve to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from ssm_forge.base import arch, paths, platforms
from ssm_forge.base.errors import UsageError
from ssm_forge.base.ui import open_log, out, say
from ssm_forge.commands.install_mamba import platform_option, require_no_kernels, target_options, tree_option
from ssm_forge.flow import fitting
from ssm_forge.flow.plan import Options
from ssm_forge.manifest import variants
from ssm_forge.package.kernels import Kernels
from ssm_forge.solve import recipes as solving
from ssm_forge.solve.recipes import SolvedEnvironment
from ssm_forge.trees import job


@click.command()
@target_options
@platform_option
@click.option("--solve-only", is_flag=True, help="Render the recipes and solve their environments, build nothing.")
@click.option(
    "--snapshot",
    envvar="SSM_FORGE_SNAPSHOT",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --solve-only: solve offline from a folder of recorded repodata.",
)
@click.option("--all", "show_all", is_flag=True, help="With --solve-only: print every package.")
@tree_option
@click.option(
    "--format",
    "kind",
    type=click.Choice(["conda", "wheel", "both"]),
    default="conda",
    show_default=True,
    help="wheel: for pip's torch, from the bridge, into the channel's simple index.",
)
@click.option(
    "--for",
    "env",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="For the torch of this environment, which --variant and --source then say nothing about.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@click.pass_context
def build(
    context: click.Context,
    variant: str,
    python: str | None,
    cuda_arch: str | None,
    source: str,
    kernels: Kernels,
    platform: str | None,
    jobs: int | None,
    host_compiler: str,
    solve_only: bool,
    snapshot: Path | None,
    show_all: bool,
    trees: tuple[str, ...],
    kind: Literal["conda", "wheel", "both"],
    env: Path | None,
    as_json: bool,
) -> None:
    """Build what the channel lacks of a variant, for any GPU, and install nothing; or only solve what it needs."""
    # Long: its arguments are the options, and each is handed on once.
    if solve_only:
        if source == "bridge":
            raise UsageError(
                "--solve-only is for the conda channels; the bridge has what its locks name.",
                fix="Leave --source bridge out.",
            )
        _solve_only(variant, python, cuda_arch, kernels, platform, snapshot, show_all=show_all, as_json=as_json)
        return
    require_no_kernels(kernels, trees)
    fitting.require_architecture()
    if trees or env is not None:
        fitting.require_own(platform, "--source-tree" if trees else "--for")
    options = Options(
        variant=variant,
        python=python,
        cuda_arch=cuda_arch,
        source=source,  # type: ignore[arg-type]
        jobs=jobs,
        host_compiler=host_compiler,
        for_this_machine=False,
        kernels=kernels,
        platform=platform,
    )
    named = context.get_parameter_source("variant") is not ParameterSource.DEFAULT
    if env is not None and (named or source != "auto"):
        named_option = variant if named else source
        raise UsageError(
            f"{env} has a torch of its own, which decides what is made; '{named_option}' says otherwise.",
            fix="Leave --variant and --source out.",
        )
    built = job.build(options, kind, env, trees)
    if as_json:
        wheels = {"wheels": list(map(str, built.wheels))} if kind != "conda" else {}
        out.print_json(json.dumps({**built.plan, "files": list(map(str, built.packages)), **wheels}))
    else:
        shown = [*(built.packages if kind != "wheel" else ()), *built.wheels]
        out.print("\n".join(map(str, shown)), markup=False)


def _solve_only(
    variant: str,
    python_version: str | None,
    cuda_arch: str | None,
    kernels: Kernels,
    platform: str | None,
    snapshot: Path | None,
    *,
    show_all: bool,
    as_json: bool,
) -> None:

    workspace = paths.workspace()
    row = variants.load(workspace.variants).get(variant, "conda")
    if platform is not None:
        row.check_platform(platforms.of(platform))
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
    with open_log(workspace.logs, f"solve-{variant}") as log:
        key = row.key(python, archs, kernels=kernels)
        solved = solving.solve_recipes(row, key, workspace=workspace, snapshot=snapshot)
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
        version = f"{record.version} {record.build}"
        out.print(f"    {name:<{width}}  {version:<45}  {_channel(record)}", markup=False)


def _channel(record: Any) -> str:
    url = str(record.channel or "").rstrip("/")
    return "this recipe" if url.startswith("file:") else url.split("/", 3)[-1]
