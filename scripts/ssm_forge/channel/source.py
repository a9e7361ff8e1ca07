"""Reading a channel, whether it is a folder or an URL: index, files, hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import httpx

from ssm_forge.base.credentials import redact, require_clean
from ssm_forge.base.errors import NetworkError, UsageError
from ssm_forge.base.foreign import MOST_BYTES, read_bytes
from ssm_forge.base.platforms import PLATFORMS
from ssm_forge.base.web import Client, whole
from ssm_forge.channel import folder as channels
from ssm_forge.channel import index as repodata

_CHUNK_BYTES = 1 << 20


class ChannelSource(Protocol):
    """A channel that can be read.

    Attributes:
        name: path or URL, fit to be shown.
    """

    name: str

    def subdirs(self) -> list[str]:
        """Platforms that it has an index for."""
        ...

    def read(self, path: str) -> bytes | None:
        """A small file, such as ``linux-64/repodata.json``; None when there is none."""
        ...

    def chunks(self, path: str, first: int = 0) -> Iterator[bytes] | None:
        """A file from byte ``first`` on; None when there is none."""
        ...


def open_source(url: str) -> ChannelSource:
    """A channel to read from, given by path or URL.

    Raises:
        UsageError: when the path or URL is no channel, or holds a secret.
        NetworkError: when the server can't be reached.
    """
    require_clean(url)
    parts = urlsplit(url)
    source: ChannelSource
    if parts.scheme in ("", "file"):
        source = FolderSource(Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute())
    elif parts.scheme in ("http", "https"):
        source = WebSource(url)
    else:
        raise UsageError(f"'{redact(url)}' is neither a folder nor an http(s) URL.")
    if not source.subdirs():
        raise UsageError(f"{source.name} is not a conda channel: it has no repodata.json for any platform.")
    return source


def records(source: ChannelSource, subdir: str, needed: Sequence[str] = ()) -> repodata.Records:
    """What the index lists: file name -> record; ``needed`` names fields that every record must have.

    Raises:
        DamagedIndexError: when it is no index.
    """
    return repodata.records(read_index(source, subdir), f"{source.name}/{subdir}/repodata.json", needed)


def read_index(source: ChannelSource, subdir: str) -> bytes:
    """The bytes of ``repodata.json``.

    Raises:
        DamagedIndexError: when there is none.
    """
    data = source.read(f"{subdir}/repodata.json")
    if data is None:
        raise repodata.DamagedIndexError(f"{source.name}/{subdir}/repodata.json", "is missing")
    return data


class Measured(NamedTuple):
    """A file's sha256 (hex) and size, compared as a tuple of both."""

    sha256: str
    size_bytes: int


def measure(source: ChannelSource, path: str) -> Measured | None:
    """Read a channel's file to its end: its sha256 and size in bytes; None when there is none."""
    chunks = source.chunks(path)
    if chunks is None:
        return None
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return Measured(digest.hexdigest(), size)


class FolderSource:
    """A channel in a folder, read as :class:`ChannelSource` says; links are no files of a channel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)

    def subdirs(self) -> list[str]:
        return [name for name in channels.subdirs(self.folder) if self._is_used(name)]

    def _is_used(self, subdir: str) -> bool:
        """Whether there is a part of an index, or a package that an index would name."""
        names = os.listdir(self.folder / subdir)  # noqa: PTH208
        return any(name in channels.INDEX_FILES or name.endswith(".conda") for name in names)

    def read(self, path: str) -> bytes | None:
        file = self.folder / path
        if file.is_symlink() or not file.is_file():
            return None
        try:
            return read_bytes(file, MOST_BYTES)
        except ValueError as error:
            raise repodata.DamagedIndexError(f"{self.name}/{path}", f"can't be read: {error}") from error

    def chunks(self, path: str, first: int = 0) -> Iterator[bytes] | None:
        file = self.folder / path
        # A link could lead anywhere; a channel consists of files.
        if file.is_symlink() or not file.is_file():
            return None
        return _read_from(file, first)


def _read_from(file: Path, first: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(first)
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


class WebSource:
    """A channel on a server, read as :class:`ChannelSource` says; its platforms are linux-64 and noarch."""

    def __init__(self, url: str) -> None:
        self._client = Client(url)
        self.name = redact(url.rstrip("/"))

    def subdirs(self) -> list[str]:
        candidates = ["noarch", *(known.subdir for known in PLATFORMS)]
        return sorted(name for name in candidates if self.read(f"{name}/repodata.json") is not None)

    def read(self, path: str) -> bytes | None:
        with self._client.stream("GET", path) as answer:
            if answer.status_code == 404:
                return None
            if answer.status_code != 200:
                raise NetworkError(f"{self.name}/{path} answered {answer.status_code}.")
            return whole(answer, MOST_BYTES)

    def chunks(self, path: str, first: int = 0) -> Iterator[bytes] | None:
        # Not asked with HEAD first: a signed address that a CDN gives out for GET refuses it.
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={first}-"} if first else {})}
        with ExitStack() as stack:
            answer = stack.enter_context(self._client.stream("GET", path, headers=headers))
            if answer.status_code == 404:
                return None
            if answer.status_code not in (200, 206):
                raise NetworkError(f"{self.name}/{path} answered {answer.status_code}.")
            if first and answer.status_code != 206:
                raise NetworkError(f"{self.name}/{path}: the server can't go on in the middle of a file.")
            return _body(answer, stack.pop_all())


def _body(answer: httpx.Response, connection: ExitStack) -> Iterator[bytes]:
    with connection:
        yield from answer.iter_bytes(_CHUNK_BYTES)


def records_at(client: Client, subdir: str) -> repodata.Records:
    """What a channel's index lists; nothing when it has no index for ``subdir`` yet.

    Raises:
        DamagedIndexError: when it is no index.
    """
    path = f"{subdir}/repodata.json"
    answer = client.send("GET", path)
    if answer.status_code == httpx.codes.NOT_FOUND:
        return {}
    if answer.status_code != httpx.codes.OK:
        raise NetworkError(redact(f"{client.url}/{path} answered {answer.status_code}."))
    return repodata.records(answer.content, redact(f"{client.url}/{path}"))
