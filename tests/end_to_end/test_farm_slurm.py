"""A farm on Slurm that loses a node in the middle of a build still ends with every package, once and intact.

Alone: ``./run test -- tests/end_to_end/test_farm_slurm.py``, as root on Debian.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from slurm_cluster import Cluster, cluster
from ssm_forge.channel import check as channel_check
from ssm_forge.channel.source import FolderSource
from toy_farm import PYTHONS, Toy, toy

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

# Enough for one job of a package at a time on each of the first two; the last one is too small for any.
_NODES = {"n1": 1600, "n2": 1600, "small": 300}
_WORDS = ("--executor", "slurm", "--cores", "1", "--jobs", "4", "--", "--slurm-init-seconds-before-status-checks", "2")


def test_every_package_is_there_once_though_a_node_is_lost(tmp_path: Path) -> None:
    with toy(tmp_path / "toy") as made, cluster(tmp_path / "slurm", _NODES) as nodes:
        (made.recipes / "seconds").write_text("30")
        lost = _lose_a_node_in_mid_build(made, nodes)
        receipts = _receipts(made)
        assert len(receipts) == 2 * len(PYTHONS)
        assert {receipt["how"] for receipt in receipts} == {"built"}
        assert {receipt["host"] for receipt in receipts} <= {"n1", "n2"}, "a node with too little memory gets no job"
        # The build that was lost was begun again, and no other one.
        assert len(made.begun()) == 2 * len(PYTHONS) + 1
        assert made.begun().count(lost) == 2
        _every_package_is_whole(made)
        before = made.packages()
        again = made.run(*_WORDS, more=nodes.environment)
        assert again.returncode == 0, again.stderr
        assert made.packages() == before
        assert len(made.begun()) == 2 * len(PYTHONS) + 1, "what is there is not built again"


def _lose_a_node_in_mid_build(made: Toy, nodes: Cluster) -> str:
    """Run the farm, and kill the node of the first build; returns which one that was."""
    environment = {**made.environment, **nodes.environment}
    log = made.folder / "farm.txt"
    with log.open("w") as stream:
        farm = subprocess.Popen(
            made.command(*_WORDS),
            env=environment,
            cwd=made.folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not made.begun():
                assert farm.poll() is None, log.read_text()
                time.sleep(0.2)
            lost = made.begun()[0]
            node = next(name for name in _NODES if _builds(nodes, name))
            assert not made.packages()
            nodes.kill(node)
            (made.recipes / "seconds").write_text("1")
            while not nodes.states()[node].startswith("down"):
                assert farm.poll() is None, log.read_text()
                time.sleep(0.5)
            assert farm.wait(timeout=3000) == 0, log.read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(farm.pid, signal.SIGKILL)
    return lost


def _builds(nodes: Cluster, node: str) -> bool:
    return any("sleep" in process.name() for process in nodes.jobs_of(node))


def _receipts(made: Toy) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in sorted(made.farm.glob("receipts/package/*.json"))]


def _every_package_is_whole(made: Toy) -> None:
    problems, count = channel_check.check(FolderSource(made.channel))
    assert not problems
    assert count == 2 * len(PYTHONS)
    assert {receipt["file"] for receipt in _receipts(made)} == set(made.packages())
    assert not list(made.channel.glob("linux-64/.*")), "nothing half-written is left"
