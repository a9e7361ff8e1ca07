"""Downloads against a local server that cuts, refuses and lies."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from front_door import own_environment
from ssm_forge.base import fetch, locks, owners
from ssm_forge.base.errors import IntegrityError, MachineError, NetworkError
from ssm_forge.base.fetch import Artifact, cached_path, checked, fetch_all, mirrored, missing
from ssm_forge.base.paths import Workspace

DATA = {f"file{i}.whl": bytes([i]) * (3 * (1 << 20) + i) for i in range(4)}


# Only turns a hang into a failure.
PATIENCE_SECONDS = 120.0


class Server(ThreadingHTTPServer):
    """Serves :data:`DATA`; ``requests`` are (path, Range) pairs in order of arrival.

    Attributes:
        cut_after: how many bytes of a file are sent before the connection is cut.
        together: answers come when so many were asked for.
        go_on: when cleared, each answer stops in its middle until it is set.
        begun: set when an answer has come to its middle.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str]] = []
        self.cut_after: dict[str, int] = {}
        self.statuses: dict[str, list[int]] = {}
        self.together: threading.Barrier | None = None
        self.go_on, self.begun = threading.Event(), threading.Event()
        self.go_on.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers.get("Range", "")
        self.server.requests.append((name, wanted))
        if self.server.together is not None:
            self.server.together.wait(PATIENCE_SECONDS)
        status = self.server.statuses[name].pop(0) if self.server.statuses.get(name) else 200
        if name not in DATA or status != 200:
            self.send_error(404 if name not in DATA else status)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = DATA[name][start:]
        if not body:
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: self.server.cut_after.pop(name, len(body))]
        middle = len(body) // 2
        self.wfile.write(body[:middle])
        self.server.begun.set()
        self.server.go_on.wait(PATIENCE_SECONDS)
        with suppress(ConnectionError):
            self.wfile.write(body[middle:])
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path, cache=tmp_path / "cache")


class Pauses(list[float]):
    """How long each pause between two attempts was to be; none is waited for.

    Attributes:
        meanwhile: what happens in each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], object] = lambda: None


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    noted = Pauses()

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            noted.append(timeout)
            noted.meanwhile()
            return self.is_set()

    monkeypatch.setattr(fetch, "threading", SimpleNamespace(Event=Stop))
    return noted


@contextmanager
def dead_host() -> Iterator[str]:
    """A port that is taken and refuses every connection."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


def hold_until_cancelled(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers stop in their middle until what is queued was cancelled."""
    server.go_on.clear()

    class Pool(ThreadPoolExecutor):
        def __exit__(self, *error: object) -> None:
            server.go_on.set()
            self.shutdown()

    monkeypatch.setattr(fetch, "ThreadPoolExecutor", Pool)


def artifact(server_url: str, name: str, data: bytes | None = None) -> Artifact:
    content = DATA[name] if data is None else data
    return Artifact(f"{server_url}/{name}", hashlib.sha256(content).hexdigest(), len(content), name)


# What a process of another machine is marked with.
FOREIGN = "0123456789ab-7-99"


def ended() -> str:
    """The mark of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return owners.mark(process.pid)


def kept(place: Workspace) -> list[str]:
    return sorted(path.name for path in place.downloads.rglob("*") if path.is_file())


def test_files_come_at_once_and_only_once(server: Server, place: Workspace) -> None:
    wanted = [artifact(server.url, name) for name in DATA]
    server.together = threading.Barrier(len(wanted))
    found = fetch_all([*wanted, wanted[0]], place)
    assert {path.name: path.read_bytes() for path in found.values()} == DATA
    assert missing(wanted, place) == []
    fetch_all(wanted, place)
    assert len(server.requests) == len(DATA)


def test_a_cut_connection_goes_on_where_it_was(
    server: Server, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_CHUNK_BYTES", 1 << 16)
    server.cut_after["file1.whl"] = 2 << 20
    wanted = artifact(server.url, "file1.whl")
    assert fetch_all([wanted], place)[wanted].read_bytes() == DATA["file1.whl"]
    first, second = server.requests
    assert first == ("file1.whl", "")
    assert 0 < int(second[1].removeprefix("bytes=").rstrip("-")) <= 2 << 20


def test_a_killed_run_is_gone_on_with(server: Server, place: Workspace) -> None:
    wanted = artifact(server.url, "file2.whl")
    target = cached_path(wanted, place)
    target.parent.mkdir(parents=True)
    target.with_name(f"{target.name}.{ended()}.part").write_bytes(DATA["file2.whl"][:1000])
    assert fetch_all([wanted], place)[wanted].read_bytes() == DATA["file2.whl"]
    assert server.requests == [("file2.whl", "bytes=1000-")]
    assert kept(place) == ["file2.whl"]


@pytest.mark.parametrize("mark", [FOREIGN, "4000000"], ids=["other machine", "older version"])
def test_what_another_machine_is_downloading_is_left_to_it(server: Server, place: Workspace, mark: str) -> None:
    wanted = artifact(server.url, "file2.whl")
    target = cached_path(wanted, place)
    target.parent.mkdir(parents=True)
    theirs = target.with_name(f"{target.name}.{mark}.part")
    with theirs.open("wb") as stream:
        locks.acquire(stream)
        stream.write(DATA["file2.whl"][:1000])
        stream.flush()
        assert fetch_all([wanted], place)[wanted].read_bytes() == DATA["file2.whl"]
        stream.write(b"and goes on")
    assert server.requests == [("file2.whl", "")]
    assert theirs.read_bytes() == DATA["file2.whl"][:1000] + b"and goes on"


def test_what_another_machine_or_boot_has_left_is_gone_on_with(server: Server, place: Workspace) -> None:
    """Its lock is free."""
    wanted = artifact(server.url, "file2.whl")
    target = cached_path(wanted, place)
    target.parent.mkdir(parents=True)
    target.with_name(f"{target.name}.{FOREIGN}.part").write_bytes(DATA["file2.whl"][:1000])
    assert fetch_all([wanted], place)[wanted].read_bytes() == DATA["file2.whl"]
    assert server.requests == [("file2.whl", "bytes=1000-")]
    assert kept(place) == ["file2.whl"]


def test_a_leftover_that_is_too_long_starts_over(server: Server, place: Workspace) -> None:
    wanted = artifact(server.url, "file2.whl")
    target = cached_path(wanted, place)
    target.parent.mkdir(parents=True)
    target.with_name(f"{target.name}.{ended()}.part").write_bytes(DATA["file2.whl"])
    assert fetch_all([wanted], place)[wanted].read_bytes() == DATA["file2.whl"]


def test_a_damaged_leftover_starts_over(server: Server, place: Workspace) -> None:
    wanted = artifact(server.url, "file2.whl")
    target = cached_path(wanted, place)
    target.parent.mkdir(parents=True)
    target.with_name(f"{target.name}.{ended()}.part").write_bytes(b"damaged")
    assert fetch_all([wanted], place)[wanted].read_bytes() == DATA["file2.whl"]
    assert kept(place) == ["file2.whl"]


def test_other_bytes_are_refused_and_nothing_is_kept(server: Server, place: Workspace) -> None:
    wanted = artifact(server.url, "file0.whl", b"what the lock says")
    with pytest.raises(IntegrityError) as refused:
        fetch_all([wanted], place)
    assert hashlib.sha256(DATA["file0.whl"]).hexdigest() in refused.value.what
    assert wanted.sha256 in refused.value.what
    assert wanted.url in refused.value.what
    assert kept(place) == []


def test_a_file_that_is_gone_names_the_command_that_refreshes_the_lock(server: Server, place: Workspace) -> None:
    gone = artifact(server.url, "gone.whl", b"x")
    with pytest.raises(NetworkError, match=r"gone\.whl answered 404.*bump bridge"):
        fetch_all([gone], place)
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again_after_a_pause(server: Server, place: Workspace, pauses: Pauses) -> None:
    server.statuses["file0.whl"] = [503, 429]
    fetch_all([artifact(server.url, "file0.whl")], place)
    assert len(server.requests) == 3
    assert pauses == [1, 2]


def test_one_failure_stops_what_runs_and_what_is_queued(
    server: Server, place: Workspace, monkeypatch: pytest.MonkeyPatch, pauses: Pauses
) -> None:
    """The host of the largest file gives up when the next one is half there; the smallest one is never asked for."""
    monkeypatch.setattr(fetch, "_PARALLEL", 2)
    hold_until_cancelled(server, monkeypatch)
    pauses.meanwhile = lambda: server.begun.wait(PATIENCE_SECONDS)
    with dead_host() as dead:
        wanted = [artifact(dead if name == "file3.whl" else server.url, name) for name in DATA]
        with pytest.raises(NetworkError, match=f"{dead}/file3.whl could not be downloaded"):
            fetch_all(wanted, place)
    asked = [name for name, _ in server.requests]
    assert asked.count("file2.whl") == 1
    assert "file0.whl" not in asked
    assert missing(wanted, place) == wanted


def test_a_dead_host_is_one_clear_error_after_two_attempts(place: Workspace, pauses: Pauses) -> None:
    with (
        dead_host() as dead,
        pytest.raises(NetworkError, match=f"{dead}/file0.whl could not be downloaded") as failed,
    ):
        fetch_all([artifact(dead, "file0.whl")], place)
    assert pauses == [1]
    assert "\n" not in str(failed.value)
    assert "SSM_FORGE_MIRRORS" in failed.value.fix


def test_ctrl_c_does_not_wait_for_what_is_queued(
    server: Server, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "wait", interrupted)
    monkeypatch.setattr(fetch, "_PARALLEL", 1)
    hold_until_cancelled(server, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fetch_all([artifact(server.url, name) for name in DATA], place)
    assert len(server.requests) <= 1


def test_mirror_rules_replace_prefixes(server: Server, place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "SSM_FORGE_MIRRORS", f"https://a.example=https://b.example broken https://files.example/x={server.url}"
    )
    assert mirrored("https://a.example/p/1") == "https://b.example/p/1"
    assert mirrored("https://other.example/p/1") == "https://other.example/p/1"
    wanted = artifact("https://files.example/x", "file3.whl")
    assert fetch_all([wanted], place)[wanted].read_bytes() == DATA["file3.whl"]


def test_a_cached_file_that_was_changed_is_refused_and_removed(server: Server, place: Workspace) -> None:
    wanted = artifact(server.url, "file1.whl")
    path = fetch_all([wanted], place)[wanted]
    assert checked(wanted, place) == path
    path.write_bytes(b"tampered")
    with pytest.raises(IntegrityError, match=f"sha256 of {path} is .*, but the lock says {wanted.sha256}"):
        checked(wanted, place)
    assert missing([wanted], place) == [wanted]


def test_a_full_disk_says_how_much_is_needed(server: Server, place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "_download", full)
    with pytest.raises(MachineError, match=r"disk of .* is full; file0\.whl needs 3\.1 MB"):
        fetch_all([artifact(server.url, "file0.whl")], place)


def test_two_processes_at_once_both_get_the_file(server: Server, place: Workspace) -> None:
    wanted = artifact(server.url, "file3.whl")
    target = cached_path(wanted, place)
    target.parent.mkdir(parents=True)
    target.with_name(f"{target.name}.{ended()}.part").write_bytes(DATA["file3.whl"][:5000])
    script = (
        "from pathlib import Path; from ssm_forge.base.fetch import *; from ssm_forge.base.paths import Workspace\n"
        f"a = Artifact({wanted.url!r}, {wanted.sha256!r}, {wanted.size}, {wanted.name!r})\n"
        f"fetch_all([a], Workspace(Path({str(place.root)!r}), Path({str(place.cache)!r})))"
    )
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, env=own_environment(), stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert target.read_bytes() == DATA["file3.whl"]
    assert kept(place) == ["file3.whl"]
