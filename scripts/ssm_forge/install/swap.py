"""A new environment takes the place of an old one whole, or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssm_forge.base import locks, owners
from ssm_forge.install.marker import UNFINISHED, check_target

_DISCARD_SECONDS = 10


@contextmanager
def replacing(prefix: Path) -> Iterator[None]:
    """Make a prefix in its final place: the one that was there is set aside, and comes back on any failure.

    The caller holds the prefix's lock: what other runs have set aside or begun here is taken for a killed one's.

    Raises:
        InstallError: when something else than an environment is there; it is left alone.
    """
    check_target(prefix)
    aside = prefix.with_name(f".{prefix.name}.old-{owners.mark()}")
    if (prefix / UNFINISHED).exists():
        shutil.rmtree(prefix)
    sweep(prefix)
    if prefix.exists():
        prefix.rename(aside)
    try:
        (prefix / UNFINISHED).parent.mkdir(parents=True)
        (prefix / UNFINISHED).touch()
        yield
        (prefix / UNFINISHED).unlink()
    except BaseException:
        discard(prefix)
        if aside.exists():
            aside.rename(prefix)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def discard(unfinished: Path) -> None:
    """Remove a prefix that could not be finished, and see that it stays away.

    When one package fails, the engine's threads go on with those that they have begun, and make folders anew.
    """
    deadline = time.monotonic() + _DISCARD_SECONDS
    absent = 0
    while absent < 3 and time.monotonic() < deadline:
        if unfinished.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            absent = 0
        else:
            absent += 1
        time.sleep(0.05)


def swap(fresh: Path, prefix: Path) -> None:
    """Rename ``fresh`` to ``prefix`` and remove what was there, which comes back where that fails.

    Raises:
        OSError: when ``fresh`` can't be renamed.
    """
    old = prefix.with_name(f".{prefix.name}.old-{owners.mark()}")
    if prefix.exists():
        prefix.rename(old)
    try:
        fresh.rename(prefix)
    except OSError:
        if old.exists():
            old.rename(prefix)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sweep(prefix: Path) -> None:
    """Remove what killed runs left beside a prefix; bring back the old one if a run died between the two renames."""
    leftovers = [*prefix.parent.glob(f".{prefix.name}.new-*"), *prefix.parent.glob(f".{prefix.name}.old-*")]
    for leftover in leftovers:
        if owners.others_work(leftover.name):
            continue
        if ".old-" in leftover.name and not prefix.exists():
            leftover.rename(prefix)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def locked(prefix: Path) -> Iterator[None]:
    """Hold the lock of a prefix, whose parent folder is made: one run at a time changes it, and a second one waits."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lock = prefix.with_name(f".{prefix.name}.lock")
    with locks.held(lock, "name a --prefix on another file system", what=str(prefix)):
        yield
