"""The tiers of this repository's tests: which steps each has, run one after the other, with what each took.

A step is a program that ends with 0 when all is well. The first that does not ends the run. Steps that run pytest leave
their counts in a file, so that the end of the run says what passed and what was not run, and why.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.text import Text

from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.tables import FoldingTable
from ssm_forge.base.ui import human_seconds, out, say
from ssm_forge.bridge import interpreter

FAST, MIDDLE, ALL = "fast", "middle", "all"
# What the main job is run for in the middle tier: every other day a variant from the bridge, each in turn, and between
# them one from stand-ins for conda's channels, which is what most users have.
VARIANTS = ("cu118", "cu124", "cu130")
FROM_CONDA = "cu130-conda"
# Only on demand and with --all.
_OTHERS = ("cu118-conda",)
VARIANT_VARIABLE = "SSM_FORGE_TEST_VARIANT"

_UNIT = ("tests/unit",)
_PARALLEL = ("-n", "2", "--dist", "loadfile")
_SYSTEM_PYTHON = Path("/usr/bin/python3")
_OLDEST_PYTHON = (3, 10)


@dataclass(frozen=True)
class Step:
    """One part of a tier.

    Attributes:
        name: for people.
        command: what is run, in the root of the checkout.
        environment: variables added to this process's.
        absent: why there is nothing to run here; empty otherwise.
    """

    name: str
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""


@dataclass
class Result:
    """What came of a step.

    Attributes:
        seconds: wall time; None for a step that was not started.
        counts: tests by outcome, and ``skips`` as pairs of test and reason; empty for what is not pytest.
    """

    step: Step
    seconds: float | None = None
    returncode: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    skips: list[tuple[str, str]] = field(default_factory=list)


def variant_of_the_day(today: datetime.date, wanted: str = "") -> str:
    """The variant that the middle tier builds whole: the one wanted, else another one each day.

    Raises:
        UsageError: for a variant that has no end-to-end test.
    """
    names = (*VARIANTS, FROM_CONDA, *_OTHERS)
    if wanted and wanted not in names:
        raise UsageError(f"{VARIANT_VARIABLE}={wanted} is none of {', '.join(names)}.", fix="Name one, or unset it.")
    turn, bridge = divmod(today.toordinal(), 2)
    return wanted or (VARIANTS[turn % len(VARIANTS)] if bridge else FROM_CONDA)


def steps(tier: str, root: Path, *, strict: bool, seed: str, variant: str) -> list[Step]:
    """The steps of a tier, in order.

    Args:
        root: the checkout.
        strict: whether a skip that tests/skips.toml does not expect is a failure.
        seed: for a random order of unit and server tests; empty for the order of the files.
        variant: whose main job the middle tier runs.
    """
    order = (f"--randomly-seed={seed}",) if seed else ("-p", "no:randomly")
    common = {"SSM_FORGE_TEST_TIER": tier, VARIANT_VARIABLE: variant, "SSM_FORGE_TEST_ALL": "1" if tier == ALL else ""}
    skips = ("--strict-skips",) if strict else ()

    def chosen(expression: str = "") -> tuple[str, ...]:
        wanted = " and ".join(part for part in (expression, "" if tier == ALL else "not nightly") if part)
        return ("--quiet", *skips, *(("-m", wanted) if wanted else ()))

    def tests(name: str, *arguments: str) -> Step:
        return Step(name, (sys.executable, "-m", "pytest", *arguments), common)

    unit = (*chosen("not slow"), *_UNIT, *_PARALLEL, *order)
    planned = [
        Step("lint", (sys.executable, "-m", "ruff", "check", "--quiet")),
        Step("types", (sys.executable, "-m", "mypy", "--no-error-summary")),
        tests("unit tests", *unit),
    ]
    for name, python in _other_pythons(tier):
        if isinstance(python, str):
            planned.append(Step(name, absent=python))
            continue
        own_tools = {**common, "SSM_FORGE_PYTHON": str(python), "SSM_FORGE_NO_PIXI": "1"}
        planned.append(Step(name, (str(root / "run"), "test", "--", *unit), own_tools))
    if tier != FAST:
        whole = "every variant" if tier == ALL else variant
        planned += [
            tests("slow unit tests", *chosen("slow"), *_UNIT, *_PARALLEL, *order),
            tests("servers", *chosen(), "tests/servers", *_PARALLEL, *order),
            tests(f"end to end, {whole}", *chosen(), "tests/end_to_end", "-p", "no:randomly"),
        ]
    return planned


def _other_pythons(tier: str) -> list[tuple[str, Path | str]]:
    """(step, interpreter or why there is none): the system's Python, and those at both ends of what is supported."""
    pythons: list[tuple[str, Path | str]] = []
    version = _version(_SYSTEM_PYTHON)
    name = f"unit tests, system's Python {version}".rstrip()
    if version == _text(sys.version_info[:3]):
        pythons.append((name, "the tools run on it already"))
    elif not version:
        pythons.append((name, f"{_SYSTEM_PYTHON} is not there, is older than 3.10, or has no venv module"))
    else:
        pythons.append((name, _SYSTEM_PYTHON))
    if tier == ALL:
        for minor in ("3.10", "3.13"):
            try:
                pythons.append((f"unit tests, Python {minor}", interpreter.find(minor).executable))
            except MachineError as error:
                pythons.append((f"unit tests, Python {minor}", error.what))
    return pythons


def _version(python: Path) -> str:
    """Full version of an interpreter that ``./run`` can make its tools with; empty where it can't."""
    code = "import ensurepip, sys, venv; print(*sys.version_info[:3])"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    version = tuple(int(part) for part in answer.split())
    return _text(version) if version >= _OLDEST_PYTHON else ""


def _text(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def run(planned: Sequence[Step], root: Path) -> list[Result]:
    """Run the steps until one fails; returns a result for each."""
    results = [Result(step) for step in planned]
    for result in results:
        step = result.step
        if step.absent:
            continue
        say(Text(f"== {step.name}", "bold"))
        with tempfile.TemporaryDirectory() as scratch:
            summary = Path(scratch, "summary.json")
            environment = {**os.environ, **step.environment, "SSM_FORGE_TEST_SUMMARY": str(summary)}
            started = time.monotonic()
            result.returncode = subprocess.run(step.command, cwd=root, env=environment, check=False).returncode
            result.seconds = time.monotonic() - started
            if summary.exists():
                counts = json.loads(summary.read_text(encoding="utf-8"))
                result.skips = [(test, reason) for test, reason in counts.pop("skips")]
                result.counts = counts
        if result.returncode:
            say(Text.assemble((f"{step.name} failed", "red"), f" ({' '.join(step.command)})"))
            break
    return results


def show(results: Sequence[Result], tier: str) -> None:
    """What each step took and gave, what was not run and why; the last line has the sums."""
    table = FoldingTable("step", "took", "passed", "failed", "not run", title=f"tier: {tier}")
    passed = failed = skipped = 0
    for result in results:
        bad = sum(result.counts.get(kind, 0) for kind in ("failed", "error", "xpassed"))
        bad = max(bad, int(result.returncode != 0))
        good = result.counts.get("passed", 0) if result.counts else int(result.seconds is not None and not bad)
        passed, failed, skipped = passed + good, failed + bad, skipped + len(result.skips)
        took = "not run" if result.seconds is None else human_seconds(result.seconds)
        table.add_row(result.step.name, took, str(good), str(bad), str(len(result.skips)))
    out.print(table)
    for reason in sorted({reason for result in results for _, reason in result.skips}):
        tests = sorted({test for result in results for test, why in result.skips if why == reason})
        more = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
        out.print(f"not run: {tests[0]}{more}: {reason}", markup=False)
    for result in results:
        if result.seconds is None:
            why = result.step.absent or "a step before it failed"
            out.print(f"not run: {result.step.name}: {why}", markup=False)
    total = sum(result.seconds or 0 for result in results)
    out.print(f"{human_seconds(total)} in all")
    out.print(f"{passed} passed, {failed} failed, {skipped} skipped")
