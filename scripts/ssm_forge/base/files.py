"""Files that are written whole or not at all, that are on the disk when we say so, and their sha256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssm_forge.base import owners

_CHUNK_BYTES = 1 << 20


def flush(path: Path) -> None:
    """Have a file or folder on the disk before anything refers to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write a file to, which takes the place of ``path`` at the end; of a failure nothing stays."""
    partial = path.with_name(f".{path.name}.{owners.mark()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, and on the disk; an unchanged one is left alone."""
    if path.exists() and path.read_bytes() == data:
        return
    with replacing(path) as partial:
        partial.write_bytes(data)
        flush(partial)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
