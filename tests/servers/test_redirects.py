"""Channels behind redirects, as hosted ones are: everything that reads follows them, and no credential does."""

from __future__ import annotations

import functools
import http.server
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import httpx
import pytest
from lab import make_package

from ssm_forge.base import web
from ssm_forge.base.errors import NetworkError
from ssm_forge.base.paths import Workspace
from ssm_forge.channel import check as channel_check
from ssm_forge.channel import folder as channels
from ssm_forge.channel import mirror, policy
from ssm_forge.channel import statement as trust
from ssm_forge.channel.source import open_source
from ssm_forge.install import pack
from ssm_forge.manifest.environments import Platform
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.package.read import inspect
from ssm_forge.publish import to_hosted
from ssm_forge.publish.send import publish
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.solver import Request, solve

NAME = "tool-1.0-h1_0.conda"
TOKEN, OTHER_TOKEN = "of-the-channel", "of-the-cdn"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Writes down what it was asked: method, path, what was shown."""

    asked: list[tuple[str, str, str]]

    def note(self) -> None:
        self.asked.append((self.command, self.path, self.headers.get("Authorization", "")))

    def log_message(self, *args: object) -> None:
        """Quiet."""


class Cdn(Handler):
    """Has the files; refuses HEAD, as an address that is signed for GET does."""

    def do_GET(self) -> None:
        self.note()
        wanted = self.headers.get("Range", "")
        if not wanted:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        rest = data[int(wanted.removeprefix("bytes=").rstrip("-")) :]
        self.send_response(206)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest)
        return None

    def do_HEAD(self) -> None:
        self.note()
        self.send_error(403)


class Front(Handler):
    """Wants a token, has nothing, and knows who has."""

    cdn = ""
    status = 302

    def do_GET(self) -> None:
        self.note()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send_error(401)
        self.send_response(self.status)
        self.send_header("Location", "/loop" if self.path == "/loop" else self.cdn + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    do_HEAD = do_PUT = do_OPTIONS = do_GET  # noqa: N815


@contextmanager
def running(handler: type[Handler], folder: Path) -> Iterator[tuple[int, list[tuple[str, str, str]]]]:
    handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server.server_port, handler.asked
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A channel of one signed package, and tokens for both hosts."""
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", f"127.0.0.1={TOKEN} localhost={OTHER_TOKEN}")
    key, _ = trust.make_key(tmp_path / "keys", "lab")
    package = make_package(tmp_path / "made", provenance=True, size=100_000)
    publish([package], str(tmp_path / "channel"), statements=trust.writer(key, ()))
    return tmp_path / "channel"


@pytest.fixture(params=[302, 308])
def front(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the channel; afterwards: whoever was reached by a redirect was shown nothing."""
    with running(Cdn, folder) as (cdn_port, seen_by_cdn), running(Front, folder) as (port, _):
        # Another host, for which there is a token too: a server must not be able to ask for it.
        monkeypatch.setattr(Front, "cdn", f"http://localhost:{cdn_port}")
        monkeypatch.setattr(Front, "status", request.param)
        yield f"http://127.0.0.1:{port}"
        assert seen_by_cdn
        assert {shown for _, _, shown in seen_by_cdn} == {""}


def test_check_and_mirror(front: str, tmp_path: Path, folder: Path) -> None:
    assert channel_check.check(open_source(front)) == ([], 1)
    target = tmp_path / "copy"
    sha256 = inspect(folder / "linux-64" / NAME).sha256
    (target / ".uploads").mkdir(parents=True)
    (target / ".uploads" / f"{sha256}.part").write_bytes((folder / "linux-64" / NAME).read_bytes()[:50_000])
    assert mirror.mirror(open_source(front), target, log=lambda line: None) == (1, 0)
    assert channels.records(target)[NAME].attestations_sha256
    assert channel_check.check(open_source(str(target))) == ([], 1)


def test_statements_and_what_a_hosted_channel_has(front: str, tmp_path: Path, folder: Path) -> None:
    (record,) = solve(Request(specs=("tool",), channels=(f"{front}/",)))
    rule = policy.Rule(f"{front}/", "signature", (trust.load_public(tmp_path / "keys" / "lab.pub"),))
    assert policy.enforce([record], [rule], lambda line: None) == 1
    hosted = to_hosted.Hosted(front, front, "NO_SUCH_VARIABLE", lambda files, key: None, ("bearer",))
    package = inspect(folder / "linux-64" / NAME)
    assert to_hosted.HostedTarget(hosted).present(package) == package.sha256


@pytest.mark.parametrize("front", [302], indirect=True)
@pytest.mark.parametrize("hashed", ["sha256", "md5"])
def test_pack(front: str, tmp_path: Path, hashed: str) -> None:
    (record,) = solve(Request(specs=("tool",), channels=(f"{front}/",)))
    if hashed == "md5":
        record.sha256 = None
    locked = LockedEnvironment("demo", (f"{front}/",), Platform("linux-64", "linux-64", virtual_packages()), (record,))
    place = Workspace(root=tmp_path, cache=tmp_path / "downloads")
    assert pack.pack(locked, tmp_path / "demo.tar", mirrors=[], workspace=place).packages == 1


@pytest.mark.parametrize("front", [302, 303, 307], indirect=True)
@pytest.mark.parametrize("method", ["PUT", "OPTIONS"])
def test_writing_follows_none_and_says_where_it_would_lead(front: str, method: str) -> None:
    """httpx, and browsers, would make a GET of it, whose 200 looks like a success."""
    client = web.Client(front)
    with pytest.raises(NetworkError, match=rf"sends {method} on to http://localhost:\d+/x .* Name the address"):
        client.send(method, "x")
    client.send("GET", f"linux-64/{NAME}")


@pytest.mark.parametrize("front", [302], indirect=True)
def test_what_the_other_host_refuses_is_not_blamed_on_the_token(front: str) -> None:
    with pytest.raises(NetworkError, match="leads to localhost, which refused HEAD") as caught:
        web.Client(front).send("HEAD", "x")
    assert "token" not in str(caught.value)


@pytest.mark.parametrize("front", [302], indirect=True)
def test_a_redirect_to_itself_is_an_error(front: str) -> None:
    client = web.Client(front)
    with pytest.raises(NetworkError, match=r"/loop could not be read .*redirect"):
        client.send("GET", "loop")
    client.send("GET", f"linux-64/{NAME}")


def test_the_client_shows_a_token_to_its_host_again_on_its_own_redirects(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the very same server the credential goes along: it is the one that asked for it."""
    with running(Front, folder) as (port, asked):
        monkeypatch.setattr(Front, "cdn", f"http://127.0.0.1:{port}/moved")
        with web.session(max_redirects=3) as client, pytest.raises(httpx.TooManyRedirects):
            client.get(f"http://127.0.0.1:{port}/x")
    assert {shown for _, _, shown in asked} == {f"Bearer {TOKEN}"}
