"""What a check of an environment found, and printing it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from ssm_forge.base.tables import FoldingTable
from ssm_forge.base.ui import out

Status = Literal["pass", "fail", "not-run"]


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: what was asked.
        status: ``pass``, ``fail`` or ``not-run``.
        detail: what was found, or why it was not run.
    """

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Report:
    """All checks of one environment."""

    prefix: Path
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "fail")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        counts = {status: sum(c.status == status for c in self.checks) for status in ("pass", "fail", "not-run")}
        return {"prefix": str(self.prefix), "counts": counts, "checks": [asdict(check) for check in self.checks]}


def show(report: Report) -> None:
    """Print a report for people."""
    colours = {"pass": "green", "fail": "red", "not-run": "yellow"}
    table = FoldingTable("check", "result", "detail", title=f"{report.prefix}", wraps=["check", "detail"])
    for check in report.checks:
        table.add_row(check.name, Text(check.status, style=colours[check.status]), check.detail)
    out.print(table)
    counts = report.as_dict()["counts"]
    out.print(f"{counts['pass']} passed, {counts['fail']} failed, {counts['not-run']} not run")
