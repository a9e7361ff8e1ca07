"""Which tier runs what, and what a run says at its end."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import pytest

from ssm_forge.base.errors import UsageError
from ssm_forge.upkeep import tiers
from ssm_forge.upkeep.tiers import Step

ROOT = Path(__file__).resolve().parents[3]
DAY = datetime.date(2026, 11, 25)


def plan(tier: str, *, strict: bool = False, seed: str = "") -> dict[str, Step]:
    return {step.name: step for step in tiers.steps(tier, ROOT, strict=strict, seed=seed, variant="cu118")}


def marks(step: Step) -> str:
    """The tests that a step chooses by their marks."""
    # After pytest's own "-m" of Python.
    words = step.command[step.command.index("pytest") :]
    return words[words.index("-m") + 1] if "-m" in words else ""


def test_every_variant_has_its_day() -> None:
    days = [tiers.variant_of_the_day(DAY + datetime.timedelta(days=number)) for number in range(6)]
    assert set(days) == {*tiers.VARIANTS, tiers.FROM_CONDA}
    assert {tiers.FROM_CONDA} in ({*days[::2]}, {*days[1::2]})
    assert tiers.variant_of_the_day(DAY, "cu124") == "cu124"
    with pytest.raises(UsageError, match="SSM_FORGE_TEST_VARIANT=cu999 is none of cu118, cu124, cu130"):
        tiers.variant_of_the_day(DAY, "cu999")


def test_each_tier_has_the_steps_of_the_one_before_and_more() -> None:
    fast, middle, everything = (list(plan(tier)) for tier in (tiers.FAST, tiers.MIDDLE, tiers.ALL))
    assert fast[:3] == ["lint", "types", "unit tests"]
    assert middle == [*fast, "slow unit tests", "servers", "end to end, cu118"]
    assert {*fast, "unit tests, Python 3.10", "unit tests, Python 3.13", "servers"} <= set(everything)
    assert everything[-1] == "end to end, every variant"


def test_only_the_last_tier_runs_what_is_nightly() -> None:
    assert marks(plan(tiers.MIDDLE)["servers"]) == "not nightly"
    assert marks(plan(tiers.ALL)["servers"]) == ""
    assert marks(plan(tiers.FAST)["unit tests"]) == "not slow and not nightly"
    assert marks(plan(tiers.MIDDLE)["slow unit tests"]) == "slow and not nightly"
    assert marks(plan(tiers.ALL)["slow unit tests"]) == "slow"


def test_skips_are_strict_and_the_order_random_where_that_is_asked_for() -> None:
    strict, loose = plan(tiers.FAST, strict=True, seed="7")["unit tests"], plan(tiers.FAST)["unit tests"]
    assert {"--strict-skips", "--randomly-seed=7"} <= set(strict.command)
    assert not {"--strict-skips", "--randomly-seed=7"} & set(loose.command)
    assert "no:randomly" in loose.command


def test_ci_runs_the_tier_that_the_readme_names_with_strict_skips() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "exec ./run test --strict-skips"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def told(passed: int, skips: list[tuple[str, str]]) -> str:
    text = json.dumps({"passed": passed, "failed": 0, "error": 0, "xpassed": 0, "skips": skips})
    return f"import os; open(os.environ['SSM_FORGE_TEST_SUMMARY'], 'w').write({text!r})"


def test_what_passed_what_was_not_run_and_how_long_is_said_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    skips = [("tests/test_a.py::test_x", "no GPU [here]"), ("tests/test_b.py::test_y", "no GPU [here]")]
    results = tiers.run(
        [
            Step("lint", python("pass")),
            Step("unit", python(told(5, skips)), {"NAMED": "x"}),
            Step("other", absent="no such Python"),
        ],
        ROOT,
    )
    tiers.show(results, tiers.FAST)
    lines = capsys.readouterr().out.splitlines()
    assert "not run: tests/test_a.py::test_x and 1 more: no GPU [here]" in lines
    assert "not run: other: no such Python" in lines
    assert lines[-1] == "6 passed, 0 failed, 2 skipped"
    assert max(map(len, lines)) <= 80


def test_the_first_step_that_fails_ends_the_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    after = tmp_path / "after"
    results = tiers.run(
        [Step("types", python("raise SystemExit(3)")), Step("unit", python(f"open({str(after)!r}, 'w')"))], ROOT
    )
    assert [result.returncode for result in results] == [3, 0]
    assert not after.exists()
    tiers.show(results, tiers.FAST)
    said = capsys.readouterr().out
    assert "not run: unit: a step before it failed" in said
    assert said.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"


def test_a_python_that_the_tools_can_not_be_made_with_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_SYSTEM_PYTHON", Path("/nowhere/python3"))
    step = plan(tiers.FAST)["unit tests, system's Python"]
    assert "/nowhere/python3 is not there" in step.absent
    monkeypatch.setattr(tiers, "_SYSTEM_PYTHON", Path(sys.executable))
    (absent,) = [step.absent for step in plan(tiers.FAST).values() if "system's" in step.name]
    assert absent == "the tools run on it already"


def test_another_python_runs_the_same_unit_tests_with_tools_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_SYSTEM_PYTHON", Path("/usr/bin/other"))
    monkeypatch.setattr(tiers, "_version", lambda python: "3.10.1")
    step = plan(tiers.FAST)["unit tests, system's Python 3.10.1"]
    assert step.command[:2] == (str(ROOT / "run"), "test")
    assert step.environment["SSM_FORGE_PYTHON"] == "/usr/bin/other"
    assert "tests/unit" in step.command
