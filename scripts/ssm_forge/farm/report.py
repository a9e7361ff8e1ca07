"""What came of a farm: a table, the channel's coverage, and an HTML page that needs nothing but itself."""

from __future__ import annotations

import csv
import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssm_forge.base.files import write_whole
from ssm_forge.base.paths import Workspace
from ssm_forge.base.tables import FoldingTable
from ssm_forge.base.ui import human_bytes, human_seconds
from ssm_forge.channel import coverage
from ssm_forge.channel.source import FolderSource
from ssm_forge.farm import receipts
from ssm_forge.farm.jobs import Job, Wanted
from ssm_forge.manifest import variants


@dataclass(frozen=True)
class Row:
    """A job, and what came of it.

    Attributes:
        result: ``built``, ``copied``, ``made``, ``found``, ``failed``, ``waiting`` for one that failed, ``left out``.
        seconds: wall time; ``expected``: what was estimated.
        cpu: CPU seconds.
        memory: peak bytes of its processes, 0 where it was not measured.
        why: what went wrong.
    """

    name: str
    kind: str
    result: str
    file: str = ""
    seconds: float = 0.0
    expected: float = 0.0
    cpu: float = 0.0
    cores: int = 0
    memory: int = 0
    host: str = ""
    why: str = ""


@dataclass(frozen=True)
class Report:
    """All jobs of a run, and the packages that were there before.

    Attributes:
        wall: seconds that it took.
        variants: those that the packages are of.
    """

    rows: tuple[Row, ...]
    wall: float
    variants: tuple[str, ...] = ()

    @property
    def failed(self) -> list[Row]:
        """Those that failed by themselves first, then those that waited for them."""
        return sorted((row for row in self.rows if row.result in ("failed", "waiting")), key=lambda row: row.result)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return {"wall": self.wall, "jobs": [asdict(row) for row in self.rows]}


def make(
    wanted: Sequence[Wanted],
    impossible: Mapping[str, str],
    ran: Sequence[Job],
    folder: Path,
    workspace: Workspace,
    wall: float,
) -> Report:
    """The report of a run, from its receipts, and what failed jobs left instead.

    Args:
        wanted: the packages that were asked for.
        impossible: cell's name -> why its package can't be made from here.
        ran: the jobs that were started.
        folder: the farm's.
        wall: seconds that the run took.
    """
    by_name = {row.name: row for row in (_row(job, ran, folder) for job in ran)}
    for package in wanted:
        if package.cell.name not in by_name:
            by_name[package.cell.name] = Row(
                package.cell.name, "package", "found" if package.done else "waiting", package.file
            )
    for name, reason in impossible.items():
        by_name[name] = Row(name, "package", "left out", why=reason)
    names = dict.fromkeys(package.cell.variant.name for package in wanted)
    return Report(tuple(by_name.values()), wall, tuple(names))


def _row(job: Job, ran: Sequence[Job], folder: Path) -> Row:
    receipt = receipts.read(folder / job.receipt)
    if receipt is None:
        missing = [j.name for j in ran if j.name in job.needs and receipts.read(folder / j.receipt) is None]
        if missing:
            return Row(job.name, job.kind, "waiting", job.file, why=f"{missing[0]} failed")
        return Row(job.name, job.kind, "failed", job.file, why=_why(job, folder))
    return Row(
        job.name,
        job.kind,
        receipt.how,
        receipt.file,
        receipt.seconds,
        job.need.seconds,
        receipt.cpu,
        receipt.cores,
        _peak(folder / "measured" / job.kind / f"{Path(job.receipt).stem}.tsv"),
        receipt.host,
    )


def _why(job: Job, folder: Path) -> str:
    try:
        return (folder / "failed" / f"{job.name}.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return f"it ended without a word: killed, or its machine was lost; see the logs in {folder / 'logs'}."


def _peak(file: Path) -> int:
    """Snakemake measures the memory of a job's processes, in MiB."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return round(float(next(csv.DictReader(stream, delimiter="\t"))["max_rss"]) * 2**20)
    except (OSError, ValueError, KeyError, StopIteration):
        return 0


def table(report: Report) -> FoldingTable:
    """The report as a table for people in a terminal, a row for each job."""
    shown = FoldingTable("job", "result", "took", "expected", "CPU", "memory", "machine", "", wraps=[""])
    for row in report.rows:
        measured = row.result in ("built", "copied", "made") or row.seconds > 0
        shown.add_row(
            row.name,
            row.result,
            human_seconds(row.seconds) if measured else "",
            human_seconds(row.expected) if measured else "",
            human_seconds(row.cpu) if measured else "",
            human_bytes(row.memory) if row.memory else "",
            row.host,
            row.why,
        )
    return shown


def write(report: Report, folder: Path, workspace: Workspace) -> Path:
    """Write ``report.html``, whose path comes out, with the channel's coverage in ``coverage.html`` beside it."""
    covered = coverage.rows(coverage.items(FolderSource(workspace.channel)), variants.load(workspace.variants))
    coverage.write_page(covered, str(workspace.channel), folder / "coverage.html")
    target = folder / "report.html"
    write_whole(target, _page(report).encode())
    return target


def _page(report: Report) -> str:
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    body = "\n".join(_html_row(row) for row in report.rows)
    counts: dict[str, int] = {}
    for row in report.rows:
        counts[row.result] = counts.get(row.result, 0) + 1
    summary = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    return _PAGE.format(day=day, body=body, summary=summary, wall=human_seconds(report.wall))


def _html_row(row: Row) -> str:
    cells = (
        row.result,
        human_seconds(row.seconds) if row.seconds else "",
        human_seconds(row.expected) if row.expected else "",
        human_seconds(row.cpu) if row.cpu else "",
        human_bytes(row.memory) if row.memory else "",
        row.host,
        row.why,
    )
    kind = "no" if row.result in ("failed", "waiting") else "yes"
    title = html.escape(row.file or row.name)
    columns = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f'<tr class={kind}><th scope=row title="{title}">{html.escape(row.name)}</th>{columns}</tr>'


_PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>What the farm made</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ border: 1px solid var(--line); padding: .3rem .5rem; text-align: left; vertical-align: top; }}
tr.no {{ background: #c6282818; }} tr.yes {{ background: #2e7d3212; }}
</style>
</head>
<body>
<h1>What the farm made</h1>
<p>{summary}; {wall} in all, as of {day}. <a href=coverage.html>What the channel covers</a>.</p>
<div class=scroll>
<table>
<thead><tr><th scope=col>Job</th><th scope=col>Result</th><th scope=col>Took</th><th scope=col>Expected</th>
<th scope=col>CPU</th><th scope=col>Memory</th><th scope=col>Machine</th><th scope=col>What went wrong</th></tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
</body>
</html>
"""
