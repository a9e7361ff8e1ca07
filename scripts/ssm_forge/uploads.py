"""The server's side of an upload: received aside, checked, then given its name and a line in the index."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ssm_forge import channel as channels
from ssm_forge import locks
from ssm_forge.errors import IntegrityError
from ssm_forge.fetch import sha256_of
from ssm_forge.foreign import json_from
from ssm_forge.inspection import inspect

MOST_BYTES = 20_000_000_000
MOST_SIDECAR_BYTES = 4 * 1024 * 1024
_BLOCK = 1 << 20


class Uploads:
    """The folder of unfinished uploads of one channel, named by the sha256 that they are to have."""

    def __init__(self, channel: Path, record: Callable[[str], None]) -> None:
        self._channel = channel
        self._folder = channel / channels.UPLOADS
        self._record = record
        # Held as long as this lives: repair and prune leave what clients go on with.
        self._in_use: object = None
        with contextlib.suppress(OSError):  # A channel that can't be written receives nothing.
            self._in_use = channels.receiving(channel)

    def received(self, sha256: str) -> int:
        """Bytes that are here of a file with this digest."""
        try:
            return self._part(sha256).stat().st_size
        except FileNotFoundError:
            return 0

    def sweep(self) -> None:
        """Forget uploads that nobody went on with for a week."""
        for path in channels.unfinished(self._channel):
            path.unlink(missing_ok=True)

    async def receive(
        self,
        body: AsyncIterable[bytes],
        subdir: str,
        filename: str,
        sha256: str,
        first: int,
        total: int,
        who: str,
    ) -> int:
        """Take the bytes from ``first`` on, and the file once it is whole.

        Returns:
            201 for a new file, 200 for one that was there.

        Raises:
            HTTPException: 409 for another file of that name or a wrong offset, 413, 423 while somebody else
                uploads the same file.
            IntegrityError: when the bytes are not what was announced, or not a package for this place.
            MachineError: when the disk is full.
        """
        most = MOST_SIDECAR_BYTES if filename.endswith(".sigs") else MOST_BYTES
        if total > most:
            raise HTTPException(413, f"{filename} would have {total} bytes; at most {most} are taken.")
        if await anyio.to_thread.run_sync(self._is_there, subdir, filename, sha256):
            return 200
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._part(sha256)
        with _alone(part):
            await self._append(body, part, first, total)
            added = await anyio.to_thread.run_sync(self._accept, part, subdir, filename, sha256)
        self._record(f"{'added' if added else 'had'} {subdir}/{filename} sha256 {sha256} from '{who}'")
        return 201 if added else 200

    def _part(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.part"

    def _is_there(self, subdir: str, filename: str, sha256: str) -> bool:
        """Whether this very file has its place; a killed server may have left it out of the index."""
        target = self._channel / subdir / filename
        if filename.endswith(".sigs") or not target.exists():
            return False
        if sha256_of(target) != sha256:
            raise HTTPException(409, str(channels.different(filename, "this channel")))
        if channels.record(self._channel, subdir, filename) is None:
            with channels.locked(self._channel):
                channels.index(self._channel)
        return True

    async def _append(self, body: AsyncIterable[bytes], part: Path, first: int, total: int) -> None:
        have = self.received(part.stem)
        if first != have:
            raise HTTPException(409, f"The upload goes on at byte {have}.", headers={"Upload-Offset": str(have)})
        with part.open("ab") as stream:
            try:
                buffer = bytearray()
                async for chunk in body:
                    buffer += chunk
                    have += len(chunk)
                    if have > total:
                        part.unlink()
                        raise HTTPException(400, "More bytes came than were announced.")
                    if len(buffer) >= _BLOCK:
                        await anyio.to_thread.run_sync(stream.write, bytes(buffer))
                        buffer.clear()
            except ClientDisconnect:
                pass  # What came is kept below, for the next attempt.
            except OSError as error:
                raise self._full(part, error) from error
            try:
                await anyio.to_thread.run_sync(_finish, stream, bytes(buffer))
            except OSError as error:
                raise self._full(part, error) from error
        if have < total:
            raise HTTPException(400, f"The upload was cut at byte {have} of {total}.")

    def _full(self, part: Path, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            part.unlink(missing_ok=True)  # Half a package is of no use to a disk that is full.
        return channels.full(self._channel, error)

    def _accept(self, part: Path, subdir: str, filename: str, sha256: str) -> bool:
        try:
            if sha256_of(part) != sha256:
                raise IntegrityError(f"{filename} arrived with other bytes than were announced; it was not taken.")
            if filename.endswith(".sigs"):
                return self._accept_sidecar(part, subdir, filename, sha256)
            package = inspect(part, filename=filename)
            if package.subdir != subdir:
                raise IntegrityError(f"{filename} is for {package.subdir}, not for {subdir}.")
        except IntegrityError:
            part.unlink(missing_ok=True)
            raise
        try:
            with channels.locked(self._channel):
                added = channels.place(self._channel, part, subdir, filename, sha256)
                # The run that held the lock before may have listed this file with its own.
                if channels.record(self._channel, subdir, filename) is None:
                    channels.index(self._channel)
                return added
        except IntegrityError as error:
            raise HTTPException(409, str(error)) from error

    def _accept_sidecar(self, part: Path, subdir: str, filename: str, sha256: str) -> bool:
        package = self._channel / subdir / filename.removesuffix(".sigs")
        if not package.is_file():
            raise IntegrityError(f"{package.name} is not in the channel, so a statement about it is not taken.")
        data = part.read_bytes()
        try:
            statements = json_from(data)
        except ValueError:
            statements = None
        if not isinstance(statements, list) or not statements:
            raise IntegrityError(f"{filename} is not a JSON list of signed statements.")
        part.unlink()
        with channels.locked(self._channel):
            return channels.place_sidecar(self._channel, subdir, package.name, data)


def _finish(stream: object, rest: bytes) -> None:
    stream.write(rest)  # type: ignore[attr-defined]
    stream.flush()  # type: ignore[attr-defined]


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """One upload of a file at a time: two would write into each other."""
    # Not the part itself: it gets another name while the lock is held.
    with part.with_suffix(".lock").open("w") as stream:
        if locks.acquire(stream, wait=False) is False:
            raise HTTPException(423, "Somebody else is uploading this very file.", headers={"Retry-After": "1"})
        try:
            yield
        finally:
            Path(stream.name).unlink(missing_ok=True)
