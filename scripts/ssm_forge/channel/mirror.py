"""A copy of a channel in a folder: each package and statement compared with what the index says of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from ssm_forge.base import files
from ssm_forge.base.errors import IntegrityError, NetworkError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.ui import step_progress
from ssm_forge.base.web import TransientError, retrying
from ssm_forge.channel import folder as channels
from ssm_forge.channel.index import IndexRecord
from ssm_forge.channel.source import ChannelSource, records
from ssm_forge.package.read import FILENAME, inspect


class Mirrored(NamedTuple):
    """How many packages (or wheels) were copied, and how many were in the target already."""

    copied: int
    present: int


def mirror(source: ChannelSource, target: Path, *, only: Sequence[str] = (), log: Callable[[str], None]) -> Mirrored:
    """Copy a channel's packages and their statements into a folder, each compared with the index's hash.

    Args:
        only: file name patterns; all packages when empty.

    Raises:
        IntegrityError: when the source's bytes are not what its index says, or ``target`` has another file of
            the same name. What was copied before stays, listed.
        MachineError: when the disk is full.
    """
    copied = present = 0
    in_use = channels.receiving(target)
    selected = {
        (subdir, name): record
        for subdir in source.subdirs()
        for name, record in records(source, subdir).items()
        if not only or any(fnmatch(name, pattern) for pattern in only)
    }
    try:
        with step_progress() as progress:
            task = progress.add_task("copying packages", total=len(selected))
            for (subdir, name), record in selected.items():
                new = _copy_package(source, target, subdir, name, record, log)
                _copy_statement(source, target, subdir, name, record.attestations_sha256)
                log(f"{subdir}/{name}: {'copied' if new else 'was there'}")
                copied, present = copied + new, present + (not new)
                progress.advance(task)
    except OSError as error:
        raise channels.full(target, error) from error
    finally:
        in_use.close()
        channels.ensure_indexed(target)
    return Mirrored(copied, present)


def _copy_package(
    source: ChannelSource, target: Path, subdir: str, name: str, record: IndexRecord, log: Callable[[str], None]
) -> bool:

    if not FILENAME.fullmatch(name):
        raise IntegrityError(f"{source.name} lists '{name}', which is no name of a package; it was not copied.")
    sha256 = record.sha256
    if sha256 is None:
        raise IntegrityError(f"{source.name} lists {name} without a sha256; it was not copied.")
    file = target / subdir / name
    if file.exists():
        if sha256_of(file) != sha256:
            raise channels.different(name, str(target))
        return False
    partial = target / ".uploads" / f"{sha256}.part"
    adopted = partial.exists()
    download(source, f"{subdir}/{name}", partial, log)
    received = sha256_of(partial)
    if received != sha256 and adopted:
        # What an earlier run left may be what is wrong, not the source.
        partial.unlink()
        download(source, f"{subdir}/{name}", partial, log)
        received = sha256_of(partial)
    if received != sha256:
        partial.unlink()
        raise IntegrityError(
            f"{source.name}/{subdir}/{name} has sha256 {received}, but is listed with {sha256}; it was not copied.",
            fix=f"See what else is wrong with 'channel check {source.name}'.",
        )
    try:
        inspect(partial, filename=name)
    except IntegrityError:
        partial.unlink()
        raise
    with channels.locked(target):
        return channels.place(target, partial, subdir, name, sha256)


def download(source: ChannelSource, path: str, partial: Path, log: Callable[[str], None] = lambda line: None) -> None:
    """Download a channel's file into ``partial``, which is whole afterwards; what an earlier run left is gone on with.

    Raises:
        NetworkError: when the file can't be had, after some attempts.
        IntegrityError: when the source lists the file and does not have it.
    """

    def attempt() -> None:
        try:
            _append(source, path, partial)
        except TransientError:
            raise
        except NetworkError:
            if not partial.exists():
                raise
            partial.unlink()  # What was there did not fit; from the start, then.
            _append(source, path, partial)

    retrying(attempt, log)


def _append(source: ChannelSource, path: str, partial: Path) -> None:
    chunks = source.chunks(path, partial.stat().st_size if partial.exists() else 0)
    if chunks is None:
        raise IntegrityError(f"{source.name} lists {path}, but does not have it.")
    with partial.open("ab") as stream:
        for chunk in chunks:
            stream.write(chunk)


def _copy_statement(source: ChannelSource, target: Path, subdir: str, name: str, digest: object) -> None:
    if not isinstance(digest, str):
        return
    data = source.read(f"{subdir}/{name}.sigs.{digest}")
    if data is None or hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError(f"{source.name}: the signed statement of {name} is missing or changed.")
    files.write_whole(target / subdir / f"{name}.sigs.{digest}", data)
    files.write_whole(target / subdir / f"{name}.sigs", data)
