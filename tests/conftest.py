"""What holds for every test: logs go to a folder of the test run's own, and no skip goes unseen.

Also loaded by the Python of an installed environment (tests/unit/kernels), so it takes pytest and the standard library
only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from expected_skips import Skip, load, unexpected


def tier() -> str:
    """The tier that `./run test` runs: ``fast``, ``middle`` or ``all``."""
    return os.environ.get("SSM_FORGE_TEST_TIER", "fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips", action="store_true", help="fail when a test is skipped that tests/skips.toml does not expect"
    )


@pytest.fixture(scope="session", autouse=True)
def _logs_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands that fixtures of many tests start write their logs here, not into the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSM_FORGE_LOG_DIR", str(tmp_path_factory.mktemp("logs")))
        yield


@pytest.fixture(autouse=True)
def _own_logs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that a test starts write their logs to a folder of the test's own."""
    monkeypatch.setenv("SSM_FORGE_LOG_DIR", str(tmp_path_factory.mktemp("logs")))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Judge the skips, and write the counts for `./run test`; workers of a parallel run leave it to their starter."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(session.config, "workerinput") or reporter is None:
        return
    stats = reporter.stats
    skips = [Skip.of(report) for report in stats.get("skipped", ())]
    skips += [Skip(report.nodeid, f"xfail: {report.wasxfail}") for report in stats.get("xfailed", ())]
    strays = unexpected(skips, load(), tier())
    for stray in strays:
        reporter.write_line(f"not expected in tier {tier()} (tests/skips.toml): {stray.test}: {stray.reason}", red=True)
    if strays and session.config.getoption("--strict-skips") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if path := os.environ.get("SSM_FORGE_TEST_SUMMARY"):
        counts = {kind: len(stats.get(kind, ())) for kind in ("passed", "failed", "error", "xpassed")}
        summary = {**counts, "skips": [[skip.test, skip.reason] for skip in skips]}
        Path(path).write_text(json.dumps(summary), encoding="utf-8")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Undoes a random order within modules marked in_order."""
    of_module: dict[Path, list[int]] = {}
    for place, item in enumerate(items):
        if item.get_closest_marker("in_order"):
            of_module.setdefault(item.path, []).append(place)
    for places in of_module.values():
        by_line = sorted((items[place] for place in places), key=lambda item: item.location[1] or 0)
        for place, item in zip(places, by_line, strict=True):
            items[place] = item
