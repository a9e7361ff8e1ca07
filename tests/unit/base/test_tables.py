"""Tables at the width of a small terminal, a usual one and a wide one: every value is there, whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from front_door import run
from ssm_forge.base.tables import FoldingTable

ROOT = Path(__file__).resolve().parents[3]


def printed(table: FoldingTable, width: int) -> list[str]:
    """The lines of a console of this width, set up as ours is."""
    console = Console(width=width, highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.fixture
def table() -> FoldingTable:
    made = FoldingTable("variant", "source", "causal-conv1d", "mamba-ssm", "built", title="What there is [here]")
    made.add_row("cu118", "conda", "1.7.0", "2.3.1", "py3.12: 8.0;9.0+PTX\npy3.13: 8.0;9.0+PTX")
    made.add_row("cu118", "bridge", "1.7.0", "2.3.1", "-")
    made.add_row("cu130", "bridge", "1.7.0", "2.3.2.post1", Text("[gpu] /a/very/long/path", style="dim"))
    return made


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 200])
def test_every_value_is_readable_at_every_width(table: FoldingTable, width: int) -> None:
    lines = printed(table, width)
    text = "\n".join(lines)
    assert "…" not in text
    assert all(len(line) <= width for line in lines)
    for word in (
        "cu118",
        "cu130",
        "conda",
        "1.7.0",
        "2.3.1",
        "2.3.2.post1",
        "8.0;9.0+PTX",
        "[gpu]",
        "/a/very/long/path",
    ):
        assert word in text, word
    assert "[here]" in text


def test_rows_are_folded_by_their_first_cell(table: FoldingTable) -> None:
    assert printed(table, 64) == [
        "What there is [here]",
        "cu118",
        "  source conda, causal-conv1d 1.7.0, mamba-ssm 2.3.1",
        "    built py3.12: 8.0;9.0+PTX; py3.13: 8.0;9.0+PTX",
        "  source bridge, causal-conv1d 1.7.0, mamba-ssm 2.3.1, built -",
        "cu130",
        "  source bridge, causal-conv1d 1.7.0, mamba-ssm 2.3.2.post1",
        "    built [gpu] /a/very/long/path",
    ]


def test_more_width_is_used_where_there_is_more(table: FoldingTable) -> None:
    (row,) = (line for line in printed(table, 100) if "2.3.2.post1" in line)
    assert all(word in row for word in ("cu130", "bridge", "1.7.0", "[gpu] /a/very/long/path"))


def test_sentences_are_wrapped_and_nothing_else_is() -> None:
    made = FoldingTable("check", "result", "detail", wraps=["detail"])
    made.add_row("torch imports", "pass", "torch 2.11.0 from /opt/envs/mamba/lib/python3.12/site-packages, CUDA 13.0")
    lines = printed(made, 80)
    assert any("torch imports" in line and "pass" in line for line in lines)
    assert all(len(line) <= 80 for line in lines)
    words = re.sub(r"[\s│]+", "", "".join(lines))
    assert "/opt/envs/mamba/lib/python3.12/site-packages" in words


def test_an_empty_table_is_its_headings() -> None:
    assert "check" in "\n".join(printed(FoldingTable("check", "result"), 80))


def test_variants_are_readable_at_80_columns() -> None:
    done = run("variants", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith("("))
    for words in ("cu118", "source bridge", "CUDA 13.0", "torch 2.11", "causal-conv1d 1.7.0", "mamba-ssm 2.3.2.post1"):
        assert words in done.stdout


def test_every_table_is_one_that_folds() -> None:
    """rich cuts what does not fit: no module makes such a table of its own, but the frameless one of lock --diff."""
    users = {
        path.name for path in (ROOT / "scripts").rglob("*.py") if re.search(r"import Table$", path.read_text(), re.M)
    }
    assert users == {"tables.py", "lock.py"}
