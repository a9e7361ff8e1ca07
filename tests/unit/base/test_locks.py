"""Locks, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from front_door import assert_one_line_error, run_here
from ssm_forge.base import locks, owners
from ssm_forge.bridge import assemble
from ssm_forge.channel import folder as channel
from ssm_forge.install import swap
from ssm_forge.serve.tokens import TokenStore
from ssm_forge.serve.uploads import Uploads

ROOT = Path(__file__).resolve().parents[3]


def take_prefix(folder: Path) -> None:
    with swap.locked(folder / "env"):
        pass


def take_channel(folder: Path) -> None:
    with channel.locked(folder):
        pass


def take_bridge(folder: Path) -> None:
    with assemble._locked(folder):
        pass


def add_token(folder: Path) -> None:
    TokenStore(folder / "tokens.json").add("ci", "read", 1)


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A file system without locks; returns what the user is told."""
    told: list[str] = []

    def refuse(stream: object, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "note", told.append)
    monkeypatch.setattr(locks, "_told", set())
    return told


@pytest.mark.parametrize(
    ("take", "elsewhere"),
    [
        (take_prefix, "--prefix"),
        (take_channel, "SSM_FORGE_CHANNEL"),
        (take_bridge, "SSM_FORGE_CACHE_DIR"),
        (assemble._use, "SSM_FORGE_CACHE_DIR"),
        (add_token, "--tokens"),
    ],
)
def test_work_goes_on_without_locks_and_the_user_is_told_once(
    tmp_path: Path, no_locks: list[str], take: Callable[[Path], None], elsewhere: str
) -> None:
    for attempt in ("first", "second"):
        (tmp_path / attempt).mkdir()
        take(tmp_path / attempt)
    assert len(no_locks) == 1
    assert "has no file locks" in no_locks[0]
    assert elsewhere in no_locks[0]


def test_without_locks_unfinished_uploads_may_be_a_servers(tmp_path: Path, no_locks: list[str]) -> None:
    uploads = Uploads(tmp_path, record=lambda line: None)
    part = tmp_path / channel.UPLOADS / "ab.part"
    part.touch()
    assert channel.unfinished(tmp_path) == []
    os.utime(part, (0, 0))
    assert channel.unfinished(tmp_path) == [part]
    del uploads


def test_a_server_that_receives_keeps_its_unfinished_uploads(tmp_path: Path) -> None:
    part = tmp_path / channel.UPLOADS / "ab.part"
    with channel.receiving(tmp_path):
        part.touch()
        assert channel.unfinished(tmp_path) == []
    assert channel.unfinished(tmp_path) == [part]


def test_what_a_living_run_has_begun_is_left_to_it_where_there_are_no_locks(
    tmp_path: Path, no_locks: list[str]
) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        mark = owners.mark(other.pid)
        begun = [tmp_path / f".env.{kind}-{mark}" for kind in ("new", "old")] + [tmp_path / f".prune-{mark}"]
        for folder in begun:
            folder.mkdir()
        with swap.locked(tmp_path / "env"):
            swap.sweep(tmp_path / "env")
        with channel.locked(tmp_path):
            channel.sweep_staging(tmp_path)
        assert all(folder.exists() for folder in begun)
        other.kill()
    swap.sweep(tmp_path / "env")
    channel.sweep_staging(tmp_path)
    assert [folder.exists() for folder in begun] == [False, False, False]
    assert (tmp_path / "env").exists()  # The old one, whose run died before it had put a new one there.


def test_another_refusal_is_no_missing_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stream: object, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"):
        take_channel(tmp_path)


def test_what_else_a_file_system_lacks_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> None:
        raise OSError(errno.ENOSYS, "Function not implemented", "/lustre/env")

    monkeypatch.setattr("ssm_forge.manifest.variants.load", lambda *a, **k: lacking())
    assert_one_line_error(run_here("variants"), 3, "/lustre/env", "Function not implemented", "SSM_FORGE_CACHE_DIR")


def test_nothing_takes_a_lock_past_the_one_that_knows_such_file_systems() -> None:
    # The doctor is a file of its own, and only tries whether there are locks.
    modules = [path for path in (ROOT / "scripts/ssm_forge").rglob("*.py") if path.parent.name != "doctor"]
    assert [path.name for path in modules if re.search(r"\bflock\(|lockf\(", path.read_text())] == ["locks.py"]


def test_the_front_door_makes_its_tools_without_locks(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    (copy / "scripts/ssm_forge").mkdir(parents=True)
    shutil.copy(ROOT / "run", copy)
    (copy / "scripts/requirements.lock").touch()
    (copy / "scripts/ssm_forge/__main__.py").write_text("print('the task ran')\n")
    refuses = tmp_path / "bin/flock"
    refuses.parent.mkdir()
    refuses.write_text("#!/bin/sh\necho 'flock: 9: Function not implemented' >&2\nexit 71\n")
    refuses.chmod(0o755)
    environment = {
        **os.environ,
        "SSM_FORGE_NO_PIXI": "1",
        "SSM_FORGE_PYTHON": os.path.realpath(sys.executable),
        "PATH": f"{refuses.parent}:{os.environ['PATH']}",
    }
    done = subprocess.run([copy / "run"], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == "the task ran\n", done.stderr
    assert "has no file locks" in done.stderr
