"""What is printed is what was meant: no bracket or colon of a path or of somebody's message is taken for style."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from rich.table import Table

from ssm_forge import cli
from ssm_forge.base import ui
from ssm_forge.base.errors import InstallError
from ssm_forge.base.paths import Workspace
from ssm_forge.flow import overview as matrix
from ssm_forge.flow.overview import Row
from ssm_forge.verify import report as verify_report
from ssm_forge.verify.report import Check, Report

SCRIPTS = Path(__file__).parents[3] / "scripts" / "ssm_forge"

TEXTS = [
    "Installed 71 packages into /data/envs/mamba[gpu]/env",
    "gcc: cannot find -lfoo [/usr/lib/x] given",
    "C:/data/:snake:/[bold]env[/bold]",
    "[/]",
    "a trailing backslash \\",
]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What both consoles print."""
    stream = io.StringIO()
    for console in (ui.console, ui.out):
        monkeypatch.setattr(console, "_file", stream)
        monkeypatch.setattr(console, "_width", 200)
    return stream


@pytest.mark.parametrize("text", TEXTS)
def test_messages_are_printed_as_they_are(shown: io.StringIO, text: str) -> None:
    ui.say(text)
    ui.note(text)
    ui.out.print(text)
    assert shown.getvalue() == f"{text}\nnote: {text}\n{text}\n"


@pytest.mark.parametrize("text", TEXTS)
def test_errors_are_printed_as_they_are(shown: io.StringIO, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def fail(**_: object) -> None:
        raise InstallError(text)

    monkeypatch.setattr(cli.tasks, "main", fail)
    assert cli.run() == InstallError.exit_code
    assert shown.getvalue() == f"error: {text}\n"


@pytest.mark.parametrize("text", TEXTS)
def test_tables_and_progress_are_printed_as_they_are(shown: io.StringIO, text: str) -> None:
    table = Table("column", title=text)
    table.add_row(text)
    ui.out.print(table)
    assert shown.getvalue().count(text) == 2
    for progress in (ui.step_progress(), ui.download_progress()):
        progress.add_task(text)
        ui.out.print(progress.get_renderable())
    assert shown.getvalue().count(text) == 4


def test_reports_keep_their_brackets(shown: io.StringIO, tmp_path: Path) -> None:
    prefix = tmp_path / "mamba[gpu]"
    verify_report.show(Report(prefix, (Check("a [check]", "fail", "no [/such] thing"),)))
    words = ("1",) * 8
    row = Row(
        "cu130",
        "bridge",
        *words,
        platforms=("linux-64",),
        pythons=("3.11", "3.12"),
        available=("3.12",),
        built=(),
        installed=("[x]",),
        why_not="",
    )
    matrix.show([row], Workspace(tmp_path, tmp_path))
    printed = re.sub(r"\s+", "", shown.getvalue())
    for words in ("mamba[gpu]", "a[check]", "no[/such]thing", "(3.11)3.12", "[x]"):
        assert words in printed


def test_no_text_holds_markup() -> None:
    """Nobody reads it any more: it would be printed."""
    found = []
    for path in SCRIPTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.search(r"\[/\]|\[(bold|dim|red|green|yellow)\]", node.value)
            ):
                found.append(f"{path.name}:{node.lineno}: {node.value}")
    assert not found
