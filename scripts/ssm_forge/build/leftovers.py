"""What builds of killed runs leave behind: stopped and removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import psutil

from ssm_forge.base import owners
from ssm_forge.base.paths import Workspace


def sweep(workspace: Workspace) -> None:
    """Stop and remove what builds of killed runs left behind; those of other machines and containers go on."""
    folder = staging_folder(workspace)
    if not folder.exists():
        return
    for staging in folder.iterdir():
        ended = owners.gone(staging.name)
        group = staging / "worker.pgid"
        if ended and group.exists() and group.read_text().isdigit():
            _kill_leftover(int(group.read_text()), staging)
        if ended or (ended is None and owners.forgotten(staging)):
            shutil.rmtree(staging, ignore_errors=True)


def _kill_leftover(group: int, staging: Path) -> None:
    """Stop a worker's processes, unless the number belongs to someone else by now."""
    try:
        is_ours = str(staging / "spec.json") in psutil.Process(group).cmdline()
    except psutil.NoSuchProcess:
        is_ours = True  # As long as one of its processes is left, a session's number is not used again.
    except psutil.Error:
        is_ours = False
    if is_ours:
        kill_session(group)


def staging_folder(workspace: Workspace) -> Path:
    """The folder in which each build has one of its own while it runs."""
    return workspace.cache / "build"


def kill_session(leader: int) -> None:
    """Stop every process of the session that a worker leads: ninja puts each compiler in a group of its own."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        members = [pid for pid in psutil.pids() if _session(pid) == leader]
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)
        if not members:
            return
        time.sleep(0.2)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0
