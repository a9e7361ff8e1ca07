"""Installing from a channel: the first that has a package, with credentials that never show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab, auth_file, environment, make_package
from rattler import RepoDataRecord

from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import open_log
from ssm_forge.channel import folder as channels
from ssm_forge.channel import others as remote
from ssm_forge.install import marker
from ssm_forge.install import prefix as install
from ssm_forge.publish.send import publish
from ssm_forge.solve.solver import Request, solve

NAME = "tool-1.0-h1_0.conda"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "cache"))


def folder_channel(folder: Path, name: str, text: str) -> str:
    make_package(folder / "linux-64", name, text=text)
    channels.index(folder)
    return folder.as_uri()


def link(records: list[RepoDataRecord], prefix: Path, folder: Path) -> None:
    """Install as ``install-mamba`` does."""
    place = Workspace(root=folder, cache=folder / "cache")
    installed = marker.Installed(variant="x", python="3.12", source="conda", packages=(), created=True)
    with open_log(folder / "logs", "install") as log:
        install.install(records, prefix, installed, place, log)


def test_the_first_channel_that_has_a_package_wins(tmp_path: Path) -> None:
    empty = folder_channel(tmp_path / "empty", "unrelated", "x")
    first = folder_channel(tmp_path / "first", "tool", "first\n")
    second = folder_channel(tmp_path / "second", "tool", "second\n")
    found = remote.find(NAME, (empty, first, second))
    assert found is not None
    assert found.channel == first + "/"
    assert found.sha256 == channels.records(tmp_path / "first")[NAME].sha256
    assert remote.find("tool-1.0-h2_0.conda", (empty, first, second)) is None


def test_the_solver_takes_it_from_there_too(tmp_path: Path) -> None:
    first = folder_channel(tmp_path / "first", "tool", "first\n")
    second = folder_channel(tmp_path / "second", "tool", "second\n")
    record = solve(Request(specs=("tool ==1.0 h1_0",), channels=(first, second), strict=False))[0]
    remote.require_origin(record.file_name, record.url, first + "/")
    with pytest.raises(IntegrityError, match="was to come from"):
        remote.require_origin(record.file_name, record.url, second + "/")


@pytest.mark.parametrize("way", ["RATTLER_AUTH_FILE", "netrc", "environment"])
def test_a_private_channel_is_read_and_installed_from(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    publish([make_package(tmp_path / "made", size=100_000)], lab.url)
    monkeypatch.delenv("RATTLER_AUTH_FILE")
    if way == "RATTLER_AUTH_FILE":
        lab.login(lab.read, monkeypatch)
    elif way == "netrc":
        path = tmp_path / "netrc"
        path.write_text(f"machine 127.0.0.1 login me password {lab.read}\n")
        path.chmod(0o600)
        monkeypatch.setenv("NETRC", str(path))
    else:
        monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", f"127.0.0.1={lab.read}")
    assert remote.find(NAME, (lab.url,)) is not None

    prefix = tmp_path / "prefix"
    with remote.for_engine():
        records = solve(Request(specs=("tool",), channels=(lab.url,)))
        link(records, prefix, tmp_path)
    assert (prefix / "share" / "tool.txt").read_text() == "data\n"
    record = (prefix / "conda-meta" / "tool-1.0-h1_0.json").read_text()
    assert json.loads(record)["url"] == f"{lab.url}/linux-64/{NAME}"
    assert lab.read not in record


def test_a_private_channel_without_a_token_is_an_error_that_helps(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RATTLER_AUTH_FILE")
    with pytest.raises(NetworkError, match=r"could not be read.*RATTLER_AUTH_FILE"):
        remote.find(NAME, (lab.url,))
    lab.login("hunter2-hunter2", monkeypatch)
    with pytest.raises(NetworkError) as caught:
        remote.find(NAME, (lab.url,))
    assert "hunter2" not in str(caught.value)


def test_a_channel_that_is_away_is_an_error_and_not_an_hour_of_compiling() -> None:
    with pytest.raises(NetworkError, match="could not be read"):
        remote.find(NAME, ("http://127.0.0.1:9",))


def test_a_changed_byte_on_the_server_is_refused_by_the_engine(lab: Lab, tmp_path: Path) -> None:
    publish([make_package(tmp_path / "made", size=100_000)], lab.url)
    stored = lab.channel / "linux-64" / NAME
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 1
    stored.write_bytes(bytes(data))
    records = solve(Request(specs=("tool",), channels=(lab.url,)))
    with pytest.raises(IntegrityError, match="not what its channel's index says"):
        link(records, tmp_path / "prefix", tmp_path)
    assert not (tmp_path / "prefix").exists()


def test_channels_are_folders_urls_or_names(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    given = (str(tmp_path / "mine"), "https://h.example/x", "conda-forge")
    urls = remote.channel_urls(given)
    assert urls[0] == (tmp_path / "mine").as_uri()
    assert urls[1] == "https://h.example/x/"
    assert urls[2].startswith("https://")
    with pytest.raises(UsageError, match="holds a secret"):
        remote.channel_urls(("https://me:hunter2@h.example/x",))


def test_install_mamba_plans_to_take_packages_from_a_channel(lab: Lab, tmp_path: Path) -> None:
    """The whole command: what the channel has is taken, what it lacks is built; the plan shows no token."""
    here = {
        **environment(tmp_path),
        "RATTLER_AUTH_FILE": str(auth_file(tmp_path, lab.read)),
        "SSM_FORGE_CHANNEL": str(tmp_path / "local"),
    }
    command = [sys.executable, "-m", "ssm_forge", "install-mamba", "--source", "bridge", "--cuda-arch", "9.0"]
    command += ["--dry-run", "--json", "--jobs", "1", "--prefix", str(tmp_path / "prefix")]

    def plan(*more: str) -> dict[str, object]:
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=here, check=False)
        if done.returncode:
            pytest.skip(f"no plan can be made on this machine: {done.stderr.strip()}")
        assert lab.read not in done.stdout + done.stderr
        return {item["name"]: item for item in json.loads(done.stdout)["packages"]}

    build = plan()["causal-conv1d"]
    assert build["state"] == "to build"  # type: ignore[index]
    package = make_package(tmp_path / "made", "causal-conv1d", version=build["version"], build=build["build"])  # type: ignore[index]
    publish([package], lab.url)
    found = plan("--channel", lab.url)
    assert found["causal-conv1d"] == {**build, "state": "in channel", "channel": f"{lab.url}/"}  # type: ignore[dict-item]
    assert found["mamba-ssm"]["state"] == "to build"  # type: ignore[index]
