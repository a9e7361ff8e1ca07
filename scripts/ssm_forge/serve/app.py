"""The embedded channel server: a folder over HTTP with read and write tokens, for a small lab.

Reading is plain conda: any client works. Writing is one ``PUT`` a file, with the digest announced beforehand
(``Repr-Digest``, RFC 9530), so that a cut upload goes on where it stopped (``Content-Range``) and never
shows: a file is checked in ``.uploads``, gets its name when it is whole, and then the index names it.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ssm_forge.base.credentials import redact_path
from ssm_forge.base.errors import ForgeError, IntegrityError, MachineError
from ssm_forge.channel import folder as channels
from ssm_forge.package.read import FILENAME, SUBDIRS
from ssm_forge.serve.tokens import Right, TokenStore
from ssm_forge.serve.uploads import Uploads

MARK = "SSM-Forge-Channel"
DIGEST = "Repr-Digest"
OFFSET = "Upload-Offset"
REASON = "SSM-Forge-Reason"

_DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")
# A file has at most 18 digits of bytes; a number of thousands is one that Python refuses to read.
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_NOTHING_LEFT = re.compile(r"bytes \*/([0-9]{1,18})")
_LENGTH = re.compile(r"[0-9]{1,18}")
_SIDECAR = re.compile(rf"{FILENAME.pattern}\.sigs(\.[0-9a-f]{{64}})?")
_SHARD = re.compile(r"[0-9a-f]{64}\.msgpack\.zst")

Access = Callable[[str], None]


@dataclass(frozen=True)
class Server:
    """The requests' handlers.

    Attributes:
        root: the channel.
        tokens: who may do what.
        public: whether reading needs no token.
        access: takes one line for each request; tokens never get into it.
    """

    root: Path
    tokens: TokenStore
    public: bool
    uploads: Uploads
    access: Access

    async def read(self, request: Request) -> Response:
        """GET and HEAD: a package, its statement, or an index file; nothing else has an address."""
        self._authorize(request, "read", request.path_params.get("token"))
        parts = _address(request)
        if parts is None:
            raise HTTPException(404, "The channel has no such file.")
        if request.method == "HEAD" and DIGEST in request.headers:
            return self._upload_state(request, *parts)
        response = _OpenFile.open(self.root, parts)
        return response.unless_known(request.headers.get("if-none-match", ""))

    async def write(self, request: Request) -> Response:
        """PUT: a package or its statement, whole or from where an earlier upload was cut."""
        who = self._authorize(request, "write", request.path_params.get("token"))
        parts = _address(request)
        if parts is None or not (FILENAME.fullmatch(parts[-1]) or parts[-1].endswith(".conda.sigs")):
            raise HTTPException(403, "Only packages (NAME-VERSION-BUILD.conda) and their statements are taken.")
        sha256 = _announced(request)
        first, total = _extent(request)
        subdir, filename = parts[0], parts[-1]
        status = await self.uploads.receive(request.stream(), subdir, filename, sha256, first, total, who)
        return PlainTextResponse(f"{filename}: {'added' if status == 201 else 'was there'}\n", status)

    async def about(self, request: Request) -> Response:
        """OPTIONS: how a publisher knows what kind of server this is."""
        return Response(status_code=204, headers={MARK: "1", "Allow": "GET, HEAD, PUT, OPTIONS"})

    async def alive(self, request: Request) -> Response:
        """For a watchdog."""
        return PlainTextResponse("ok\n")

    def _upload_state(self, request: Request, subdir: str, filename: str) -> Response:
        """How much of an announced file is here already."""
        self._authorize(request, "write", request.path_params.get("token"))
        if (self.root / subdir / filename).is_file():
            return Response(status_code=200, headers={OFFSET: "0"})
        return Response(status_code=404, headers={OFFSET: str(self.uploads.received(_announced(request)))})

    def _authorize(self, request: Request, right: Right, in_path: str | None) -> str:
        """Whose request this is; one that has no right to what it asks is answered with an HTTPException.

        Returns:
            The name of the token, for the record.
        """
        secret = in_path or _shown(request)
        if not secret:
            if right == "read" and self.public:
                return "anyone"
            raise _refusal("This channel needs a token.")
        token = self.tokens.find(secret)
        if token is None:
            raise _refusal("The token is not known here.")
        if token.expired:
            raise _refusal(f"The token '{token.name}' has expired.")
        if right == "write" and token.right != "write":
            raise HTTPException(403, f"The token '{token.name}' may read, but not write.")
        return token.name


class _OpenFile(FileResponse):
    """A response from a file that is open already: replacing or removing the file does not touch a reader."""

    descriptor: int

    @classmethod
    def open(cls, root: Path, parts: tuple[str, ...]) -> _OpenFile:
        """An open file of the channel, reached without following links.

        Raises:
            HTTPException: 404 when there is no such file, 403 for a symbolic link or a special file.
        """
        descriptor = _open_beneath(root, parts)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise HTTPException(404, "The channel has no such file.")
        name = parts[-1]
        fixed = not name.startswith(("repodata", "run_exports")) and not name.endswith(".sigs")
        headers = {
            "ETag": f'"{found.st_mtime_ns:x}-{found.st_ino:x}-{found.st_size:x}"',
            "Cache-Control": "private, max-age=31536000, immutable" if fixed else "private, no-cache",
            "X-Content-Type-Options": "nosniff",
        }
        media = "application/json" if name.endswith(".json") else "application/octet-stream"
        response = cls(f"/proc/self/fd/{descriptor}", headers=headers, media_type=media, stat_result=found)
        response.descriptor = descriptor
        return response

    def unless_known(self, tags: str) -> Response:
        """304 without a body for a client that has these bytes."""
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


def _address(request: Request) -> tuple[str, ...] | None:
    """The folders and the file that a path means, or None for anything a channel does not have."""
    subdir, name = request.path_params["subdir"], request.path_params["name"]
    if subdir not in SUBDIRS:
        return None
    if "shards" in request.url.path.split("/")[:-1]:
        return (subdir, "shards", name) if _SHARD.fullmatch(name) else None
    if name in channels.INDEX_FILES or FILENAME.fullmatch(name) or _SIDECAR.fullmatch(name):
        return (subdir, name)
    return None


def _shown(request: Request) -> str:
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


def _announced(request: Request) -> str:
    found = _DIGEST.search(request.headers.get(DIGEST, ""))
    if not found:
        raise HTTPException(400, f"An upload announces its sha256: '{DIGEST}: sha-256=:BASE64:'.")
    return base64.b64decode(found.group(1)).hex()


def _extent(request: Request) -> tuple[int, int]:
    """First byte of this request's body in the file, and the file's size."""
    extent = request.headers.get("content-range", "")
    if whole := _NOTHING_LEFT.fullmatch(extent):
        return int(whole.group(1)), int(whole.group(1))
    found = _RANGE.fullmatch(extent)
    if found:
        first, last, total = (int(number) for number in found.groups())
        if first <= last == total - 1:
            return first, total
    if extent:
        raise HTTPException(400, "Content-Range must reach from the first missing byte to the end of the file.")
    length = request.headers.get("content-length", "")
    if not _LENGTH.fullmatch(length):
        raise HTTPException(411, "An upload announces its length.")
    return 0, int(length)


def create_app(root: Path, tokens: TokenStore, *, public: bool, access: Access) -> Starlette:
    """The server for one channel; brings the channel's index in step first.

    Args:
        public: reading needs no token; writing always does.
        access: takes one line for each request.
    """
    channels.ensure_indexed(root)
    uploads = Uploads(root, access)
    uploads.sweep()
    server = Server(root.resolve(), tokens, public, uploads, access)
    routes = [Route("/health", server.alive, methods=["GET"])]
    for start in ("", "/t/{token}"):
        routes += [
            Route(f"{start}/{{subdir}}/{{name}}", server.read, methods=["GET", "HEAD"]),
            Route(f"{start}/{{subdir}}/shards/{{name}}", server.read, methods=["GET", "HEAD"]),
            Route(f"{start}/{{subdir}}/{{name}}", server.write, methods=["PUT"]),
            Route(f"{start}/", server.about, methods=["OPTIONS"]),
        ]
    handlers: dict[Any, Any] = {ForgeError: _explain, HTTPException: _explain}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.add_middleware(_AccessLog, access=access)
    return app


async def _explain(request: Request, error: Exception) -> Response:
    """Errors as one line of text; the connection ends, because a body may be left unread."""
    if isinstance(error, HTTPException):
        # An answer to HEAD has no body to say it in.
        headers = {
            "Connection": "close",
            REASON: error.detail.encode("ascii", "replace").decode(),
            **(error.headers or {}),
        }
        return PlainTextResponse(f"{error.detail}\n", error.status_code, headers)
    # These and no kinds of them: a damaged index is this server's own fault.
    statuses: dict[type[Exception], int] = {IntegrityError: 422, MachineError: 507}
    return PlainTextResponse(f"{error}\n", statuses.get(type(error), 500), {"Connection": "close"})


class _AccessLog:
    """One line a request: status, method, path without a token, milliseconds."""

    def __init__(self, app: Any, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started, status = time.monotonic(), 0

        async def observe(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observe)
        finally:
            spent = (time.monotonic() - started) * 1000
            client = (scope.get("client") or ("?",))[0]
            self._access(f"{client} {status} {scope['method']} {redact_path(scope['path'])!r} {spent:.0f} ms")
