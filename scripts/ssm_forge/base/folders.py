"""Folders that several runs may make at once: whoever is first gives it its place, and the others use that one."""

from __future__ import annotations

import errno
from pathlib import Path


def give_place(finished: Path, target: Path) -> None:
    """Rename a finished folder to ``target``; one that is there already stays, since all that are made are the same.

    The name must say what is in the folder, or an older one would be taken for this one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        finished.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
