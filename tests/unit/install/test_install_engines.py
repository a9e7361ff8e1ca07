"""Making a prefix with every engine that pixi.toml allows: beside its place, or in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from conda_channel import demo_channel, make_package, served, solve_channel
from ssm_forge.base.errors import ForgeError, InstallError, IntegrityError, NetworkError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import open_log
from ssm_forge.install import from_lock
from ssm_forge.install import prefix as installing
from ssm_forge.install.marker import Installed, is_foreign, read_marker
from ssm_forge.install.prefix import install
from ssm_forge.solve.solver import Request, solve

OURS = Installed(variant="cu130", python="3.12", source="conda", packages=("tool-1.0-h1_0.conda",), created=True)


@pytest.fixture(params=["relocating engine", "in place"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of making a prefix: py-rattler 0.28 beside its place, 0.25 in it."""
    if request.param == "in place":
        monkeypatch.setattr(installing, "_engine_relocates", lambda: False)
    elif not installing._engine_relocates():
        pytest.skip("this py-rattler can't make a prefix beside its place")


@pytest.mark.usefixtures("engine")
def test_a_prefix_of_our_own_is_made_and_replaced(tmp_path: Path) -> None:
    place = Workspace(root=tmp_path, cache=tmp_path / "cache")
    records = solve_channel(demo_channel(tmp_path), "tool")
    prefix = tmp_path / "envs" / "cu130"
    with open_log(tmp_path / "logs", "install") as log:
        install(records, prefix, OURS, place, log)
        (prefix / "stray").touch()
        install(records, prefix, OURS, place, log)
    assert read_marker(prefix) == OURS
    assert not is_foreign(prefix)
    assert (prefix / "bin/tool").exists()
    assert not (prefix / "stray").exists()
    assert [p.name for p in prefix.parent.iterdir() if p.name != ".cu130.lock"] == ["cu130"]


@pytest.mark.usefixtures("engine")
def test_a_failure_leaves_the_old_prefix_as_it_was(tmp_path: Path) -> None:
    place = Workspace(root=tmp_path, cache=tmp_path / "cache")
    channel = demo_channel(tmp_path)
    records = solve_channel(channel, "tool")
    prefix = tmp_path / "envs" / "cu130"
    with open_log(tmp_path / "logs", "install") as log:
        install(records, prefix, OURS, place, log)
        (channel / "linux-64" / "tool-1.0-h1_0.conda").write_bytes(b"not a package")
        for cached in place.package_cache.glob("tool-*"):
            if cached.is_dir():
                (cached / "info/index.json").unlink()
        with pytest.raises(IntegrityError):
            install(records, prefix, OURS, place, log)
    assert (prefix / "bin/tool").exists()
    assert read_marker(prefix) == OURS
    assert [p.name for p in prefix.parent.iterdir() if p.name != ".cu130.lock"] == ["cu130"]


_FETCH = "failed to fetch tool-1.0-h1_0.conda\nCaused by: failed to interact with the package cache layer.\nCaused by: "
_BODY = "error decoding response body\nCaused by: error reading a body from connection\nCaused by: end of file before"
_LOCAL = "http://127.0.0.1:41473/linux-64/tool-1.0-h1_0.conda"

# What the engines said, word for word, of packages over HTTP that were changed after their index was written, of
# servers that failed, and of a cache that can't be written.
MESSAGES = (
    (IntegrityError, f"hash mismatch when extracting {_LOCAL} to /cache/.tool: expected 98eafca8, got 9a023a43"),
    (IntegrityError, "an io error occurred: Invalid checksum\nCaused by: Invalid checksum"),
    (IntegrityError, "invalid zip archive: invalid Zip archive: Invalid local file header"),
    (IntegrityError, "an io error occurred: zstd stream did not finish\nCaused by: zstd stream did not finish"),
    (
        IntegrityError,
        "an io error occurred: Encountered an unexpected header (actual: 0x20746f6e, expected: 0x4034b50).",
    ),
    (IntegrityError, "an io error occurred: archive header checksum mismatch"),
    (IntegrityError, "an io error occurred: failed to fill whole buffer"),
    (IntegrityError, "an io error occurred: unexpected end of file"),
    (NetworkError, f"an io error occurred: {_BODY} message length reached"),
    (NetworkError, f"HTTP status client error (404 Not Found) for url ({_LOCAL})"),
    (NetworkError, f"HTTP status server error (503 Service Unavailable) for url ({_LOCAL})"),
    (NetworkError, f"error sending request for url ({_LOCAL})\nCaused by: Connection refused (os error 111)"),
    (InstallError, "failed to create directory `/cache/.tool`: No space left on device (os error 28)"),
)


@pytest.mark.parametrize(("kind", "message"), MESSAGES)
def test_each_of_the_engines_messages_is_told_as_the_kind_that_it_is(
    kind: type[ForgeError], message: str, tmp_path: Path
) -> None:
    with open_log(tmp_path, "install") as log:
        by_install = installing._explained(RuntimeError(_FETCH + message), tmp_path, log)
    by_environment = from_lock._explain(_FETCH + message)
    for error in (by_install, by_environment):
        assert type(error) is kind
        assert "tool-1.0-h1_0.conda" in str(error)
        assert message.rpartition("Caused by: ")[2].rstrip(".") in str(error)


def test_a_channel_that_wants_a_token_is_answered_with_where_to_put_it(tmp_path: Path) -> None:
    with open_log(tmp_path, "install") as log:
        refused = RuntimeError(f"{_FETCH}HTTP status client error (401 Unauthorized) for url ({_LOCAL})")
        assert "RATTLER_AUTH_FILE" in installing._explained(refused, tmp_path, log).fix


def changed(whole: bytes, damage: str) -> bytes:
    middle = len(whole) // 2
    if damage == "a changed byte":
        return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    return whole[:middle] if damage == "cut short" else b"not a package"


@pytest.mark.parametrize("damage", ["another package", "a changed byte", "cut short", "no package"])
def test_a_package_that_changed_on_the_server_is_an_integrity_error(tmp_path: Path, damage: str) -> None:
    place = Workspace(root=tmp_path, cache=tmp_path / "cache")
    channel = demo_channel(tmp_path)
    with served(channel) as url, open_log(tmp_path / "logs", "install") as log:
        records = solve(Request(specs=("tool",), channels=(url,)))
        package = channel / "linux-64" / "tool-1.0-h1_0.conda"
        if damage == "another package":
            make_package(channel, "tool", {"bin/tool": "evil"})
        else:
            package.write_bytes(changed(package.read_bytes(), damage))
        with pytest.raises(IntegrityError, match="not what its channel's index says"):
            install(records, tmp_path / "envs" / "cu130", OURS, place, log)
    assert not (tmp_path / "envs" / "cu130").exists()
