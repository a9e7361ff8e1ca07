"""Every task that reads a private channel shows who we are, from each place that may hold a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import Lab
from lab import auth_file, make_package

from ssm_forge.base.errors import NetworkError
from ssm_forge.base.paths import Workspace
from ssm_forge.install import from_lock, pack
from ssm_forge.manifest.environments import EnvironmentSpec, Manifest, Platform
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.publish.send import publish
from ssm_forge.solve.lock import LockedEnvironment, read, write
from ssm_forge.solve.solver import Request, require_reachable, solve

PLATFORM = Platform("linux-64", "linux-64", virtual_packages())


@dataclass
class Private:
    """An environment locked from a private channel, and where to work with it."""

    url: str
    locked: LockedEnvironment
    place: Workspace
    token: str


@pytest.fixture
def private(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Private:
    """Locked by somebody with a token; whoever uses the lock has none yet."""
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "solver"))
    publish([make_package(tmp_path / "made")], lab.url)
    url = f"{lab.url}/"
    locked = LockedEnvironment("demo", (url,), PLATFORM, tuple(solve(Request(specs=("tool",), channels=(url,)))))
    monkeypatch.delenv("RATTLER_AUTH_FILE")
    place = Workspace(root=tmp_path / "checkout", cache=tmp_path / "cache")
    place.root.mkdir()
    return Private(url, locked, place, lab.read)


def in_auth_file(private: Private, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(auth_file(private.place.root, private.token)))


def in_environment(private: Private, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", f"127.0.0.1={private.token}")


def in_netrc(private: Private, monkeypatch: pytest.MonkeyPatch) -> None:
    path = private.place.root / "netrc"
    path.write_text(f"machine 127.0.0.1 login me password {private.token}\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))


def in_path(private: Private, monkeypatch: pytest.MonkeyPatch) -> None:
    path = private.place.root / "auth.json"
    path.write_text(f'{{"127.0.0.1": {{"CondaToken": "{private.token}"}}}}')
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(path))


def packs(private: Private) -> None:
    made = pack.pack(private.locked, private.place.root / "demo.tar", mirrors=[], workspace=private.place)
    assert made.packages == 1


def packs_by_md5(private: Private) -> None:
    """What has no sha256 does not go through the cache of downloads."""
    (record,) = private.locked.records
    record.sha256 = None
    packs(private)


def creates(private: Private) -> None:
    report = from_lock.create(private.locked, private.place.root / "env", mirrors=[], workspace=private.place)
    assert report.packages == 1


def locks(private: Private) -> None:
    wanted = EnvironmentSpec(
        name="demo", channels=(private.url,), platforms=(PLATFORM,), specs=("tool",), constraints=(), strict=True
    )
    write(Manifest(private.place.manifest, (PLATFORM,), (wanted,)), private.place.lock, snapshot=None)
    assert [record.name.normalized for record in read(private.place.lock)[0].records] == ["tool"]


# In this order: the last one takes the record's sha256 away.
USES = (packs, creates, locks, packs_by_md5)


@pytest.mark.parametrize("login", [in_auth_file, in_environment, in_netrc, in_path])
def test_a_private_channel_works_for_every_task(
    private: Private, monkeypatch: pytest.MonkeyPatch, login: Callable[[Private, pytest.MonkeyPatch], None]
) -> None:
    login(private, monkeypatch)
    for use in USES:
        use(private)


def test_without_a_token_the_error_says_where_to_put_one(private: Private) -> None:
    for use in USES:
        with pytest.raises(NetworkError, match=r"401.*SSM_FORGE_CHANNEL_TOKEN"):
            use(private)


class Hiding(BaseHTTPRequestHandler):
    """Says to strangers that there is nothing, as Quetz and Artifactory do with private channels."""

    def do_HEAD(self) -> None:
        self.send_response(200 if self.headers.get("Authorization") == "Bearer known" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Quiet."""


def test_a_server_that_hides_a_channel_from_strangers_is_asked_by_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hiding) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        with pytest.raises(NetworkError, match="not a conda channel"):
            require_reachable((url,))
        monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", "127.0.0.1=known")
        require_reachable((url,))
        server.shutdown()


def test_a_token_in_the_path_is_in_no_error(private: Private, monkeypatch: pytest.MonkeyPatch) -> None:
    path = private.place.root / "auth.json"
    path.write_text('{"127.0.0.1": {"CondaToken": "hunter2-hunter2"}}')
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(path))
    for use in USES:
        with pytest.raises(NetworkError) as caught:
            use(private)
        assert "hunter2" not in str(caught.value)
