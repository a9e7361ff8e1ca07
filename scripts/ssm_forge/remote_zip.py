"""Single files out of wheels on a server, without downloading the wheels (HTTP range requests)."""

from __future__ import annotations

import io
import zipfile
from typing import cast

import httpx

from ssm_forge.errors import NetworkError
from ssm_forge.fetch import mirrored
from ssm_forge.web import session

# Read ahead this much: a zip's directory is at its end, in one piece.
_BLOCK = 1 << 18


class RemoteFile(io.RawIOBase):
    """A file on a server that answers range requests, readable and seekable."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self._url = mirrored(url)
        self._client = client
        self._position = 0
        self._start, self._block = 0, b""
        answer = client.get(self._url, headers={"Range": "bytes=0-0"})
        answer.raise_for_status()
        if answer.status_code != httpx.codes.PARTIAL_CONTENT:
            raise NetworkError(f"{url} can't be read in parts; the server ignores range requests.")
        self._size = int(answer.headers["content-range"].rpartition("/")[2])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast("bytearray", buffer))
        wanted = min(len(view), self._size - self._position)
        if wanted <= 0:
            return 0
        if not self._start <= self._position < self._start + len(self._block):
            # Zip readers look at the end first, in small steps backwards.
            start = max(0, self._position - (_BLOCK if self._size - self._position < _BLOCK else 0))
            end = min(self._size, max(self._position + wanted, start + _BLOCK)) - 1
            answer = self._client.get(self._url, headers={"Range": f"bytes={start}-{end}"})
            answer.raise_for_status()
            self._start, self._block = start, answer.content
        begin = self._position - self._start
        part = self._block[begin : begin + wanted]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)


def read_member(url: str, suffix: str) -> bytes:
    """The one member of the zip at ``url`` whose name ends with ``suffix``.

    Raises:
        NetworkError: when the server does not answer, or the zip has no such member.
    """
    try:
        with session() as client:
            stream = io.BufferedReader(RemoteFile(url, client), buffer_size=1 << 16)
            with zipfile.ZipFile(stream) as archive:
                names = [name for name in archive.namelist() if name.endswith(suffix)]
                if len(names) != 1:
                    raise NetworkError(f"{url} has {len(names)} files named {suffix}, not one.")
                return archive.read(names[0])
    except (httpx.HTTPError, zipfile.BadZipFile) as error:
        raise NetworkError(
            f"{url} could not be read ({type(error).__name__}: {error}).",
            fix="Check the network and run the same command again.",
        ) from error
