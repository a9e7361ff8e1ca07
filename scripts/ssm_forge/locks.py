"""Locks between runs, also between machines that share a folder: flock(2), where the file system has it."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

from ssm_forge.ui import note

# Lustre without -o flock, some NFS, some FUSE.
_HAS_NONE = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})

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
        if error.errno not in _HAS_NONE:
            raise
        if elsewhere and elsewhere not in _told:
            _told.add(elsewhere)
            note(
                f"{stream.name} can't be locked: its file system has no file locks ({error.strerror}). Run one task at "
                f"a time there, or {elsewhere}."
            )
        return None
    return True
