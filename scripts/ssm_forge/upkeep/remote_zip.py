"""Single files out of wheels on a server, without downloading the wheels (HTTP range requests)."""

from __future__ import annotations

import io
import re
import zipfile
from typing import cast

import httpx

from ssm_forge.base.errors import NetworkError
from ssm_forge.base.fetch import mirrored
from ssm_forge.base.foreign import limited
from ssm_forge.base.web import session, whole
from ssm_forge.package.write import ZIP_DAMAGE

# Read ahead this much: a zip's directory is at its end, in one piece.
_BLOCK_BYTES = 1 << 18
# Of one file in it: source text, a header.
_MOST_BYTES = 64 << 20
_LENGTH = re.compile(r"bytes [0-9]+-[0-9]+/([0-9]{1,18})")


class RemoteFile(io.RawIOBase):
    """A file on a server that answers range requests, readable and seekable."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self._url = mirrored(url)
        self._client = client
        self._position = 0
        self._start, self._block = 0, b""
        answer = self._get(0, 0)
        length = _LENGTH.fullmatch(answer.headers.get("content-range", ""))
        if length is None:
            raise NetworkError(f"{url} can't be read in parts; the server does not say how long it is.")
        self._size = int(length.group(1))

    def _get(self, first: int, last: int) -> httpx.Response:
        """Some bytes, and never more than were asked for."""
        with self._client.stream("GET", self._url, headers={"Range": f"bytes={first}-{last}"}) as answer:
            answer.raise_for_status()
            if answer.status_code != httpx.codes.PARTIAL_CONTENT:
                raise NetworkError(f"{self._url} can't be read in parts; the server ignores range requests.")
            data = whole(answer, last + 1 - first)
            return httpx.Response(206, headers={"content-range": answer.headers.get("content-range", "")}, content=data)

    def seekable(self) -> bool:
        """As of every file: it can be read from any place."""
        return True

    def readable(self) -> bool:
        """As of every file: it is there to be read."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, in bytes; nothing is asked of the server yet."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """The place where the next byte is read."""
        return self._position

    def readinto(self, buffer: object) -> int:
        """Fill the buffer from the current place, with bytes that were fetched before or are fetched now."""
        view = memoryview(cast("bytearray", buffer))
        wanted = min(len(view), self._size - self._position)
        if wanted <= 0:
            return 0
        if not self._start <= self._position < self._start + len(self._block):
            # Zip readers look at the end first, in small steps backwards.
            start = max(0, self._position - (_BLOCK_BYTES if self._size - self._position < _BLOCK_BYTES else 0))
            end = min(self._size, max(self._position + wanted, start + _BLOCK_BYTES)) - 1
            self._start, self._block = start, self._get(start, end).content
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
                with archive.open(names[0]) as member:
                    return limited(member, _MOST_BYTES)
    except (httpx.HTTPError, OSError, *ZIP_DAMAGE) as error:
        raise NetworkError(
            f"{url} could not be read ({type(error).__name__}: {error}).",
            fix="Check the network and run the same command again.",
        ) from error
