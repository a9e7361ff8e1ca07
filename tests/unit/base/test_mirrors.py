"""Mirrors from pixi's configuration: in force for the probe, the solve, the installation and the build."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conda_channel import demo_channel
from ssm_forge.base import mirrors
from ssm_forge.base.errors import NetworkError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import open_log
from ssm_forge.build import origin
from ssm_forge.install import from_lock
from ssm_forge.install import prefix as install
from ssm_forge.install.marker import Installed
from ssm_forge.manifest.environments import Platform
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.package import installed as package_installed
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.solver import Request, require_reachable, solve

# Reserved: no name server knows it.
CHANNEL = "https://conda.invalid/lab"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pixi's configuration, empty so far."""
    for name in ("HOME", "PIXI_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("PIXI_CONFIG_FILE", raising=False)
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "PIXI_HOME/config.toml"
    path.parent.mkdir()
    return path


@pytest.fixture
def mirror(tmp_path: Path, config: Path) -> Iterator[str]:
    """A server that has the demo channel, configured as the mirror of one that can't be reached."""
    channel = demo_channel(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(channel))) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        config.write_text(f'[mirrors]\n"{CHANNEL}" = ["{address}"]\n')
        yield address
        server.shutdown()


@pytest.mark.usefixtures("mirror")
def test_packages_come_from_the_mirror_and_keep_their_own_address(tmp_path: Path) -> None:
    require_reachable([CHANNEL])
    records = solve(Request(specs=("tool",), channels=(CHANNEL,)))
    assert {r.url.rpartition("/")[0] for r in records} == {f"{CHANNEL}/linux-64"}
    place = Workspace(root=tmp_path, cache=tmp_path / "cache")
    ours = Installed("cu130", "3.12", "conda", (), created=True)
    with open_log(tmp_path / "logs", "test") as log:
        install.install(records, place.envs / "solved", ours, place, log)
    locked = LockedEnvironment("x", (CHANNEL,), Platform("linux-64", "linux-64", virtual_packages()), tuple(records))
    from_lock.create(locked, place.envs / "locked", mirrors=(), workspace=place)
    for name in ("solved", "locked"):
        assert (place.envs / name / "bin/tool").exists()
        assert package_installed.records(place.envs / name)["tool"].url.startswith(CHANNEL)


def test_the_mirror_of_conda_forge_is_asked_instead_of_it(mirror: str, config: Path) -> None:
    config.write_text(f'[mirrors]\n"https://conda.anaconda.org/conda-forge" = ["{mirror}"]\n')
    assert origin.conda_reachable()
    config.write_text('[mirrors]\n"https://conda.anaconda.org/conda-forge" = ["http://127.0.0.1:1/"]\n')
    assert not origin.conda_reachable()


@pytest.mark.parametrize("name", ["repodata.json", "repodata.json.zst"])
def test_one_form_of_the_index_is_enough(name: str, mirror: str, tmp_path: Path) -> None:
    for path in (tmp_path / "channel/noarch").iterdir():
        path.unlink()
    with pytest.raises(NetworkError, match="no index for noarch"):
        require_reachable([CHANNEL])
    (tmp_path / "channel/noarch" / name).touch()
    require_reachable([CHANNEL])


def test_the_longest_prefix_and_the_last_file_win(config: Path, tmp_path: Path) -> None:
    user = tmp_path / "XDG_CONFIG_HOME/rattler/config.toml"
    user.parent.mkdir(parents=True)
    user.write_text('[mirrors]\n"https://a.org" = ["https://user"]\n"https://b.org" = ["https://user/b/"]\n')
    config.write_text('[mirrors]\n"https://a.org" = ["https://own"]\n"https://a.org/x" = ["https://x", "https://y"]\n')
    asked = ["https://a.org/x/noarch", "https://a.org/xy", "https://b.org/c", "https://c.org/", "file:///a"]
    assert [mirrors.mirrored(url) for url in asked] == [
        "https://x/noarch",
        "https://own/xy",
        "https://user/b/c",
        "https://c.org/",
        "file:///a",
    ]


def test_a_broken_configuration_is_named(config: Path) -> None:
    config.write_text("[mirrors\n")
    with pytest.raises(UsageError, match=str(config)):
        mirrors.configured()


def test_channels_that_never_answer_are_given_up_together(config: Path) -> None:
    """Accepting a connection and then saying nothing is the worst that a firewall does."""
    assert not config.exists()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(NetworkError, match=f"{port}/a"):
            require_reachable([f"http://127.0.0.1:{port}/{name}" for name in "abc"], seconds=0.5)
        assert time.monotonic() - started < 5
