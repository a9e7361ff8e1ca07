"""The channel in a folder: additions appear whole, the index follows, killed runs are repaired."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conda_channel import make_package, solve_channel
from front_door import own_environment
from ssm_forge.base.files import sha256_of
from ssm_forge.channel import folder as channels


@pytest.fixture
def channel(tmp_path: Path) -> Path:
    return tmp_path / "channel"


def built(tmp_path: Path, content: str = "one\n", *, name: str = "demo") -> Path:
    """A finished package outside the channel."""
    return make_package(tmp_path / "staging", name, {"share/demo.txt": content})


def record(channel: Path, filename: str) -> dict[str, object]:
    data = json.loads((channel / "linux-64/repodata.json").read_text())
    found: dict[str, object] = data["packages.conda"][filename]
    return found


def test_an_added_package_is_there_listed_and_solvable(tmp_path: Path, channel: Path) -> None:
    package = built(tmp_path)
    digest = sha256_of(package)
    target = channels.add(channel, package)
    assert channels.find(channel, target.name) == target
    assert channels.listed(channel) == {target.name}
    assert record(channel, target.name)["sha256"] == digest == sha256_of(target)
    assert not package.exists()
    assert [r.file_name for r in solve_channel(channel, "demo")] == [target.name]
    assert not list(channel.rglob("*.part"))


def test_a_package_built_anew_replaces_the_old_one(tmp_path: Path, channel: Path) -> None:
    channels.add(channel, built(tmp_path))
    target = channels.add(channel, built(tmp_path, "two, and longer\n"))
    assert record(channel, target.name)["sha256"] == sha256_of(target)


def test_a_package_comes_from_another_disk(tmp_path: Path, channel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = built(tmp_path)
    rename = os.replace

    def no_crossing(source, target, **options):  # type: ignore[no-untyped-def]
        if Path(source).is_relative_to(channel) != Path(target).is_relative_to(channel):
            raise OSError(18, "Invalid cross-device link")
        rename(source, target, **options)

    monkeypatch.setattr(os, "replace", no_crossing)
    monkeypatch.setattr(os, "rename", no_crossing)
    assert channels.add(channel, package).exists()


def test_nothing_is_found_in_a_channel_that_is_not_there(channel: Path) -> None:
    assert channels.find(channel, "demo-1.0-h1_0.conda") is None
    assert channels.listed(channel) == set()


@pytest.mark.parametrize("before", [None, "the old one\n"])
def test_killed_between_rename_and_index_is_repaired(tmp_path: Path, channel: Path, before: str | None) -> None:
    if before is not None:
        channels.add(channel, built(tmp_path, before))
    package = built(tmp_path, "the new one\n")
    digest = sha256_of(package)
    script = (
        "import os, signal, sys; from pathlib import Path; from ssm_forge.channel import folder as channel\n"
        "channel.index = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"channel.add(Path({str(channel)!r}), Path({str(package)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=own_environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    target = channel / "linux-64" / package.name
    assert sha256_of(target) == digest
    channels.ensure_indexed(channel)
    assert record(channel, target.name)["sha256"] == digest
    stamp = (channel / "linux-64/repodata.json").stat().st_mtime_ns
    channels.ensure_indexed(channel)
    assert (channel / "linux-64/repodata.json").stat().st_mtime_ns == stamp


def test_killed_while_copying_leaves_no_package(tmp_path: Path, channel: Path) -> None:
    channels.add(channel, built(tmp_path, name="other"))
    package = built(tmp_path)
    script = (
        "import os, shutil, signal; from pathlib import Path; from ssm_forge.channel import folder as channel\n"
        "def half(source, target):\n"
        "    Path(target).write_bytes(Path(source).read_bytes()[:100]); os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.copyfile = half\n"
        f"channel.add(Path({str(channel)!r}), Path({str(package)!r}))"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], env=own_environment(), check=False).returncode == -signal.SIGKILL
    )
    channels.ensure_indexed(channel)
    assert channels.listed(channel) == {"other-1.0-h1_0.conda"}
    assert channels.find(channel, package.name) is None
    channels.add(channel, package)
    assert channels.listed(channel) == {"other-1.0-h1_0.conda", package.name}
    assert not list(channel.rglob("*.part"))


def test_a_file_that_was_deleted_is_no_longer_listed(tmp_path: Path, channel: Path) -> None:
    target = channels.add(channel, built(tmp_path))
    target.unlink()
    channels.ensure_indexed(channel)
    assert channels.listed(channel) == set()


def test_an_empty_channel_gets_an_index(channel: Path) -> None:
    channels.ensure_indexed(channel)
    assert (channel / "linux-64/repodata.json").exists()
    assert (channel / "noarch/repodata.json").exists()


def test_one_writer_at_a_time(channel: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with channels.locked(channel):
            order.append("second")

    with channels.locked(channel):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
