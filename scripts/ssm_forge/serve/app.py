"""The embedded channel server: a folder over HTTP with read and write tokens, for a small lab.

Reading is plain conda: any client works. Writing is one ``PUT`` a file, with the digest announced beforehand
(``Repr-Digest``, RFC 9530), so that a cut upload goes on where it stopped (``Content-Range``) and never
shows: a file is checked in ``.uploads``, gets its name when it is whole, and then the index names it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ssm_forge.base.credentials import redact_path
from ssm_forge.base.errors import ForgeError, IntegrityError, MachineError
from ssm_forge.channel import folder as channels
from ssm_forge.package.read import FILENAME, SUBDIRS
from ssm_forge.serve.answers import DIGEST, OFFSET, OpenFile, announced, authorize, extent
from ssm_forge.serve.simple import WheelServer
from ssm_forge.serve.tokens import Right, TokenStore
from ssm_forge.serve.uploads import Uploads

MARK = "SSM-Forge-Channel"
REASON = "SSM-Forge-Reason"

_SIDECAR = re.compile(rf"{FILENAME.pattern}\.sigs(\.[0-9a-f]{{64}})?")
_SHARD = re.compile(r"[0-9a-f]{64}\.msgpack\.zst")

Access = Callable[[str], None]


@dataclass(frozen=True)
class Server:
    """The handlers of requests for packages: a request comes in, a response goes out.

    Attributes:
        root: the channel.
        tokens: who may do what.
        public: whether reading needs no token.
        uploads: takes the files that are uploaded.
        access: takes one line for each request; tokens never get into it.
    """

    root: Path
    tokens: TokenStore
    public: bool
    uploads: Uploads
    access: Access

    async def read(self, request: Request) -> Response:
        """GET and HEAD: a package, its statement, or an index file; nothing else has an address."""
        self.authorize(request, "read")
        parts = _address(request)
        if parts is None:
            raise HTTPException(404, "The channel has no such file.")
        if request.method == "HEAD" and DIGEST in request.headers:
            return self._upload_state(request, *parts)
        response = OpenFile.open(self.root, parts)
        return response.unless_known(request.headers.get("if-none-match", ""))

    async def write(self, request: Request) -> Response:
        """PUT: a package or its statement, whole or from where an earlier upload was cut."""
        token_name = self.authorize(request, "write")
        parts = _address(request)
        if parts is None or not (FILENAME.fullmatch(parts[-1]) or parts[-1].endswith(".conda.sigs")):
            raise HTTPException(403, "Only packages (NAME-VERSION-BUILD.conda) and their statements are taken.")
        sha256 = announced(request)
        first, total = extent(request)
        subdir, filename = parts[0], parts[-1]
        status = await self.uploads.receive(request.stream(), subdir, filename, sha256, first, total, token_name)
        return PlainTextResponse(f"{filename}: {'added' if status == 201 else 'was there'}\n", status)

    async def about(self, request: Request) -> Response:
        """OPTIONS: how a publisher knows what kind of server this is."""
        return Response(status_code=204, headers={MARK: "1", "Allow": "GET, HEAD, PUT, OPTIONS"})

    async def alive(self, request: Request) -> Response:
        """GET of /health: ``ok``, for a watchdog."""
        return PlainTextResponse("ok\n")

    def authorize(self, request: Request, right: Right) -> str:
        """The name of the request's token; as :func:`ssm_forge.serve.answers.authorize`, for this channel."""
        return authorize(request, right, self.tokens, public=self.public)

    def _upload_state(self, request: Request, subdir: str, filename: str) -> Response:
        """How much of an announced file is here already."""
        self.authorize(request, "write")
        if (self.root / subdir / filename).is_file():
            return Response(status_code=200, headers={OFFSET: "0"})
        return Response(status_code=404, headers={OFFSET: str(self.uploads.received(announced(request)))})


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
    simple = WheelServer.of(root.resolve(), access, server.authorize)
    routes = [Route("/health", server.alive, methods=["GET"])]
    for start in ("", "/t/{token}"):
        routes += simple.routes(start)
        routes += [
            Route(f"{start}/{{subdir}}/{{name}}", server.read, methods=["GET", "HEAD"]),
            Route(f"{start}/{{subdir}}/shards/{{name}}", server.read, methods=["GET", "HEAD"]),
            Route(f"{start}/{{subdir}}/{{name}}", server.write, methods=["PUT"]),
            Route(f"{start}/", server.about, methods=["OPTIONS"]),
        ]
    handlers: dict[Any, Any] = {ForgeError: _explain, HTTPException: _explain}
    app = Starlette(routes=routes, exception_handlers=handlers)
    # The index's own pages say where a missing slash leads; whoever asks for anything else shows a token first.
    app.router.redirect_slashes = False
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
            milliseconds = (time.monotonic() - started) * 1000
            client = (scope.get("client") or ("?",))[0]
            self._access(f"{client} {status} {scope['method']} {redact_path(scope['path'])!r} {milliseconds:.0f} ms")
