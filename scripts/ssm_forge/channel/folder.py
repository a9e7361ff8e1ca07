"""A channel in a folder: look-up, atomic addition, index.

Whoever reads the folder, directly or through a server, sees the state before a change or the state after it:
a file is renamed into place before the index names it, each index file is replaced as a whole (the engine
writes to a temporary name and renames), and one writer works at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from ssm_forge.base import locks, owners, platforms
from ssm_forge.base.errors import IntegrityError, MachineError
from ssm_forge.base.files import flush, sha256_of, write_whole
from ssm_forge.base.paths import launcher
from ssm_forge.base.platforms import LINUX_64, PLATFORMS
from ssm_forge.channel import index as repodata
from ssm_forge.package.read import SUBDIRS
from ssm_forge.package.write import read_json

UPLOADS = ".uploads"

# Held by whoever receives files for the channel: its server, a mirror.
_IN_USE = ".in-use"
_FIX_WITHOUT_LOCKS = "set SSM_FORGE_CHANNEL to a folder on another file system"
_UPLOADS_KEPT_SECONDS = 7 * 86_400

# Where the engine writes what it then renames into place.
_ENGINES_OWN = ".tmp"

# Names a package while it gets its place: the index may then describe the file that had the same name before.
PENDING = ".pending"

# Index files in the order in which the engine replaces them; the last one is ours.
INDEX_FILES = ("repodata.json.zst", "repodata.json", "repodata_shards.msgpack.zst", "run_exports.json")


def _always() -> str:
    """The folder that a channel has whether or not a package is in it: that of this machine's packages."""
    return (platforms.known_here() or LINUX_64).subdir


def find(channel: Path, filename: str) -> Path | None:
    """The path of a package file of this name, of any platform; None when the channel does not hold it.

    No two platforms have packages of one name: a hash in it is of the platform, too.
    """
    paths = (channel / known.subdir / filename for known in PLATFORMS)
    return next((path for path in paths if path.exists()), None)


def records(channel: Path, subdir: str = LINUX_64.subdir, needed: Sequence[str] = ()) -> repodata.Records:
    """What the index lists: file name -> record; ``needed`` names fields that every record must have.

    Raises:
        DamagedIndexError: when it is no index.
    """
    index = channel / subdir / "repodata.json"
    return repodata.records(index.read_bytes(), str(index), needed) if index.exists() else {}


def record(channel: Path, subdir: str, filename: str) -> repodata.IndexRecord | None:
    """What the index says of a file; None when it does not list it, or can't be read: indexing mends both."""
    try:
        return records(channel, subdir).get(filename)
    except repodata.DamagedIndexError:
        return None


def listed(channel: Path) -> set[str]:
    """File names that the channel's index lists, of every platform."""
    return {name for known in PLATFORMS for name in records(channel, known.subdir)}


def subdirs(channel: Path) -> list[str]:
    """The platforms that the channel has a folder for, sorted."""
    return sorted(path.name for path in channel.iterdir() if path.name in SUBDIRS) if channel.is_dir() else []


def add(channel: Path, package: Path) -> Path:
    """Move a finished package into the channel and bring the index in step; the package's new path comes out.

    A run killed in between leaves a whole file that :func:`ensure_indexed` lists.
    """
    subdir = str(read_json(package, "index.json")["subdir"])
    folder = channel / subdir
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / package.name
    partial = folder / f".{package.name}.part"
    with locked(channel):
        # Only where the index may tell of an earlier file of that name are all packages read anew.
        stale = (channel / PENDING).exists() or target.exists() or record(channel, subdir, package.name) is not None
        # Copied, not renamed: packages are built in the cache, which may be on another disk.
        shutil.copyfile(package, partial)
        (channel / PENDING).write_text(f"{package.name}\n", encoding="utf-8")
        partial.replace(target)
        index(channel, force=stale)
        (channel / PENDING).unlink()
    package.unlink()
    return target


def place(channel: Path, partial: Path, subdir: str, filename: str, sha256: str) -> bool:
    """Give a finished file its name in the channel, never replacing another one. The caller holds the lock.

    Args:
        partial: the file, on the channel's own file system; it is gone afterwards.

    Returns:
        Whether it is new; False when the very same file was there.

    Raises:
        IntegrityError: when a different file has that name.
    """

    folder = channel / subdir
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / filename
    flush(partial)
    try:
        os.link(partial, target)
    except FileExistsError:
        if target.is_symlink() or sha256_of(target) != sha256:
            raise different(filename, str(channel)) from None
        return False
    finally:
        partial.unlink()
    flush(folder)
    return True


def place_sidecar(channel: Path, subdir: str, package: str, data: bytes) -> bool:
    """Store a package's signed statements beside it, named in the index; whether they are new comes out.

    The caller holds the lock.

    The engine's layout: ``NAME.conda.sigs.SHA256`` never changes and is what the index refers to;
    ``NAME.conda.sigs`` is the newest one.
    """
    digest = hashlib.sha256(data).hexdigest()
    folder = channel / subdir
    indexed = record(channel, subdir, package)
    fresh = indexed is None or indexed.attestations_sha256 != digest
    write_whole(folder / f"{package}.sigs.{digest}", data)
    write_whole(folder / f"{package}.sigs", data)
    if fresh:
        index(channel)
    return fresh


def different(filename: str, channel_name: str) -> IntegrityError:
    """The error that refuses to replace a package: whoever has it in a lock or a cache counts on its bytes."""
    return IntegrityError(
        f"{channel_name} has a different file under the name {filename}; it was not replaced.",
        fix="Raise the build number in the recipe and build again.",
    )


def copy(source: Path, target: Path, advance: Callable[[int], object]) -> None:
    """Copy a file, and call ``advance`` with the number of bytes of each chunk that was written."""
    with source.open("rb") as old, target.open("wb") as new:
        while chunk := old.read(1 << 20):
            new.write(chunk)
            advance(len(chunk))


def ensure_indexed(channel: Path) -> None:
    """Make the index list exactly the files that are there; a damaged one is written anew from them."""
    (channel / _always()).mkdir(parents=True, exist_ok=True)
    stale = (channel / PENDING).exists()
    try:
        behind = stale or not in_step(channel)
    except repodata.DamagedIndexError:
        behind = stale = True
    if behind:
        with locked(channel):
            index(channel, force=stale)
            (channel / PENDING).unlink(missing_ok=True)


def in_step(channel: Path) -> bool:
    """Whether the index, in all its forms, lists exactly the files that are there, with the statements they have.

    Raises:
        DamagedIndexError: when a form of it can't be read.
    """
    if not (channel / "noarch" / "repodata.json").exists():
        return False
    for subdir in {*subdirs(channel), _always()}:
        folder = channel / subdir
        digests_beside = {path.name: _alias_digest(path) for path in folder.glob("*.conda")}
        listed = records(channel, subdir)
        digests_listed = {name: record.attestations_sha256 for name, record in listed.items()}
        if digests_beside != digests_listed or not all((folder / name).exists() for name in INDEX_FILES):
            return False
        # Not what is in the shards: that needs msgpack, which pixi's environment may lack.
        shards = folder / "repodata_shards.msgpack.zst"
        repodata.decompress(shards.read_bytes(), str(shards))
        if differing_forms(partial(_read, folder), str(folder), listed, exact=True):
            return False
    return True


def _read(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def differing_forms(
    read: Callable[[str], bytes | None], folder: str, listed: repodata.Records, *, exact: bool
) -> dict[str, str]:
    """Which of ``repodata.json.zst`` and ``run_exports.json`` say something else than ``repodata.json``, and how.

    Args:
        read: gives the bytes of an index file; None when there is none.
        folder: where the files are, for messages.
        listed: what ``repodata.json`` lists.
        exact: all forms must be there, and say the same of run exports: what this project writes. A hosted channel may
            have the run exports elsewhere than in ``repodata.json``, or less.
    """

    def packed_agrees(data: bytes) -> bool:
        return repodata.decompress(data, f"{folder}/repodata.json.zst") == read("repodata.json")

    def exports_agree(data: bytes) -> bool:
        published = repodata.published_exports(data, f"{folder}/run_exports.json")
        return published == repodata.exports_of(listed) if exact else set(published) == set(listed)

    reasons = {}
    for name, agrees in (("repodata.json.zst", packed_agrees), ("run_exports.json", exports_agree)):
        data = read(name)
        try:
            if data is None:
                reasons.update({name: "is missing"} if exact else {})
            elif not agrees(data):
                reasons[name] = "differs from repodata.json"
        except repodata.DamagedIndexError as error:
            reasons[name] = error.reason
    return reasons


def _alias_digest(package: Path) -> str | None:
    sidecar = package.with_name(f"{package.name}.sigs")
    return sha256_of(sidecar) if sidecar.exists() else None


def index(channel: Path, *, force: bool = False) -> None:
    """Write repodata.json, .zst, shards and run_exports.json of the packages that a channel's folder holds.

    Args:
        force: read every package anew, not only those that the index does not list yet.

    Raises:
        MachineError: when the disk is full; the index is then what it was.
        IntegrityError: when a package in the channel can't be read.
    """
    from rattler.index import index_fs

    for name in ("noarch", _always()):
        (channel / name).mkdir(parents=True, exist_ok=True)
    for leftover in (channel / _ENGINES_OWN).glob("*"):
        leftover.unlink(missing_ok=True)  # Whoever indexes has the channel's lock, so who made it was killed.
    try:
        asyncio.run(index_fs(channel, write_zst=True, write_shards=True, force=force))
        for subdir in subdirs(channel):
            _write_run_exports(channel / subdir)
    except OSError as error:
        raise full(channel, error) from error
    except Exception as error:
        # The engine has one nameless error for everything: a full disk, a broken package, a lost race.
        if "No space left" in str(error) or "os error 27" in str(error):
            raise full(channel, OSError(errno.ENOSPC, "No space left on device")) from error
        raise IntegrityError(
            f"the index of {channel} could not be written: {error}",
            fix=f"'{launcher()} channel check --repair {shlex.quote(str(channel))}' sets aside what is damaged.",
        ) from error


def full(channel: Path, error: OSError) -> MachineError:
    """The error to raise for a disk that takes no more; ``error`` is what the system said."""
    return MachineError(
        f"{channel} can't be written ({error.strerror}); what was there is unchanged.",
        fix="Free space or correct the rights, and run the same command again.",
    )


def _write_run_exports(folder: Path) -> None:
    index_file = folder / "repodata.json"
    if index_file.exists():
        content = repodata.document(index_file.read_bytes(), str(index_file))
        write_whole(folder / "run_exports.json", repodata.run_exports(content))


def receiving(channel: Path) -> IO[str]:
    """Say that unfinished files of the channel are in use, for as long as the stream that comes out stays open."""
    folder = channel / UPLOADS
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / _IN_USE).open("w+")  # NFS wants the right to read for a shared lock.
    locks.acquire(stream, _FIX_WITHOUT_LOCKS, shared=True)
    return stream


def unfinished(channel: Path) -> list[Path]:
    """Uploads that nobody will go on with: those of a week ago, and all of them where nothing receives files."""
    in_use = _is_receiving(channel)
    paths = []
    for path in sorted([*(channel / UPLOADS).glob("*.part"), *(channel / UPLOADS).glob("*.lock")]):
        with contextlib.suppress(FileNotFoundError):  # It was finished in between.
            if not in_use or time.time() - path.stat().st_mtime > _UPLOADS_KEPT_SECONDS:
                paths.append(path)
    return paths


def sweep_staging(channel: Path) -> None:
    """Remove the folders that killed runs of prune left. The caller holds the lock, so no prune is running."""
    for old in channel.glob(".prune-*"):
        if not owners.others_work(old.name):
            shutil.rmtree(old)


def _is_receiving(channel: Path) -> bool:
    """Whether a server has the channel open; where that can't be known, it may."""
    try:
        with (channel / UPLOADS / _IN_USE).open("r+") as stream:
            return locks.acquire(stream, wait=False) is not True
    except FileNotFoundError:
        return False
    except PermissionError:
        return True


@contextmanager
def locked(channel: Path) -> Iterator[None]:
    """Hold the channel's lock for as long as the context lasts: one writer at a time; a second one waits."""
    channel.mkdir(parents=True, exist_ok=True)
    with locks.held(channel / ".lock", _FIX_WITHOUT_LOCKS):
        yield


def channel_urls(folders: Sequence[Path]) -> tuple[str, ...]:
    """Folders as the engine takes them: ``file://`` URLs, in their order."""
    return tuple(folder.resolve().as_uri() for folder in folders)
