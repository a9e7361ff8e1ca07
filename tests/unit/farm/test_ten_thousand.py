"""A channel of 10,000 packages: every kind of housekeeping, and a solve, grow no faster than the channel does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.slow, pytest.mark.timeout(3000)]

_PROGRAM = Path(__file__).with_name("large_channel.py")
_TASKS = ("index", "check", "add", "solve", "prune")
Figures = dict[str, float]


def figures(folder: Path, count: int) -> dict[str, Figures]:
    """What each task takes on a channel of its own; each is a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3] / "scripts"),
        "SSM_FORGE_CACHE_DIR": str(folder / "cache"),
    }

    def run(task: str) -> str:
        command = [sys.executable, _PROGRAM, task, folder / "channel", str(count)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    run("make")
    found: dict[str, Figures] = {task: json.loads(run(task).splitlines()[-1]) for task in _TASKS}
    print(count, json.dumps(found))
    return found


def test_nothing_grows_faster_than_the_channel(tmp_path: Path) -> None:
    times = 4
    few, many = (figures(tmp_path / str(count), count) for count in (10_000 // times, 10_000))
    assert many["check"]["packages"] == 10_000
    assert many["prune"]["packages"] == times * few["prune"]["packages"] == 5_000
    # A client reads the shards of what it asks for, however many others there are.
    assert many["solve"]["requests"] == few["solve"]["requests"]
    for task in _TASKS:
        for figure in ("calls", "memory", "bytes"):
            assert many[task].get(figure, 0) <= times * 1.1 * few[task].get(figure, 0), (task, figure)
        # The engine's part is no Python: growing with the square it would take 16 times as long.
        assert many[task]["cpu"] <= 2 * times * few[task]["cpu"], task
