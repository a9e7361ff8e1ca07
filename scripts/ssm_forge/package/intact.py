"""Package files: whole, and the very bytes that an index or a lock names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rattler import RepoDataRecord

from ssm_forge.base.errors import IntegrityError

CHUNK_BYTES = 1 << 20


_DIGESTS: dict[str, Any] = {"sha256": hashlib.sha256, "md5": hashlib.md5}


def require_intact(record: RepoDataRecord, path: Path) -> None:
    """Compare a file with the lock.

    Raises:
        IntegrityError: when it is missing, or not the locked bytes; names what was expected and found.
    """
    algorithm, expected = digest(record)
    if not algorithm:
        raise IntegrityError(f"the lock has no hash of {record.file_name}, so it can't be trusted.")
    try:
        actual = file_digest(path, algorithm)
    except OSError as error:
        raise IntegrityError(f"{path} can't be read ({error.strerror}); {record.file_name} is locked.") from error
    if actual != expected:
        raise IntegrityError(
            f"{path} is not the locked package: {algorithm} {expected} is locked, {actual} was found. "
            "Nothing was installed.",
            fix="Replace the file, or leave the mirror out.",
        )


def require_all_intact(files: Sequence[tuple[RepoDataRecord, Path]]) -> None:
    """:func:`require_intact` for many files, on all cores; the first problem by name is raised."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda item: require_intact(*item), files))


def file_digest(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file: ``sha256``, or ``md5`` for what a channel publishes no better hash of."""
    state = _DIGESTS[algorithm]()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            state.update(chunk)
    return str(state.hexdigest())


class Digest(NamedTuple):
    """A hash of a file: ``sha256`` or ``md5``, and its hexadecimal digits; both empty where none is known."""

    algorithm: str
    value: str


def digest(record: RepoDataRecord) -> Digest:
    """The strongest published hash of a package."""
    if record.sha256:
        return Digest("sha256", bytes(record.sha256).hex())
    if record.md5:
        return Digest("md5", bytes(record.md5).hex())
    return Digest("", "")
