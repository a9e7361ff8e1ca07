"""The simple index over HTTP: pages in the form that a client asks for, wheels, and their uploads.

The addresses are those of the folder, so a plain web server of that folder answers the same way. The tokens are those
of the channel; pip and uv show them as the password of basic authentication, from the URL, netrc or a keyring.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.files import sha256_of
from ssm_forge.channel import folder as channels
from ssm_forge.channel import simple_index as index
from ssm_forge.package.read_wheel import FILENAME, FOLDER, PAGE, inspect, parse
from ssm_forge.serve.answers import DIGEST, OFFSET, OpenFile, announced, extent
from ssm_forge.serve.tokens import Right
from ssm_forge.serve.uploads import Uploads, statement_about

JSON = "application/vnd.pypi.simple.v1+json"
HTML = "application/vnd.pypi.simple.v1+html"

_FILE = re.compile(rf"{FILENAME.pattern}(\.metadata|\.sigs(\.[0-9a-f]{{64}})?)?")
_UPLOAD = re.compile(rf"{FILENAME.pattern}(\.sigs)?")

Authorize = Callable[[Request, Right], str]


@dataclass(frozen=True)
class WheelServer:
    """The handlers of requests for wheels and their index: a request comes in, a response goes out.

    Attributes:
        root: the channel.
        uploads: takes the files that are uploaded.
        authorize: gives the name of a request's token, or refuses.
    """

    root: Path
    uploads: WheelUploads
    authorize: Authorize

    @classmethod
    def of(cls, root: Path, access: Callable[[str], None], authorize: Authorize) -> WheelServer:
        """The handlers for the channel ``root``; ``access`` takes one line for each uploaded file."""
        return cls(root, WheelUploads(root, access), authorize)

    def routes(self, start: str) -> list[Route]:
        """The routes below the path ``start``."""
        simple, read = f"{start}/{FOLDER}", ["GET", "HEAD"]
        return [
            Route(f"{simple}/", self.page, methods=read),
            Route(f"{simple}/{{page}}/", self.page, methods=read),
            Route(f"{simple}/{{page}}/{{project}}/", self.page, methods=read),
            Route(f"{simple}/{{page}}/{{name}}", self.write, methods=["PUT"]),
            Route(f"{simple}/{{name}}", self.file, methods=read),
            Route(f"{simple}/{{page}}/{{name}}", self.file, methods=read),
            Route(f"{simple}/{{page}}/{{project}}/{{name}}", self.file, methods=read),
        ]

    async def page(self, request: Request) -> Response:
        """GET and HEAD of a page: JSON for who asks for it, HTML for everybody else."""
        self.authorize(request, "read")
        folders = _folders(request)
        media = _wanted(request.headers.get("accept", ""))
        name = "index.json" if media == JSON else "index.html"
        if not (self.root.joinpath(*folders) / name).exists():
            raise HTTPException(404, f"The channel has no /{'/'.join(folders)}/.")
        return self._answer(request, (*folders, name), media)

    async def file(self, request: Request) -> Response:
        """GET and HEAD of a file by its name: a wheel, its metadata, its statement, a page."""
        self.authorize(request, "read")
        folders, name = _folders(request), request.path_params["name"]
        if PAGE.fullmatch(name) if len(folders) == 1 else len(folders) == 2 and index.is_project(name):
            return RedirectResponse(f"{name}/", 301)
        pages = (*index.PAGE_FILES, *([index.LINKS] if len(folders) == 2 else []))
        if name not in pages and not (len(folders) == 2 and _FILE.fullmatch(name)):
            raise HTTPException(404, "The channel has no such file.")
        if request.method == "HEAD" and DIGEST in request.headers:
            return self._upload_state(request, folders[1], name)
        return self._answer(request, (*folders, name), "text/html" if name.endswith(".html") else "")

    def _answer(self, request: Request, parts: tuple[str, ...], media: str) -> Response:
        response = OpenFile.open(self.root, parts, media)
        response.headers["Vary"] = "Accept"
        return response.unless_known(request.headers.get("if-none-match", ""))

    async def write(self, request: Request) -> Response:
        """PUT: a wheel or its statement, whole or from where an earlier upload was cut."""
        token_name = self.authorize(request, "write")
        page, filename = request.path_params["page"], request.path_params["name"]
        if not PAGE.fullmatch(page) or not _UPLOAD.fullmatch(filename):
            raise HTTPException(403, "Only wheels of this project, for an index such as cu130-torch211, are taken.")
        sha256 = announced(request)
        first, total = extent(request)
        subdir = f"{FOLDER}/{page}"
        status = await self.uploads.receive(request.stream(), subdir, filename, sha256, first, total, token_name)
        return PlainTextResponse(f"{filename}: {'added' if status == 201 else 'was there'}\n", status)

    def _upload_state(self, request: Request, page: str, filename: str) -> Response:
        """How much of an announced file is here already."""
        self.authorize(request, "write")
        if (self.root / FOLDER / page / filename).is_file() and not filename.endswith(".sigs"):
            return Response(status_code=200, headers={OFFSET: "0"})
        return Response(status_code=404, headers={OFFSET: str(self.uploads.received(announced(request)))})


def _folders(request: Request) -> tuple[str, ...]:
    page, project = request.path_params.get("page"), request.path_params.get("project")
    if (page is not None and not PAGE.fullmatch(page)) or (project is not None and not index.is_project(project)):
        raise HTTPException(404, "The channel has no such index.")
    return (FOLDER, *(part for part in (page, project) if part is not None))


def _wanted(accept: str) -> str:
    """The form of a page that a client likes best (PEP 691); HTML where it does not say."""
    best, form = 0.0, ""
    for item in accept.split(","):
        media, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((value for p in parameters if p.startswith("q=") and (value := p[2:])), "1")
        weight = float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality) else 0.0
        forms = {JSON: JSON, JSON.replace("v1", "latest"): JSON, HTML: HTML, HTML.replace("v1", "latest"): HTML}
        if weight > best and (media in forms or media in ("text/html", "text/*", "*/*")):
            best, form = weight, forms.get(media, "text/html")
    return form or "text/html"


class WheelUploads(Uploads):
    """Uploads of wheels: checked as such, and named in the simple index."""

    def _is_there(self, subdir: str, filename: str, sha256: str) -> bool:
        target = self._channel / subdir / filename
        if filename.endswith(".sigs") or not target.exists():
            return False
        if sha256_of(target) != sha256:
            raise HTTPException(409, str(channels.different(filename, "this channel")))
        page = subdir.rpartition("/")[2]
        # A killed server may have left it out of the pages.
        return filename in index.entries(self._channel, page, parse(filename).project)

    def _accept(self, part: Path, subdir: str, filename: str, sha256: str) -> bool:
        page = subdir.rpartition("/")[2]
        try:
            if sha256_of(part) != sha256:
                raise IntegrityError(f"{filename} arrived with other bytes than were announced; it was not taken.")
            if filename.endswith(".sigs"):
                return self._accept_statement(part, page, filename)
            wheel = inspect(part, filename=filename)
            if wheel.page != page:
                raise IntegrityError(f"{filename} is for the index {wheel.page}, not for {page}.")
        except IntegrityError:
            part.unlink(missing_ok=True)
            raise
        try:
            with channels.locked(self._channel):
                return index.place(self._channel, part, wheel)
        except IntegrityError as error:
            raise HTTPException(409, str(error)) from error

    def _accept_statement(self, part: Path, page: str, filename: str) -> bool:
        wheel = self._channel / FOLDER / page / filename.removesuffix(".sigs")
        data = statement_about(wheel, part, filename)
        with channels.locked(self._channel):
            index.place_statement(self._channel, page, wheel.name, data)
        part.unlink()
        return True
