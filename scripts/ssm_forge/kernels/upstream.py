"""Upstream's own tests from the sdists, run against the installed packages, reported test by test."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ssm_forge.kernels.checks import FAIL, NOT_RUN, PASS, Check
from ssm_forge.kernels.sequences import zipped

GRACE_SECONDS = 10.0
# Test files at the same time: what takes long is Triton compiling on one core each.
PROCESSES = 4
STATUS = {"failure": FAIL, "error": FAIL, "skipped": NOT_RUN}


@dataclass(frozen=True)
class Result:
    """One test of upstream's.

    Attributes:
        name: ``file::function[parameters]``.
        status: ``pass``, ``fail`` or ``not-run`` (skipped).
        message: of a failure or a skip, its first line.
    """

    name: str
    status: str
    seconds: float
    message: str = ""

    @property
    def function(self) -> str:
        """The name without parameters."""
        return self.name.partition("[")[0]


def missing() -> str:
    """Why the tests can't run; empty when they can."""
    return "" if importlib.util.find_spec("pytest") else "pytest is not installed in this Python"


def read_junit(path: Path) -> list[Result]:
    """The result of every test in a junit file."""
    results = []
    for case in ET.parse(path).iter("testcase"):
        status, message = PASS, ""
        for child in case:
            if child.tag in STATUS:
                status = STATUS[child.tag]
                message = (child.get("message") or "").strip().partition("\n")[0][:300]
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        results.append(Result(name, status, float(case.get("time", 0)), message))
    return results


class Run(NamedTuple):
    """Results of a run, and what kept it from ending well (empty when nothing did)."""

    results: list[Result]
    problem: str


def run(tests: Path, *, limit: float | None = None, select: str = "") -> Run:
    """Run every test under a folder, or of one file, in a process of its own.

    Args:
        tests: the ``tests`` folder of an unpacked sdist, or a file in it.
        limit: seconds; then pytest is interrupted, and what ran until then is reported.
        select: pytest's ``-k``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch) / "junit.xml"
        # Started elsewhere and by import mode: the sdist's own source must not hide the installed packages.
        command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
        command += ["-m", "pytest", "-q", "--tb=short", "--import-mode=importlib", "-p", "no:cacheprovider"]
        command += [f"--junitxml={junit}", f"--rootdir={tests if tests.is_dir() else tests.parent}"]
        command += ["-c", os.devnull, str(tests)]
        if select:
            command += ["-k", select]
        # Plugins that happen to be installed are none of upstream's business.
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        process = subprocess.Popen(
            command, cwd=scratch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        problem = ""
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            problem = f"interrupted after {limit:.0f} s"
            process.send_signal(signal.SIGINT)
            try:
                output, _ = process.communicate(timeout=GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
        if not junit.is_file():
            last = (output.strip().splitlines() or ["no output"])[-1]
            return Run([], f"{problem or 'pytest did not finish'} ({last})")
        # 0 all passed, 1 some failed, 2 interrupted by us; 5 none collected.
        if process.returncode not in (0, 1) and not problem:
            problem = f"pytest ended with status {process.returncode}"
        return Run(read_junit(junit), problem)


def summarize(project: str, results: list[Result], problem: str, seconds: float) -> list[Check]:
    """One check a test function, so that thousands of parameters stay readable."""
    by_function: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_function[result.function].append(result)
    checks = []
    for function, group in by_function.items():
        counts = Counter(r.status for r in group)
        bad = [r for r in group if r.status == FAIL]
        detail = ", ".join(f"{counts[s]} {w}" for s, w in ((PASS, "passed"), (FAIL, "failed")) if counts[s])
        if counts[NOT_RUN]:
            reasons = Counter(r.message for r in group if r.status == NOT_RUN)
            detail += f"{', ' if detail else ''}{counts[NOT_RUN]} skipped ({reasons.most_common(1)[0][0]})"
        if bad:
            detail += f"; first failure: {bad[0].name}: {bad[0].message}"
        status = FAIL if bad else PASS if counts[PASS] else NOT_RUN
        seconds_of_group = sum(r.seconds for r in group)
        checks.append(Check(f"{project} {function}", status, detail, len(group), seconds=seconds_of_group))
    if problem or not results:
        status = NOT_RUN if "interrupted after" in problem else FAIL
        checks.append(Check(f"{project} complete run", status, problem or "no tests found", seconds=seconds))
    return checks


def run_projects(
    folders: dict[str, Path], *, limit: float | None = None, select: str = ""
) -> tuple[list[Check], dict[str, list[Result]]]:
    """Run several projects' tests within one limit, some files at a time: checks, and project -> results.

    Args:
        folders: project -> its ``tests`` folder.
        limit: seconds for all of them together.
        select: pytest's ``-k``.
    """
    checks: list[Check] = []
    by_project: dict[str, list[Result]] = {project: [] for project in folders}
    deadline = None if limit is None else time.monotonic() + limit

    def run_file(file: Path) -> tuple[list[Result], str, float]:
        started = time.monotonic()
        seconds_left = None if deadline is None else max(1.0, deadline - started)
        return *run(file, limit=seconds_left, select=select), time.monotonic() - started

    # A folder without test files is pytest's to report.
    files = [(p, file) for p, folder in folders.items() for file in sorted(folder.rglob("test_*.py")) or [folder]]
    with ThreadPoolExecutor(PROCESSES) as pool:
        for (project, file), outcome in zipped(files, pool.map(run_file, [file for _, file in files])):
            results, problem, seconds = outcome
            by_project[project] += results
            checks += summarize(project, results, f"{file.name}: {problem}" if problem else "", seconds)
    return checks, by_project
