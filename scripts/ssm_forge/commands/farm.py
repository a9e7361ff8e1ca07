"""``farm``: many packages of the matrix, here or on a cluster."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from ssm_forge.base import paths
from ssm_forge.base.errors import MachineError
from ssm_forge.base.own_tools import require
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.tables import FoldingTable
from ssm_forge.base.ui import human_bytes, human_seconds, out, say
from ssm_forge.channel import coverage
from ssm_forge.channel.source import FolderSource
from ssm_forge.farm import estimate as estimates
from ssm_forge.farm import report, run
from ssm_forge.farm.engine import Executor
from ssm_forge.farm.estimate import Estimate, Machine
from ssm_forge.farm.jobs import Job, Limits
from ssm_forge.manifest import variants

_EXECUTORS = ("local", "slurm", "kubernetes", "cluster-generic")


@click.command()
@click.option(
    "--select",
    default="",
    metavar="EXPR",
    help="Which packages: 'variant=cu118,cu130 python!=3.10 project=mamba*'; keys are variant, source, python, "
    "project, cuda, torch, kernels, platform.  [default: the whole matrix for this machine's platform, kernels=forge]",
)
@click.option(
    "--cuda-arch",
    "archs",
    multiple=True,
    metavar="ARCH",
    help='Compute capabilities: families, all, or a list such as "8.0;9.0+PTX". May be repeated: a package for each.',
)
@click.option(
    "--source",
    type=click.Choice(["auto", "conda", "bridge"]),
    default="auto",
    show_default=True,
    help="Where dependencies come from.",
)
@click.option(
    "--executor", type=click.Choice(_EXECUTORS), default="local", show_default=True, help="Who runs the jobs."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Jobs side by side.  [default: what fits; 100 elsewhere]")
@click.option(
    "--cores", type=click.IntRange(min=1), help="Cores for each package.  [default: as many as it keeps busy]"
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0.5),
    metavar="GB",
    help="Most memory for one job.  [default: what is free; 64]",
)
@click.option("--retries", type=click.IntRange(min=0), default=2, show_default=True, help="More tries of a failed job.")
@click.option(
    "--channel",
    "channels",
    multiple=True,
    metavar="URL",
    help="Copy a package that was made from the same from here, instead of building it. May be repeated.",
)
@click.option(
    "--wheels",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Make a wheel of each, too, in DIR.",
)
@click.option(
    "--host-compiler", default="auto", show_default=True, metavar="auto|system|bridge|PATH", help="C++ compiler."
)
@click.option("--estimate", "estimating", is_flag=True, help="Only say what it would take, and on which machines.")
@click.option(
    "--machines",
    metavar="LIST",
    help="For --estimate: 4x16:64 is four machines of 16 cores and 64 GB.  [default: this one]",
)
@click.option("--dry-run", is_flag=True, help="List the jobs and stop.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@click.argument("snakemake", nargs=-1, metavar="[-- SNAKEMAKE'S OPTIONS]")
def farm(
    select: str,
    archs: tuple[str, ...],
    source: str,
    executor: str,
    jobs: int | None,
    cores: int | None,
    memory: float | None,
    retries: int,
    channels: tuple[str, ...],
    wheels: Path | None,
    host_compiler: str,
    estimating: bool,
    machines: str | None,
    dry_run: bool,
    as_json: bool,
    snakemake: tuple[str, ...],
) -> None:
    """Build many packages of the matrix, here or on a cluster, and lose nothing when a machine is lost.

    What is done is not done again: stop it, start it again, on other machines.
    """
    require("psutil", "msgpack")
    workspace = paths.workspace()
    named_machines = estimates.machines(machines) if machines else []
    own_cores, own_memory = run.this_machine()
    options = run.Options(
        select=select,
        archs=archs,
        source=source,
        executor=Executor(executor, jobs, own_cores, own_memory, retries, snakemake),
        limits=_limits(executor, named_machines, cores, memory),
        host_compiler=host_compiler,
        channels=channels,
        wheels=wheels.absolute() if wheels else None,
    )
    if dry_run or estimating:
        _estimate(options, named_machines, workspace, listed=dry_run, as_json=as_json)
        return
    finished = run.farm(options, workspace)
    if as_json:
        out.print_json(json.dumps(finished.as_dict()))
        return
    out.print(report.table(finished))
    table = coverage.rows(coverage.items(FolderSource(workspace.channel)), variants.load(workspace.variants))
    out.print(coverage.table([row for row in table if row.variant in finished.variants]))
    say(f"Done in {human_seconds(finished.wall)}. Report: {run.folder(workspace) / 'report.html'}")


# What a machine elsewhere is taken to have.
_MOST_CORES = 16
_MOST_MEMORY_BYTES = 64_000_000_000


def _limits(executor: str, named_machines: list[Machine], cores: int | None, memory_gb: float | None) -> Limits:
    """What one job may have: of the machines that were named, else of this one, or of one elsewhere.

    Raises:
        MachineError: when no machine has so many cores.
    """
    elsewhere = Machine(_MOST_CORES, _MOST_MEMORY_BYTES)
    machines = named_machines or [elsewhere if executor != "local" else Machine(*run.this_machine())]
    most_cores, most_memory = max(m.cores for m in machines), max(m.memory for m in machines)
    if cores and cores > most_cores:
        raise MachineError(f"--cores {cores}: there are {most_cores}.", fix=f"Use --cores {most_cores}.")
    return Limits(most_cores, min(most_memory, round(memory_gb * 1e9)) if memory_gb else most_memory, cores)


def _estimate(
    options: run.Options, named_machines: list[Machine], workspace: Workspace, *, listed: bool, as_json: bool
) -> None:
    """Say what it would take, and on demand which jobs there are."""
    field = run.survey(run.chosen(options, workspace), options, workspace)
    planned = run.left(field, options, workspace)
    executor = options.executor
    machines = named_machines or [Machine(executor.cores, executor.memory)]
    if not named_machines and executor.name != "local":
        machines = [Machine(_MOST_CORES, _MOST_MEMORY_BYTES)] * (executor.jobs or 1)
    result = estimates.estimate(planned, machines, at_once=executor.jobs)
    if as_json:
        document = {"estimate": asdict(result), "jobs": [job.as_dict() for job in planned]}
        out.print_json(json.dumps({**document, "left_out": field.impossible}))
        return
    run.tell_left_out(field)
    if listed:
        _show(planned)
    _say_estimate(result, sum(package.done for package in field.wanted))


def _show(planned: list[Job]) -> None:
    table = FoldingTable("job", "cores", "memory", "expected", "limit", "after", wraps=["after"])
    for job in planned:
        need = job.need
        table.add_row(
            job.name,
            str(need.cores),
            human_bytes(need.memory),
            human_seconds(need.seconds),
            f"{need.minutes} min",
            ", ".join(job.needs),
        )
    out.print(table)


def _say_estimate(result: Estimate, packages_there: int) -> None:
    if not result.jobs:
        say(f"Nothing to do: the channel has all {packages_there} packages.")
        return
    say(
        f"{result.jobs} jobs, {packages_there} packages are there already: {human_seconds(result.wall)} of wall time, "
        f"{result.cpu / 3600:.2f} CPU hours, memory up to {human_bytes(result.memory)}, disk up to "
        f"{human_bytes(result.disk)}."
    )
    say(f"Leave --dry-run and --estimate out to run them; '{launcher()} farm --help' has the rest.")
