"""A skip that nobody expects is seen, and the list of expected ones is whole."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from expected_skips import Skip, load, read, unexpected

TESTS = Path(__file__).parents[1]
EXPECTED = load()


def text(node: ast.expr) -> str:
    """A string as it may turn out at run time; empty for what is no string."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) if isinstance(part, ast.Constant) else "something" for part in node.values)
    return ""


def reasons(source: str) -> Iterator[str]:
    """What the tests of a file say when they are skipped."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in ("skip", "xfail") and node.args:
            yield text(node.args[0])
        if node.func.attr in ("skipif", "importorskip"):
            named = [text(word.value) for word in node.keywords if word.arg == "reason"]
            yield named[0] if named else f"could not import '{text(node.args[0])}'"


def test_every_reason_that_a_test_may_give_is_listed() -> None:
    files = [path for path in TESTS.rglob("test_*.py") if path.name != Path(__file__).name]
    given = {reason for path in [*files, *TESTS.rglob("*servers.py")] for reason in reasons(path.read_text("utf-8"))}
    # What tests/unit/kernels/test_reports.py writes for upstream's tests to say.
    given -= {"two is not supported"}
    assert len(given) > 15
    assert [reason for reason in sorted(given) if not any(entry.reason.match(reason) for entry in EXPECTED)] == []


def test_a_reason_counts_only_in_its_tiers() -> None:
    skip = Skip("tests/test_x.py::test_y", "no git on this machine")
    assert unexpected([skip], EXPECTED, "fast") == []
    assert unexpected([skip], EXPECTED, "middle") == [skip]
    assert unexpected([Skip("t", "on a whim")], EXPECTED, "fast") != []


@pytest.mark.parametrize(
    "changes", [{"tiers": []}, {"tiers": ["often"]}, {"why": ""}], ids=["no tier", "no such tier", "no why"]
)
def test_an_entry_without_a_tier_or_a_why_is_refused(changes: dict[str, object]) -> None:
    sound = {"reason": "x", "tiers": ["fast"], "why": "y"}
    assert len(read({"skip": [sound]})) == 1
    with pytest.raises(ValueError, match="'x' names no tier"):
        read({"skip": [{**sound, **changes}]})


SAMPLE = """
import pytest
def test_expected():
    pytest.skip("every variant comes from both sources")
def test_unexpected():
    {unexpected}
"""


@pytest.mark.parametrize(
    ("unexpected", "options", "code"),
    [
        ("pytest.skip('on a whim')", ["--strict-skips"], 1),
        ("pytest.skip('on a whim')", ["--strict-skips", "-p", "xdist", "-n", "2"], 1),
        ("pytest.skip('on a whim')", [], 0),
        ("pytest.xfail('not yet')", ["--strict-skips"], 1),
        ("pass", ["--strict-skips"], 0),
    ],
)
def test_a_run_with_an_unexpected_skip_fails_where_skips_are_strict(
    unexpected: str, options: list[str], code: int, tmp_path: Path
) -> None:
    tests, helpers = tmp_path / "tests", tmp_path / "tests/helpers"
    helpers.mkdir(parents=True)
    for name in ("conftest.py", "helpers/expected_skips.py", "skips.toml"):
        (tests / name).write_text((TESTS / name).read_text("utf-8"))
    (tests / "test_sample.py").write_text(SAMPLE.format(unexpected=unexpected))
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = tests/helpers\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(tests)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("not expected in tier" in done.stdout) == (unexpected != "pass")
