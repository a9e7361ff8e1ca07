"""Faults while publishing: whoever reads sees the old or the new state, and a rerun completes the work."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import zstandard
from lab import Lab, check_folder, environment, make_package, read_channel, serving

from real_servers import free_port
from ssm_forge.base.errors import MachineError
from ssm_forge.base.files import sha256_of
from ssm_forge.channel import folder as channels
from ssm_forge.publish.send import publish
from ssm_forge.serve.tokens import TokenStore

# Every night and before a release; the usual run does the same less often.
ALL = os.environ.get("SSM_FORGE_TEST_ALL") == "1"
KILLS = 50 if ALL else 8
READS = 20 if ALL else 2


def require_consistent(channel: Path) -> set[str]:
    """Each form of the index, taken by itself, names only whole files with the right hash. Returns all names."""
    folder = channel / "linux-64"
    names: set[str] = set()
    for form in ("repodata.json", "repodata.json.zst"):
        if (folder / form).exists():
            data = (folder / form).read_bytes()
            if form.endswith(".zst"):
                data = zstandard.ZstdDecompressor().stream_reader(data).read()
            for name, record in json.loads(data)["packages.conda"].items():
                assert sha256_of(folder / name) == record["sha256"], (form, name)
                names.add(name)
    return names


def made(folder: Path, count: int, size: int = 20_000) -> list[Path]:
    return [make_package(folder, f"p{number:02}", size=size) for number in range(count)]


@pytest.mark.parametrize("kind", ["folder", "server"])
def test_a_publisher_killed_at_random_moments(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    packages = made(tmp_path / "made", KILLS)
    url, channel = str(tmp_path / "channel"), tmp_path / "channel"
    if kind == "server":
        lab: Lab = request.getfixturevalue("lab")
        url, channel = lab.url, lab.channel
    here = environment(tmp_path / "home", RATTLER_AUTH_FILE=os.environ.get("RATTLER_AUTH_FILE", ""))
    if kind == "folder":
        del here["RATTLER_AUTH_FILE"]
    script = Path(__file__).with_name("killed_publisher.py")
    command = [sys.executable, script, url, tmp_path / "made", str(KILLS), "7"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=here)
    assert process.stdout is not None
    ends = []
    for line in process.stdout:
        ends.append(line.strip())
        require_consistent(channel)
    assert process.wait(600) == 0
    assert len(ends) == KILLS
    assert ends[0] == "ended"
    # Those that are killed at a step, whatever the clock says.
    assert ends.count("killed") >= KILLS // 4
    publish(packages, url)
    assert require_consistent(channel) == check_folder(channel) == {package.name for package in packages}
    assert not list((channel / ".uploads").glob("*.lock"))
    assert len(list((channel / "linux-64").glob("*.conda"))) == KILLS


def test_a_server_killed_at_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = made(tmp_path / "made", KILLS)
    store = TokenStore(tmp_path / "tokens.json")
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", f"127.0.0.1={store.add('writer', 'write', 1)}")
    monkeypatch.setattr("ssm_forge.base.web.ATTEMPTS", 1)
    channel, port, chance = tmp_path / "channel", free_port(), random.Random(7)
    for number in range(KILLS):
        with serving(channel, store, tmp_path / "home", port=port) as server:
            timer = threading.Timer(chance.uniform(0, 0.5), server.process.send_signal, (signal.SIGKILL,))
            timer.start()
            try:
                publish(packages[: number + 1], server.url)
            except Exception as error:
                assert "could not be reached" in str(error), error
            timer.join()
        require_consistent(channel)
    with serving(channel, store, tmp_path / "home", port=port) as server:
        publish(packages, server.url)
        token = store.add("reader", "read", 1)
        assert set(read_channel(server.url, token)) == {package.name for package in packages}


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes; the test is not run where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"not run: no small disk can be mounted ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["folder", "server"])
def test_a_disk_that_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    packages = made(tmp_path / "made", 8, size=300_000)
    store = TokenStore(tmp_path / "tokens.json")
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", f"127.0.0.1={store.add('writer', 'write', 1)}")
    with small_disk(tmp_path / "disk", 1_500_000) as disk:
        channel = disk / "channel"

        def fill(url: str) -> None:
            with pytest.raises(MachineError, match=r"No space left on device"):
                for package in packages:
                    publish([package], url)
            before = require_consistent(channel)
            assert 1 <= len(before) < 8
            assert check_folder(channel) == before
            # With room again, the same command completes the work.
            subprocess.run(["mount", "-o", "remount,size=9000000", str(disk)], check=True)
            publish(packages, url)
            assert check_folder(channel) == {package.name for package in packages}

        if kind == "folder":
            fill(str(channel))
        else:
            with serving(channel, store, tmp_path / "home") as server:
                fill(server.url)


class Cutter:
    """A proxy that cuts the first connections after so many bytes from the client."""

    def __init__(self, target: str, cuts: list[int]) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target, self._cuts = (host, int(port)), cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.passed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        seen = 0
        try:
            while data := source.recv(16_384):
                seen += len(data)
                if from_client:
                    self.passed += len(data)
                    if self._cuts and seen > self._cuts[0]:
                        self._cuts.pop(0)
                        break
                sink.sendall(data)
        except OSError:
            pass
        for side in (source, sink):
            # Shut down alone would leave the client writing into a window that nobody reads.
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()


def test_a_connection_cut_in_mid_upload_goes_on(lab: Lab, tmp_path: Path) -> None:
    package = make_package(tmp_path / "made", size=4_000_000)
    cutter = Cutter(lab.url, [1_000_000, 1_500_000])
    lines: list[str] = []
    try:
        assert publish([package], cutter.url, log=lines.append)[0].outcome == "added"
    finally:
        cutter.close()
    assert len([line for line in lines if line.startswith("attempt")]) >= 2
    assert check_folder(lab.channel) == {package.name}
    # What had arrived was not sent again: less than two whole files went over the wire.
    assert cutter.passed < 1.6 * package.stat().st_size


@pytest.mark.parametrize("kind", ["folder", "server"])
def test_two_publishers_at_once(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    packages = made(tmp_path / "made", 10)
    url, channel = str(tmp_path / "channel"), tmp_path / "channel"
    if kind == "server":
        lab: Lab = request.getfixturevalue("lab")
        url, channel = lab.url, lab.channel
    failures: list[BaseException] = []

    def work(mine: list[Path]) -> None:
        try:
            publish(mine, url)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(order,)) for order in (packages, packages[::-1])]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        require_consistent(channel)
        # Looking without a pause would keep the publishers from the interpreter.
        for thread in threads:
            thread.join(0.01)
    assert not failures
    assert check_folder(channel) == {package.name for package in packages}


def test_200_readers_while_publishing(lab: Lab, tmp_path: Path) -> None:
    packages = made(tmp_path / "made", 12, size=5_000)
    publish(packages[:2], lab.url)
    reads = asyncio.run(_read_and_publish(lab, packages[2:]))
    assert reads >= 200 * READS
    assert check_folder(lab.channel) == {package.name for package in packages}


async def _read_and_publish(lab: Lab, packages: list[Path]) -> int:
    """200 readers, each with a connection of its own, from before the first package until all are published.

    Returns:
        How many packages they read.
    """
    reads, published = 0, False

    async def reader(number: int) -> None:
        nonlocal reads
        chance, mine = random.Random(number), 0
        limits = httpx.Limits(max_connections=1)
        headers = {"Authorization": f"Bearer {lab.read}"}
        async with httpx.AsyncClient(headers=headers, timeout=600, limits=limits, verify=plain) as client:
            while mine < READS or not published:
                index = await client.get(f"{lab.url}/linux-64/repodata.json")
                assert index.status_code == 200
                name, record = chance.choice(sorted(index.json()["packages.conda"].items()))
                package = await client.get(f"{lab.url}/linux-64/{name}")
                assert package.status_code == 200, name
                assert hashlib.sha256(package.content).hexdigest() == record["sha256"], name
                mine += 1
                reads += 1

    async def writer() -> None:
        nonlocal published
        for package in packages:
            await asyncio.to_thread(publish, [package], lab.url)
        published = True

    plain = ssl.create_default_context()  # One for all: making 200 takes seconds.
    await asyncio.gather(writer(), *(reader(number) for number in range(200)))
    return reads


def test_an_index_update_opens_no_package_that_is_listed(tmp_path: Path) -> None:
    """What it costs does not grow with the bytes of the channel: none of them are there any more."""
    channel = tmp_path / "channel"
    listed = made(tmp_path / "made", 30)
    publish(listed, str(channel))
    digests = {path.name: sha256_of(path) for path in listed}
    for name in digests:
        (channel / "linux-64" / name).write_bytes(b"")
    fresh = make_package(tmp_path / "made", "fresh")
    publish([fresh], str(channel))
    digests[fresh.name] = sha256_of(fresh)
    assert {name: record.sha256 for name, record in channels.records(channel).items()} == digests
