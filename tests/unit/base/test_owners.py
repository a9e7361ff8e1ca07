"""Marks in the names of unfinished files: whose they are, also where machines and containers share a folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ssm_forge.base import files, owners


def test_a_living_process_is_known_by_its_number_and_its_start() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        mark = owners.mark(process.pid)
        assert owners.gone(f"demo-{mark}") is False
        assert owners.gone(f"torch.whl.{mark}.part") is False
        assert owners.gone(f"demo-{mark}0") is True
        process.kill()
    assert owners.gone(f"demo-{mark}") is True
    assert owners.gone(f"demo-{owners.mark()}") is False


def test_a_process_that_ended_and_was_not_asked_after_is_gone() -> None:
    """The first process of a container is often none that asks."""
    with subprocess.Popen(["sleep", "600"]) as process:
        mark = owners.mark(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{process.pid}").exists()
        assert owners.gone(f"demo-{mark}") is True


def test_of_another_machines_process_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "_machine", lambda: "0123456789ab")
    theirs = owners.mark()
    monkeypatch.undo()
    assert theirs != owners.mark()
    assert owners.gone(theirs) is None
    assert owners.gone(f"demo-{os.getpid()}") is None


def test_two_machines_with_one_process_number_write_into_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In containers small process numbers meet each other all the time."""
    written = []
    monkeypatch.setattr(Path, "replace", lambda self, target: written.append(self.name))
    for machine in ("0123456789ab", "ba9876543210"):
        monkeypatch.setattr(owners, "_machine", lambda name=machine: name)
        files.write_whole(tmp_path / "repodata.json", b"{}")
    assert len(set(written)) == 2
