"""What the channel's server reads out of requests and sends back: tokens, digests, ranges, files that are open."""

from __future__ import annotations

import base64
import errno
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from ssm_forge.serve.tokens import Right, TokenStore

DIGEST = "Repr-Digest"
OFFSET = "Upload-Offset"

_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")
# A file has at most 18 digits of bytes; a number of thousands is one that Python refuses to read.
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_NOTHING_LEFT = re.compile(r"bytes \*/([0-9]{1,18})")
_LENGTH = re.compile(r"[0-9]{1,18}")


def authorize(request: Request, right: Right, tokens: TokenStore, *, public: bool) -> str:
    """The name of the token in a request's path or header, for the record; ``anyone`` where none is needed.

    Args:
        right: what the request needs.
        public: whether reading needs no token.

    Raises:
        HTTPException: 401 without a valid token, 403 for one that may only read.
    """
    secret = request.path_params.get("token") or _secret_of(request)
    if not secret:
        if right == "read" and public:
            return "anyone"
        raise _refusal("This channel needs a token.")
    token = tokens.find(secret)
    if token is None:
        raise _refusal("The token is not known here.")
    if token.expired:
        raise _refusal(f"The token '{token.name}' has expired.")
    if right == "write" and token.right != "write":
        raise HTTPException(403, f"The token '{token.name}' may read, but not write.")
    return token.name


class OpenFile(FileResponse):
    """A response from a file that is open already: replacing or removing the file does not touch a reader."""

    descriptor: int

    @classmethod
    def open(cls, root: Path, parts: tuple[str, ...], media: str = "") -> OpenFile:
        """The response with a file of the channel, which is opened without following links.

        Args:
            root: the channel.
            parts: the file's path below it.
            media: the type of the file's content, where its name does not tell.

        Raises:
            HTTPException: 404 when there is no such file, 403 for a symbolic link or a special file.
        """
        descriptor = _open_beneath(root, parts)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise HTTPException(404, "The channel has no such file.")
        name = parts[-1]
        fixed = not name.startswith(("repodata", "run_exports", "index.")) and not name.endswith((".sigs", ".html"))
        headers = {
            "ETag": f'"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"',
            "Cache-Control": "private, max-age=31536000, immutable" if fixed else "private, no-cache",
            "X-Content-Type-Options": "nosniff",
        }
        media = media or ("application/json" if name.endswith(".json") else "application/octet-stream")
        response = cls(f"/proc/self/fd/{descriptor}", headers=headers, media_type=media, stat_result=status)
        response.descriptor = descriptor
        return response

    def unless_known(self, tags: str) -> Response:
        """The response itself, or 304 without a body for a client whose ``tags`` (If-None-Match) name these bytes."""
        if self.headers["etag"] not in [tag.strip().removeprefix("W/") for tag in tags.split(",")]:
            return self
        os.close(self.descriptor)
        keep = {key: self.headers[key] for key in ("etag", "cache-control", "last-modified")}
        return Response(status_code=304, headers=keep)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self.descriptor)


def _open_beneath(root: Path, parts: tuple[str, ...]) -> int:
    """Open ``root/a/b`` one folder at a time, following no symbolic link."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        # A folder that is a symbolic link answers ENOTDIR to O_DIRECTORY | O_NOFOLLOW.
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise HTTPException(403, "This is a symbolic link, and those are not followed.") from error
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
            raise HTTPException(404, "The channel has no such file.") from error
        # Not "there is no such file", which a client would believe: there is a file, and it can't be opened now.
        raise HTTPException(503, f"The file can't be opened now ({error.strerror}).", {"Retry-After": "5"}) from error
    finally:
        os.close(folder)


def _secret_of(request: Request) -> str:
    """The secret in the Authorization header: a bearer token, or the password of basic authentication."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return "-"
    return ""


def _refusal(reason: str) -> HTTPException:
    return HTTPException(401, reason, headers={"WWW-Authenticate": 'Basic realm="channel", Bearer'})


def announced(request: Request) -> str:
    """The sha256 that a request announces for the whole uploaded file, in hexadecimal digits.

    Raises:
        HTTPException: 400 when it announces none.
    """
    match = _DIGEST.search(request.headers.get(DIGEST, ""))
    if not match:
        raise HTTPException(400, f"An upload announces its sha256: '{DIGEST}: sha-256=:BASE64:'.")
    return base64.b64decode(match.group(1)).hex()


class Extent(NamedTuple):
    """Where the body of an upload belongs: its first byte's place in the file, and the file's size in bytes."""

    first: int
    total: int


def extent(request: Request) -> Extent:
    """Where the body of this request belongs in its file, by Content-Range, else by Content-Length.

    Raises:
        HTTPException: 400 when the range does not reach to the file's end, 411 without a length.
    """
    content_range = request.headers.get("content-range", "")
    if whole := _NOTHING_LEFT.fullmatch(content_range):
        return Extent(int(whole.group(1)), int(whole.group(1)))
    match = _RANGE.fullmatch(content_range)
    if match:
        first, last, total = (int(number) for number in match.groups())
        if first <= last == total - 1:
            return Extent(first, total)
    if content_range:
        raise HTTPException(400, "Content-Range must reach from the first missing byte to the end of the file.")
    length = request.headers.get("content-length", "")
    if not _LENGTH.fullmatch(length):
        raise HTTPException(411, "An upload announces its length.")
    return Extent(0, int(length))
