"""A farm from selection to report: what is wanted, what is there, what is left; run that, past whatever fails."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
        impossible: cell's name -> why it can't be made from here.
        adopted: receipts of packages that were in the channel without one; path -> receipt.
    """

    wanted: list[Wanted] = field(default_factory=list)
    impossible: dict[str, str] = field(default_factory=dict)
    adopted: dict[Path, Receipt] = field(default_factory=dict)


def folder(place: Workspace) -> Path:
    """Where receipts, logs and the report are."""
    return place.state / "farm"


def chosen(options: Options, place: Workspace) -> list[Cell]:
    """The cells that the user asked for, and what they need.

    Raises:
        UsageError: when there are none.
    """
    every = cells.every(variants.load(place.variants), recipe.PROJECTS, options.archs)
    if options.source != "auto":
        every = [cell for cell in every if cell.variant.source == options.source]
    picked = cells.select(every, options.select)
    if options.source == "auto" and "source" not in options.select:
        # Asked again of what is left, so that an expression never hides why nothing is.
        picked = cells.from_one_source(every, conda=conda_reachable())
        picked = cells.select(picked, options.select)
    return cells.with_needed(picked, recipe.PROJECTS)


def survey(picked: Sequence[Cell], options: Options, place: Workspace) -> Field:
    """What of it is there already; changes nothing.

    Raises:
        MachineError: when nothing of it can be made from here.
    """
    listed = channels.records(place.channel)
    found = Field()
    for cell in picked:
        try:
            request = inputs.request(cell, options.host_compiler, place)
        except ForgeError as error:
            found.impossible[cell.name] = str(error)
            continue
        digest = inputs.digest(request, place)
        target = folder(place) / receipts.name("package", cell.name, digest)
        receipt = receipts.read(target)
        done = receipt is not None and receipts.holds(receipt, place.channel, listed)
        held = channels.find(place.channel, request.filename)
        if not done and held is not None and inputs.made_from(held, request, place):
            found.adopted[target] = Receipt(cell.name, digest, "found", request.filename, sha256_of(held))
            done = True
        found.wanted.append(Wanted(cell, request.filename, digest, done))
    if not found.wanted:
        raise MachineError(f"nothing of it can be made here: {next(iter(found.impossible.values()))}")
    return found


def left(found: Field, options: Options, place: Workspace, without: Sequence[str] = ()) -> list[Job]:
    """The jobs that are left."""
    shares = bool(compile_cache.environment(place).get("SSM_FORGE_CCACHE"))
    planned = jobs.graph(
        found.wanted,
        place,
        options.limits,
        host_compiler=options.host_compiler,
        wheels=options.wheels is not None,
        shares_objects=shares,
        without=without,
    )
    return [job for job in planned if not _is_there(job, options, place)]


def _is_there(job: Job, options: Options, place: Workspace) -> bool:
    if job.kind == "wheel":
        return _has_wheel(job, options, place)
    # Packages of conda's channels lie in the package cache; one that is gone from there is fetched by its build. What
    # is there of the bridge is known without a receipt.
    fetched = job.kind in ("toolchain", "torch") and job.cell.variant.source == "conda" and place.package_cache.is_dir()
    return fetched and receipts.read(folder(place) / job.receipt) is not None


def _has_wheel(job: Job, options: Options, place: Workspace) -> bool:
    receipt = receipts.read(folder(place) / job.receipt)
    made = receipt and options.wheels and options.wheels / f"{job.cell.row}-{job.cell.made}" / receipt.file
    return bool(made and made.is_file() and receipt and sha256_of(made) == receipt.sha256)


def farm(options: Options, place: Workspace) -> report.Report:
    """Make everything that is selected, and tell what came of it.

    Raises:
        BuildError: when a job failed to its last try; everything that does not need it was made.
    """
    here = folder(place)
    with engine.alone(here), open_log(place.logs, "farm") as log:
        say(f"Full log: {log.path}")
        sweep(place)
        started = time.time()
        channels.ensure_indexed(place.channel)
        found = survey(chosen(options, place), options, place)
        for path, receipt in found.adopted.items():
            receipts.write(path, receipt)
        for name, why in found.impossible.items():
            note(f"{name} is left out: {why}")
        ran: dict[str, Job] = {}
        lost: list[str] = []
        planned = left(found, options, place)
        while planned:
            say(f"{len(planned)} jobs: {_counted(planned)}")
            ran.update({job.name: job for job in planned})
            _run(planned, options, place, log)
            # What waits for a Python that failed may go with another one first; what lost more than that may not.
            lost += _culprits(planned, here)
            planned = _worth_it(left(refreshed(found, here), options, place, lost), lost, _made(ran.values(), here))
        made = report.make(found.wanted, found.impossible, list(ran.values()), here, place, time.time() - started)
        report.write(made, here, place)
        if made.failed:
            first = made.failed[0]
            raise BuildError(
                f"{len(made.failed)} of {len(made.rows)} jobs failed, first {first.name}: {first.why}",
                fix=f"The others are done. See {here / 'report.html'}; the same command goes on with what is missing.",
                log=log.path,
            )
    return made


def refreshed(found: Field, here: Path) -> Field:
    """The same, with what has a receipt by now."""

    def done(one: Wanted) -> bool:
        return one.done or receipts.read(here / receipts.name("package", one.cell.name, one.digest)) is not None

    return replace(found, wanted=[replace(one, done=done(one)) for one in found.wanted])


def _culprits(ran: Sequence[Job], here: Path) -> list[str]:
    """Jobs that failed by themselves, and not because another one did."""
    failed = {job.name for job in ran} - _made(ran, here)
    return [job.name for job in ran if job.name in failed and not failed.intersection(job.needs)]


def _made(ran: Iterable[Job], here: Path) -> set[str]:
    return {job.name for job in ran if receipts.read(here / job.receipt) is not None}


def _worth_it(planned: Sequence[Job], lost: Sequence[str], made: Collection[str]) -> list[Job]:
    """What can still be made: no job that failed, none that waits for it, and none that was just done."""
    out = set(lost)
    for job in planned:
        if out.intersection(job.needs):
            out.add(job.name)
    return [job for job in planned if job.name not in out and job.name not in made]


def _run(pending: Sequence[Job], options: Options, place: Workspace, log: Log) -> None:
    here = folder(place)
    file = here / "farm.json"
    names = {job.name for job in pending}
    told = {
        "python": sys.executable,
        "kinds": list(jobs.KINDS),
        "host_compiler": options.host_compiler,
        "channels": list(options.channels),
        "wheels": str(options.wheels or ""),
        "jobs": [{**job.as_dict(), "needs": [need for need in job.needs if need in names]} for job in pending],
    }
    for job in pending:
        # Of an earlier run, whose toolchain may be gone from the cache since.
        (here / job.receipt).unlink(missing_ok=True)
        (here / "failed" / f"{job.name}.txt").unlink(missing_ok=True)
    write_whole(file, json.dumps(told, indent=1).encode())
    executor = options.executor
    watched = {job.name: here / job.receipt for job in pending}
    code = engine.run(engine.program(place), here, file, executor, log, lambda: _tell(watched, len(pending)))
    log(f"Snakemake ended with {code}")
    began = [job for job in pending if (here / job.receipt).exists() or (here / "failed" / f"{job.name}.txt").exists()]
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


def this_machine() -> tuple[int, int]:
    """Cores, and bytes of memory that are free."""
    return machine.cores(), machine.free_memory()
