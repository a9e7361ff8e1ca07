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
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import zstandard
from conftest import Lab
from lab import check_folder, environment, make_package, read_channel, serving
from real_servers import free_port

from ssm_forge.errors import MachineError
from ssm_forge.fetch import sha256_of
from ssm_forge.publish import publish
from ssm_forge.tokens import TokenStore


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
def test_a_publisher_killed_at_50_random_moments(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    packages = made(tmp_path / "made", 50)
    url, channel = str(tmp_path / "channel"), tmp_path / "channel"
    if kind == "server":
        lab: Lab = request.getfixturevalue("lab")
        url, channel = lab.url, lab.channel
    here = environment(tmp_path / "home", RATTLER_AUTH_FILE=os.environ.get("RATTLER_AUTH_FILE", ""))
    if kind == "folder":
        del here["RATTLER_AUTH_FILE"]
    script = Path(__file__).with_name("killed_publisher.py")
    command = [sys.executable, script, url, tmp_path / "made", "50", "7"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=here)
    assert process.stdout is not None
    ends = []
    for line in process.stdout:
        ends.append(line.split()[1])
        require_consistent(channel)
    assert process.wait(60) == 0
    assert len(ends) == 50
    assert ends.count("killed") >= 10
    publish(packages, url)
    assert require_consistent(channel) == check_folder(channel) == {package.name for package in packages}
    assert not list((channel / ".uploads").glob("*.lock"))
    assert len(list((channel / "linux-64").glob("*.conda"))) == 50


@pytest.mark.slow
def test_a_server_killed_at_50_random_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = made(tmp_path / "made", 50)
    store = TokenStore(tmp_path / "tokens.json")
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", f"127.0.0.1={store.add('writer', 'write', 1)}")
    monkeypatch.setattr("ssm_forge.publish._ATTEMPTS", 1)
    channel, port, chance = tmp_path / "channel", free_port(), random.Random(7)
    for number in range(50):
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
    assert not failures
    assert check_folder(channel) == {package.name for package in packages}


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.slow)], ids=["short", "30 seconds"])
def test_200_readers_while_publishing(lab: Lab, tmp_path: Path, seconds: int) -> None:
    packages = made(tmp_path / "made", 12, size=5_000)
    publish(packages[:2], lab.url)
    reads = asyncio.run(_read_and_publish(lab, packages[2:], seconds))
    assert reads >= 200
    assert check_folder(lab.channel) == {package.name for package in packages}


async def _read_and_publish(lab: Lab, packages: list[Path], seconds: int) -> int:
    """200 readers, each with a connection of its own; returns how many packages they read."""
    until, reads = time.monotonic() + seconds, 0

    async def reader(number: int) -> None:
        nonlocal reads
        chance = random.Random(number)
        limits = httpx.Limits(max_connections=1)
        headers = {"Authorization": f"Bearer {lab.read}"}
        async with httpx.AsyncClient(headers=headers, timeout=60, limits=limits, verify=plain) as client:
            while True:
                index = await client.get(f"{lab.url}/linux-64/repodata.json")
                assert index.status_code == 200
                name, record = chance.choice(sorted(index.json()["packages.conda"].items()))
                package = await client.get(f"{lab.url}/linux-64/{name}")
                assert package.status_code == 200, name
                assert hashlib.sha256(package.content).hexdigest() == record["sha256"], name
                reads += 1
                if time.monotonic() > until:
                    return

    async def writer() -> None:
        for package in packages:
            await asyncio.to_thread(publish, [package], lab.url)

    import ssl

    plain = ssl.create_default_context()  # One for all: making 200 takes seconds.
    await asyncio.gather(writer(), *(reader(number) for number in range(200)))
    return reads


def test_a_channel_of_1000_packages_is_indexed_in_under_two_seconds(tmp_path: Path) -> None:
    from rattler_build import assemble_package

    content = tmp_path / "content"
    content.mkdir()
    (content / "data.txt").write_text("data\n")
    channel = tmp_path / "channel"
    for number in range(1000):
        assemble_package(
            name=f"p{number}",
            version="1.0",
            build_string="h1_0",
            target_platform="linux-64",
            output_dir=str(channel / "linux-64"),
            files_dir=str(content),
            compression_level=1,
        )
    publish([make_package(tmp_path / "made", "first")], str(channel))
    best = 1e9
    for number in range(3):
        package = make_package(tmp_path / "made", f"next{number}")
        started, used = time.monotonic(), time.process_time()
        publish([package], str(channel))
        # On a machine that others keep busy, the processor's own time says what the wall clock can't.
        best = min(best, time.monotonic() - started, time.process_time() - used)
    assert len(check_folder(channel)) == 1004
    print(f"index update of 1,000 packages: {best:.2f} s")
    assert best < 2
