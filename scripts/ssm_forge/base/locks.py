"""Locks between runs, also between machines that share a folder: flock(2), where the file system has it."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ssm_forge.base.ui import note, say

# What a file system answers that can't do what is asked: locks on Lustre without -o flock, on some NFS, some FUSE.
NOT_THERE = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})

_told: set[str] = set()


def acquire(stream: IO[Any], elsewhere: str = "", *, shared: bool = False, wait: bool = True) -> bool | None:
    """Lock an open file until it is closed.

    Where the file system has no locks, work goes on without one, and the user is told so once.

    Args:
        elsewhere: how to have the folder on another file system, as half a sentence; without it nobody is told.

    Returns:
        True with the lock, None where there are none; False when another run has it, which only happens without
        ``wait``.
    """
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        if elsewhere and elsewhere not in _told:
            _told.add(elsewhere)
            note(
                f"{stream.name} can't be locked: its file system has no file locks ({error.strerror}). Run one task at "
                f"a time there, or {elsewhere}."
            )
        return None
    return True


@contextmanager
def held(path: Path, elsewhere: str, *, what: str = "") -> Iterator[None]:
    """Hold a lock of one file, which is made where it is missing; another run that has it is waited for.

    Args:
        elsewhere: as in :func:`acquire`.
        what: what the others are at work on, where waiting may take long enough to be said.
    """
    with path.open("w") as stream:
        if acquire(stream, elsewhere, wait=not what) is False:
            say(f"Another run is at work on {what}; waiting for it to end.")
            acquire(stream)
        yield
