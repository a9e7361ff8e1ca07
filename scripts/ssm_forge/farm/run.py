"""A farm from selection to report: what is wanted, what is there, what is left; run that, past whatever fails."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ssm_forge.base import machine
from ssm_forge.base.errors import BuildError, ForgeError, MachineError
from ssm_forge.base.files import sha256_of, write_whole
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import Log, human_seconds, note, open_log, say
from ssm_forge.build import compile_cache
from ssm_forge.build.leftovers import sweep
from ssm_forge.build.origin import conda_reachable
from ssm_forge.channel import folder as channels
from ssm_forge.farm import cells, engine, inputs, jobs, receipts, report
from ssm_forge.farm.cells import Cell
from ssm_forge.farm.engine import Executor
from ssm_forge.farm.jobs import Job, Limits, Wanted
from ssm_forge.farm.receipts import Receipt
from ssm_forge.manifest import recipe, variants
from ssm_forge.manifest.variants import Source


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        select: expression over the matrix; empty for all of it.
        archs: lists of capabilities, a package for each; the rows' defaults where there are none.
        source: ``auto`` for what can be reached.
        executor: who runs the jobs.
        limits: what one job may have.
        channels: folders and URLs of channels to take finished packages from.
        wheels: folder that each package goes into as a wheel, too; None for none.
    """

    select: str
    archs: tuple[str, ...]
    source: Source | str
    executor: Executor
    limits: Limits
    host_compiler: str = "auto"
    channels: tuple[str, ...] = ()
    wheels: Path | None = None


@dataclass
class Field:
    """The packages that a selection means.

    Attributes:
        wanted: those that can be made from here, done or not.
        impossible: cell's name -> why it can't be made from here.
        adopted: receipts of packages that were in the channel without one; path -> receipt.
    """

    wanted: list[Wanted] = field(default_factory=list)
    impossible: dict[str, str] = field(default_factory=dict)
    adopted: dict[Path, Receipt] = field(default_factory=dict)


class Resources(NamedTuple):
    """Cores of a machine, and bytes of memory that are free."""

    cores: int
    memory: int


def folder(workspace: Workspace) -> Path:
    """The folder with receipts, logs and the report."""
    return workspace.state / "farm"


def chosen(options: Options, workspace: Workspace) -> list[Cell]:
    """The cells that the user asked for, and what they need.

    Raises:
        UsageError: when there are none.
    """
    every = cells.every(variants.load(workspace.variants), recipe.PROJECTS, options.archs)
    if options.source != "auto":
        every = [cell for cell in every if cell.variant.source == options.source]
    picked = cells.select(every, options.select)
    if options.source == "auto" and "source" not in options.select:
        # Asked again of what is left, so that an expression never hides why nothing is.
        picked = cells.from_one_source(every, conda=conda_reachable())
        picked = cells.select(picked, options.select)
    return cells.with_needed(picked, recipe.PROJECTS)


def survey(picked: Sequence[Cell], options: Options, workspace: Workspace) -> Field:
    """Which of the cells' packages are there already, and which can be made from here; changes nothing.

    Raises:
        MachineError: when none of them can be made from here.
    """
    listed = channels.records(workspace.channel)
    surveyed = Field()
    for cell in picked:
        try:
            request = inputs.request(cell, options.host_compiler, workspace)
        except ForgeError as error:
            surveyed.impossible[cell.name] = str(error)
            continue
        digest = inputs.digest(request, workspace)
        target = folder(workspace) / receipts.name("package", cell.name, digest)
        receipt = receipts.read(target)
        done = receipt is not None and receipts.holds(receipt, workspace.channel, listed)
        package = channels.find(workspace.channel, request.filename)
        if not done and package is not None and inputs.made_from(package, request, workspace):
            surveyed.adopted[target] = Receipt(cell.name, digest, "found", request.filename, sha256_of(package))
            done = True
        surveyed.wanted.append(Wanted(cell, request.filename, digest, done))
    if not surveyed.wanted:
        raise MachineError(f"nothing of it can be made here: {next(iter(surveyed.impossible.values()))}")
    return surveyed


def tell_left_out(surveyed: Field) -> None:
    """Say which packages can't be made from here, and why."""
    for name, reason in surveyed.impossible.items():
        note(f"{name} is left out: {reason}")


def left(surveyed: Field, options: Options, workspace: Workspace, without: Sequence[str] = ()) -> list[Job]:
    """The jobs that are left to do.

    Args:
        without: names of packages that failed, as :func:`ssm_forge.farm.jobs.graph` takes them.

    Raises:
        MachineError: as :func:`ssm_forge.farm.jobs.graph`.
    """
    shares = bool(compile_cache.environment(workspace).get("SSM_FORGE_CCACHE"))
    planned = jobs.graph(
        surveyed.wanted,
        workspace,
        options.limits,
        host_compiler=options.host_compiler,
        wheels=options.wheels is not None,
        shares_objects=shares,
        without=without,
    )
    return [job for job in planned if not _is_there(job, options, workspace)]


def _is_there(job: Job, options: Options, workspace: Workspace) -> bool:
    if job.kind == "wheel":
        return _has_wheel(job, options, workspace)
    # Packages of conda's channels lie in the package cache; one that is gone from there is fetched by its build. What
    # is there of the bridge is known without a receipt.
    fetched = (
        job.kind in ("toolchain", "torch") and job.cell.variant.source == "conda" and workspace.package_cache.is_dir()
    )
    return fetched and receipts.read(folder(workspace) / job.receipt) is not None


def _has_wheel(job: Job, options: Options, workspace: Workspace) -> bool:
    receipt = receipts.read(folder(workspace) / job.receipt)
    wheel = receipt and options.wheels and options.wheels / f"{job.cell.row}-{job.cell.made}" / receipt.file
    return bool(wheel and wheel.is_file() and receipt and sha256_of(wheel) == receipt.sha256)


def farm(options: Options, workspace: Workspace) -> report.Report:
    """Make everything that is selected, and tell what came of it.

    Raises:
        BuildError: when a job failed to its last try; everything that does not need it was made.
    """
    farm_folder = folder(workspace)
    with engine.alone(farm_folder), open_log(workspace.logs, "farm") as log:
        say(f"Full log: {log.path}")
        sweep(workspace)
        started = time.time()
        channels.ensure_indexed(workspace.channel)
        surveyed = survey(chosen(options, workspace), options, workspace)
        for path, receipt in surveyed.adopted.items():
            receipts.write(path, receipt)
        tell_left_out(surveyed)
        ran: dict[str, Job] = {}
        lost: list[str] = []
        planned = left(surveyed, options, workspace)
        while planned:
            say(f"{len(planned)} jobs: {_counted(planned)}")
            ran.update({job.name: job for job in planned})
            _run(planned, options, workspace, log)
            # What waits for a Python that failed may go with another one first; what lost more than that may not.
            lost += _culprits(planned, farm_folder)
            planned = _worth_it(
                left(refreshed(surveyed, farm_folder), options, workspace, lost), lost, _made(ran.values(), farm_folder)
            )
        result = report.make(
            surveyed.wanted, surveyed.impossible, list(ran.values()), farm_folder, workspace, time.time() - started
        )
        report.write(result, farm_folder, workspace)
        if result.failed:
            first = result.failed[0]
            raise BuildError(
                f"{len(result.failed)} of {len(result.rows)} jobs failed, first {first.name}: {first.why}",
                fix=f"The others are done. See {farm_folder / 'report.html'}; the same command goes on with what is "
                "missing.",
                log=log.path,
            )
    return result


def refreshed(surveyed: Field, farm_folder: Path) -> Field:
    """``surveyed``, with those packages done that have a receipt by now."""

    def done(package: Wanted) -> bool:
        return (
            package.done
            or receipts.read(farm_folder / receipts.name("package", package.cell.name, package.digest)) is not None
        )

    return replace(surveyed, wanted=[replace(package, done=done(package)) for package in surveyed.wanted])


def _culprits(ran: Sequence[Job], farm_folder: Path) -> list[str]:
    """Jobs that failed by themselves, and not because another one did."""
    failed = {job.name for job in ran} - _made(ran, farm_folder)
    return [job.name for job in ran if job.name in failed and not failed.intersection(job.needs)]


def _made(ran: Iterable[Job], farm_folder: Path) -> set[str]:
    return {job.name for job in ran if receipts.read(farm_folder / job.receipt) is not None}


def _worth_it(planned: Sequence[Job], lost: Sequence[str], made: Collection[str]) -> list[Job]:
    """What can still be made: no job that failed, none that waits for it, and none that was just done."""
    excluded = set(lost)
    for job in planned:
        if excluded.intersection(job.needs):
            excluded.add(job.name)
    return [job for job in planned if job.name not in excluded and job.name not in made]


def _run(pending: Sequence[Job], options: Options, workspace: Workspace, log: Log) -> None:
    farm_folder = folder(workspace)
    file = farm_folder / "farm.json"
    names = {job.name for job in pending}
    content = {
        "python": sys.executable,
        "kinds": list(jobs.KINDS),
        "host_compiler": options.host_compiler,
        "channels": list(options.channels),
        "wheels": str(options.wheels or ""),
        "jobs": [{**job.as_dict(), "needs": [need for need in job.needs if need in names]} for job in pending],
    }
    for job in pending:
        # Of an earlier run, whose toolchain may be gone from the cache since.
        (farm_folder / job.receipt).unlink(missing_ok=True)
        (farm_folder / "failed" / f"{job.name}.txt").unlink(missing_ok=True)
    write_whole(file, json.dumps(content, indent=1).encode())
    executor = options.executor
    watched = {job.name: farm_folder / job.receipt for job in pending}
    code = engine.run(engine.program(workspace), farm_folder, file, executor, log, lambda: _tell(watched, len(pending)))
    log(f"Snakemake ended with {code}")
    began = [
        job
        for job in pending
        if (farm_folder / job.receipt).exists() or (farm_folder / "failed" / f"{job.name}.txt").exists()
    ]
    if code and not began:
        notes = log.path.with_suffix(".snakemake.log")
        last = notes.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise BuildError(f"Snakemake ended with {code} before any job did: {' '.join(last)}", log=notes)


def _tell(watched: dict[str, Path], total: int) -> None:
    """Say what was done since the last time."""
    for name, path in list(watched.items()):
        receipt = receipts.read(path)
        if receipt is not None:
            del watched[name]
            took = human_seconds(receipt.seconds)
            say(f"[{total - len(watched)}/{total}] {receipt.how}: {receipt.file or name} in {took} on {receipt.host}")


def _counted(pending: Sequence[Job]) -> str:
    counts: Mapping[jobs.Kind, int] = jobs.kinds(pending)
    return ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items() if count)


def this_machine() -> Resources:
    """What this machine has for jobs now."""
    return Resources(machine.cores(), machine.free_memory())
