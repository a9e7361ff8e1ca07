"""The channel that built packages land in: look-up, atomic addition, index."""

from __future__ import annotations

import asyncio
import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUBDIR = "linux-64"

# There while a package gets its place: the index may then describe the file that had the same name before.
_PENDING = ".pending"


def find(channel: Path, filename: str) -> Path | None:
    """The package file, if the channel holds it."""
    path = channel / SUBDIR / filename
    return path if path.exists() else None


def listed(channel: Path) -> set[str]:
    """File names that the channel's index lists."""
    index = channel / SUBDIR / "repodata.json"
    if not index.exists():
        return set()
    data = json.loads(index.read_text(encoding="utf-8"))
    return {*data.get("packages", {}), *data.get("packages.conda", {})}


def add(channel: Path, package: Path) -> Path:
    """Move a finished package into the channel and bring the index in step.

    The file is renamed into place before the index names it; the index is replaced as a whole by the engine.
    A run killed in between leaves a whole file that :func:`ensure_indexed` lists.
    """
    folder = channel / SUBDIR
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / package.name
    partial = folder / f".{package.name}.part"
    with locked(channel):
        # Copied, not renamed: packages are built in the cache, which may be on another disk.
        shutil.copyfile(package, partial)
        (channel / _PENDING).touch()
        partial.replace(target)
        index(channel, force=True)
        (channel / _PENDING).unlink()
    package.unlink()
    return target


def ensure_indexed(channel: Path) -> None:
    """Make the index list exactly the files that are there."""
    folder = channel / SUBDIR
    folder.mkdir(parents=True, exist_ok=True)
    files = {path.name for path in folder.glob("*.conda")}
    pending = (channel / _PENDING).exists()
    if pending or files != listed(channel) or not (channel / "noarch" / "repodata.json").exists():
        with locked(channel):
            index(channel, force=pending)
            (channel / _PENDING).unlink(missing_ok=True)


def index(channel: Path, *, force: bool = False) -> None:
    """Write repodata.json and .zst; ``force`` reads every package anew (a file was replaced)."""
    from rattler.index import index_fs

    (channel / "noarch").mkdir(parents=True, exist_ok=True)
    asyncio.run(index_fs(channel, write_zst=True, write_shards=False, force=force))


@contextmanager
def locked(channel: Path) -> Iterator[None]:
    """One writer at a time; a second one waits."""
    channel.mkdir(parents=True, exist_ok=True)
    with (channel / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
