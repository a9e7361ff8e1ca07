"""The server's side of an upload: received aside, checked, then given its name and a line in the index."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import anyio
import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ssm_forge.base import locks
from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.foreign import json_from
from ssm_forge.channel import folder as channels
from ssm_forge.package.read import inspect

MOST_BYTES = 20_000_000_000
MOST_SIDECAR_BYTES = 4 * 1024 * 1024
# Of each upload under way, this much is kept in memory: with hundreds of slow clients that adds up.
_BLOCK_BYTES = 1 << 17
# Hashing, unpacking, indexing. Readers need threads too, and those that wait for the channel's lock are lost to them.
_WORKERS = 4
# A client whose network broke down says nothing any more, and its next attempt must not find the file taken.
_PATIENCE_SECONDS = 60.0

_T = TypeVar("_T")


class Uploads:
    """The folder of unfinished uploads of one channel, named by the sha256 that they are to have.

    Args:
        record: takes one line for each file.
        patience_seconds: how long nothing may come before an upload ends; what came is kept.
    """

    def __init__(
        self, channel: Path, record: Callable[[str], None], patience_seconds: float = _PATIENCE_SECONDS
    ) -> None:
        self._channel = channel
        self._folder = channel / channels.UPLOADS
        self._record = record
        self._patience_seconds = patience_seconds
        self._busy: set[Path] = set()
        # Held as long as this lives: repair and prune leave what clients go on with.
        self._in_use: object = None
        with contextlib.suppress(OSError):  # A channel that can't be written receives nothing.
            self._in_use = channels.receiving(channel)

    def received(self, sha256: str) -> int:
        """How many bytes of the file with this digest have come already."""
        try:
            return self._part(sha256).stat().st_size
        except FileNotFoundError:
            return 0

    def sweep(self) -> None:
        """Remove what came of uploads that nobody went on with for a week."""
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
        token_name: str,
    ) -> int:
        """Take the bytes of a file from ``first`` on, and give the file its place once it is whole.

        Args:
            body: the bytes, chunk by chunk.
            subdir: folder of the channel.
            sha256: of the whole file, hex.
            first, total: where ``body`` begins in the file, and the file's size, in bytes.
            token_name: who uploads, for the record.

        Returns:
            201 for a new file, 200 for one that was there.

        Raises:
            HTTPException: 408 when the client falls silent, 409 for another file of that name or a wrong offset, 413,
                423 while somebody else uploads the same file.
            IntegrityError: when the bytes are not what was announced, or not a package for this place.
            MachineError: when the disk is full, or the system has no more files to open.
        """
        most_bytes = MOST_SIDECAR_BYTES if filename.endswith(".sigs") else MOST_BYTES
        if total > most_bytes:
            raise HTTPException(413, f"{filename} would have {total} bytes; at most {most_bytes} are taken.")
        if await self._in_thread(self._is_there, subdir, filename, sha256):
            return 200
        part = self._part(sha256)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._alone(part):
                await self._append(body, part, first, total)
                added = await self._in_thread(self._accept, part, subdir, filename, sha256)
        except OSError as error:
            raise self._full(part, error) from error
        self._record(f"{'added' if added else 'had'} {subdir}/{filename} sha256 {sha256} from '{token_name}'")
        return 201 if added else 200

    async def _in_thread(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await anyio.to_thread.run_sync(work, *arguments, limiter=self._workers)

    @cached_property
    def _workers(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(_WORKERS)  # Not sooner: it belongs to the loop that the server runs in.

    def _part(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.part"

    @contextmanager
    def _alone(self, part: Path) -> Iterator[None]:
        """One upload of a file at a time, also of several servers: two would write into each other."""
        refusal = HTTPException(423, "Somebody else is uploading this very file.", headers={"Retry-After": "1"})
        if part in self._busy:  # Where the file system has no locks, this server at least knows its own.
            raise refusal
        self._busy.add(part)
        try:
            # Not the part itself: it gets another name while the lock is held.
            with part.with_suffix(".lock").open("w") as stream:
                if locks.acquire(stream, wait=False) is False or not _has_its_name(stream):
                    raise refusal
                try:
                    yield
                finally:
                    Path(stream.name).unlink(missing_ok=True)
        finally:
            self._busy.discard(part)

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
        size = self.received(part.stem)
        if first != size:
            raise HTTPException(409, f"The upload goes on at byte {size}.", headers={"Upload-Offset": str(size)})
        silent = False
        with part.open("ab") as stream:
            buffer = bytearray()
            try:
                async for chunk in self._heard(body):
                    buffer += chunk
                    size += len(chunk)
                    if size > total:
                        part.unlink()
                        raise HTTPException(400, "More bytes came than were announced.")
                    if len(buffer) >= _BLOCK_BYTES:
                        await anyio.to_thread.run_sync(stream.write, bytes(buffer))
                        buffer.clear()
            except (ClientDisconnect, TimeoutError) as error:
                silent = isinstance(error, TimeoutError)  # What came is kept below, for the next attempt.
            await anyio.to_thread.run_sync(_finish, stream, bytes(buffer))
        if silent:
            raise HTTPException(408, f"Nothing came any more after byte {size} of {total}.")
        if size < total:
            raise HTTPException(400, f"The upload was cut at byte {size} of {total}.")

    async def _heard(self, body: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """What comes, as long as something comes; TimeoutError when nothing does."""
        chunks = body.__aiter__()
        while True:
            with anyio.fail_after(self._patience_seconds):
                try:
                    chunk = await chunks.__anext__()
                except StopAsyncIteration:
                    return
            yield chunk

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
        data = statement_about(package, part, filename)
        part.unlink()
        with channels.locked(self._channel):
            return channels.place_sidecar(self._channel, subdir, package.name, data)


def _finish(stream: IO[bytes], rest: bytes) -> None:
    stream.write(rest)
    stream.flush()


def _has_its_name(stream: IO[str]) -> bool:
    """Whether the file that was locked is still the one of that name: who had it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(stream.name))  # noqa: PTH116
    except FileNotFoundError:
        return False


def statement_about(package: Path, part: Path, filename: str) -> bytes:
    """The bytes of an upload that holds signed statements about a package or wheel of the channel.

    Raises:
        IntegrityError: when the channel has no such file, or the upload is no list of statements.
    """
    if not package.is_file():
        raise IntegrityError(f"{package.name} is not in the channel, so a statement about it is not taken.")
    data = part.read_bytes()
    try:
        statements = json_from(data)
    except ValueError:
        statements = None
    if not isinstance(statements, list) or not statements:
        raise IntegrityError(f"{filename} is not a JSON list of signed statements.")
    return data
