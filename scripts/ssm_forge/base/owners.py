"""Whose an unfinished file or folder is: several machines and containers may share the place that it is in.

A process number alone says nothing there: every container has its own, and "no such process here" is what another
machine's living process looks like too.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import time
from pathlib import Path

# What no process of this machine made, and none writes to any more.
_FORGOTTEN_SECONDS = 7 * 86_400

_MARK = re.compile(r"(?P<machine>[0-9a-f]{12})-(?P<pid>\d+)-(?P<started>\d+)(?=\.|$)")


def mark(pid: int | None = None) -> str:
    """A part of a name that no other process has: not one of another machine, and not one of an earlier time."""
    pid = os.getpid() if pid is None else pid
    return f"{_machine()}-{pid}-{_started(pid) or 0}"


def gone(name: str) -> bool | None:
    """Whether the process that a name is marked with has ended; None where this machine can't know."""
    owner = _MARK.search(name)
    if owner is None or owner["machine"] != _machine():
        return None
    return _started(int(owner["pid"])) != int(owner["started"])


def others_work(name: str) -> bool:
    """Whether another process of this machine is at work on it.

    Asked even by whoever holds the lock of a place: where the file system has no locks, that is nobody's word.
    """
    return gone(name) is False and mark() not in name


def is_marked(name: str) -> bool:
    """Whether a name says whose it is; older versions of ssm-forge wrote a process number only."""
    return _MARK.search(name) is not None


def forgotten(path: Path) -> bool:
    """Whether nothing has happened there for so long that no process can be at work on it, on any machine."""
    try:
        return time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS
    except FileNotFoundError:
        return False


@functools.cache
def _machine() -> str:
    """This boot of this machine, and this container of it: where a process number means one process."""
    try:
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        parts = [platform.node()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since the boot, which no clock that is set changes; None without one.

    One that has ended and that its parent has not asked after is none: in a container, nobody may ever ask.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field, the name, may hold anything; the state is the third, the start the 22nd.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
