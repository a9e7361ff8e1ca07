"""Our own server among clients that are slow, silent, lying or guessing: all of it on the loopback address.

Nothing here depends on the clock: what is counted are requests, answers, bytes and the calls that a look-up makes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import http.client
import itertools
import os
import resource
import socket
import string
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
from lab import Lab, check_folder, make_package, read_channel, serving
from starlette.exceptions import HTTPException

from ssm_forge.base import locks
from ssm_forge.publish.send import publish
from ssm_forge.serve.answers import _open_beneath
from ssm_forge.serve.tokens import TokenStore
from ssm_forge.serve.uploads import _WORKERS, Uploads

NAME = "tool-1.0-h1_0.conda"
# What a connection may cost the server: sockets' buffers, a piece of an upload, what Python keeps of a request.
BYTES_A_CONNECTION = 512 << 10


@dataclass(frozen=True)
class Load:
    """How much of it.

    Attributes:
        slow: connections that stay open: readers that do not read, uploads and requests that stop in the middle.
        guesses: wrong tokens.
        every: of the paths that could lead out, each one of so many.
    """

    slow: int
    guesses: int
    every: int


FULL = Load(slow=200, guesses=10_000, every=1)
LOADS = [
    pytest.param(Load(slow=30, guesses=300, every=11), id="small"),
    pytest.param(FULL, id="full", marks=pytest.mark.nightly),
]


class Memory:
    """Resident memory of a process, in bytes: now, and the most since this was made."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        (self._folder / "clear_refs").write_text("5")  # The peak is counted from here.
        self.before = self._field("VmRSS")

    @property
    def grown(self) -> int:
        return self._field("VmHWM") - self.before

    def _field(self, name: str) -> int:
        lines = (self._folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def connect(lab: Lab) -> socket.socket:
    host, port = lab.url.removeprefix("http://").split(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # Of who does not read, little fits on the way.
    made.settimeout(600)
    made.connect((host, int(port)))
    return made


def head(method: str, path: str, token: str, *fields: str) -> bytes:
    shown = [f"Authorization: Bearer {token}"] if token else []
    lines = [f"{method} {path} HTTP/1.1", "Host: lab", *shown, *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def announced(data: bytes) -> str:
    return f"Repr-Digest: sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def ask(lab: Lab, method: str, path: str, token: str, *fields: str, body: bytes = b"") -> tuple[int, bytes]:
    """One request, sent exactly as it is; returns status and body."""
    with contextlib.closing(connect(lab)) as connection:
        with contextlib.suppress(ConnectionError):  # A refusal may come before the body was sent.
            connection.sendall(head(method, path, token, "Connection: close", *fields) + body)
        answer = http.client.HTTPResponse(connection, method=method)
        answer.begin()
        return answer.status, answer.read()


def log_of(lab: Lab) -> str:
    return "".join(path.read_text() for path in (lab.home / "logs").glob("serve-*.log"))


# --- slow clients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADS)
def test_slow_clients_and_half_sent_uploads_lose_nothing_and_hold_nobody_up(
    lab: Lab, tmp_path: Path, load: Load
) -> None:
    large = make_package(tmp_path / "made", size=4_000_000)
    publish([large], lab.url)
    parcels = [make_package(tmp_path / "made", f"p{number:03}", size=200_000) for number in range(load.slow // 3)]
    halves = {path: path.read_bytes()[: path.stat().st_size // 2] for path in parcels}
    memory = Memory(lab.server.process.pid)
    publish([make_package(tmp_path / "made", "alone", size=50_000)], lab.url)
    # What each of the few uploads that are checked and indexed at a time may take, whoever else is there.
    alone = memory.grown
    memory = Memory(lab.server.process.pid)

    readers = [connect(lab) for _ in range(load.slow // 3)]
    for connection in readers:
        connection.sendall(head("GET", f"/linux-64/{NAME}", lab.read, "Connection: close"))
    uploads = {path: connect(lab) for path in parcels}
    for path, connection in uploads.items():
        data = path.read_bytes()
        fields = (announced(data), f"Content-Length: {len(data)}")
        connection.sendall(head("PUT", f"/linux-64/{path.name}", lab.write, *fields) + halves[path])
    silent = [connect(lab) for _ in range(load.slow - len(readers) - len(uploads))]
    for connection in silent:
        connection.sendall(b"GET /linux-64/repodata.json HTTP/1.1\r\nAuthoriza")

    # All of them are still there; others read and publish as ever.
    for number in range(3):
        fresh = make_package(tmp_path / "made", f"fresh{number}", size=50_000)
        publish([fresh], lab.url)
        assert fresh.name in read_channel(lab.url, lab.read)
    assert memory.grown < alone + load.slow * BYTES_A_CONNECTION

    # Nobody else may write into a file that is being received.
    first = parcels[0].read_bytes()
    fields = (announced(first), f"Content-Range: bytes 0-{len(first) - 1}/{len(first)}", "Content-Length: 1")
    assert ask(lab, "PUT", f"/linux-64/{parcels[0].name}", lab.write, *fields, body=b"x")[0] == 423
    # Some hang up and come back later, others go on (a test machine that is very slow may have been given up by then).
    for connection in [*silent, *(uploads[path] for path in parcels[::2])]:
        connection.close()
    statuses = Counter(finish(uploads[path], path.read_bytes()[len(halves[path]) :]) for path in parcels[1::2])
    assert set(statuses) <= {201, 408}
    assert {outcome.outcome for outcome in publish(parcels, lab.url)} == {"added", "was there"}
    for connection in readers:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert hashlib.sha256(answer.read()).digest() == hashlib.sha256(large.read_bytes()).digest()
        connection.close()
    print(
        f"{load.slow} connections: {memory.before >> 10} kB before, {memory.grown >> 10} kB more at most "
        f"({alone >> 10} kB for one upload alone), uploads that went on: {dict(statuses)}"
    )
    assert memory.grown < _WORKERS * alone + load.slow * BYTES_A_CONNECTION
    fresh_names = {f"{name}-1.0-h1_0.conda" for name in ("alone", "fresh0", "fresh1", "fresh2")}
    assert check_folder(lab.channel) == {NAME, *fresh_names, *(path.name for path in parcels)}
    assert not [path.name for path in (lab.channel / ".uploads").iterdir() if not path.name.startswith(".")]
    assert " 500 " not in log_of(lab)


def finish(connection: socket.socket, rest: bytes) -> int:
    """Send the rest of an upload; returns the answer's status."""
    with contextlib.closing(connection), contextlib.suppress(ConnectionError):
        connection.sendall(rest)
        answer = http.client.HTTPResponse(connection, method="PUT")
        answer.begin()
        return answer.status
    return 408


def body(*chunks: bytes, then_silent: bool = False) -> AsyncIterator[bytes]:
    async def come() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk
        if then_silent:
            await asyncio.Event().wait()

    return come()


def receive(uploads: Uploads, data: bytes, stream: AsyncIterator[bytes], first: int = 0) -> int:
    sha256 = hashlib.sha256(data).hexdigest()
    return asyncio.run(uploads.receive(stream, "linux-64", NAME, sha256, first, len(data), "writer"))


def test_a_client_that_falls_silent_does_not_keep_the_file_from_its_next_attempt(tmp_path: Path) -> None:
    data = make_package(tmp_path / "made").read_bytes()
    uploads = Uploads(tmp_path / "channel", print, patience_seconds=0.01)
    with pytest.raises(HTTPException) as caught:
        receive(uploads, data, body(data[:100], then_silent=True))
    assert (caught.value.status_code, caught.value.detail) == (
        408,
        f"Nothing came any more after byte 100 of {len(data)}.",
    )
    assert uploads.received(hashlib.sha256(data).hexdigest()) == 100
    assert receive(uploads, data, body(data[100:]), first=100) == 201
    assert check_folder(tmp_path / "channel") == {NAME}


def test_two_uploads_of_one_file_do_not_mix_where_there_are_no_file_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "acquire", lambda *_, **__: None)
    data = make_package(tmp_path / "made").read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    uploads = Uploads(tmp_path / "channel", print)

    async def both() -> int:
        async def other() -> AsyncIterator[bytes]:
            yield data[:100]
            with pytest.raises(HTTPException, match="Somebody else"):
                await uploads.receive(body(data), "linux-64", NAME, sha256, 0, len(data), "writer")
            yield data[100:]

        return await uploads.receive(other(), "linux-64", NAME, sha256, 0, len(data), "writer")

    assert asyncio.run(both()) == 201


def test_a_lock_that_another_server_has_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, the other one ended, and a third may hold the file of that name by now."""
    acquire = locks.acquire

    def late(stream: object, *arguments: object, **options: bool) -> bool | None:
        Path(stream.name).unlink(missing_ok=True)  # type: ignore[attr-defined]
        return acquire(stream, **options)  # type: ignore[arg-type]

    uploads = Uploads(tmp_path / "channel", print)
    monkeypatch.setattr(locks, "acquire", late)
    with pytest.raises(HTTPException, match="Somebody else"):
        receive(uploads, b"data", body(b"data"))


@pytest.mark.parametrize(("number", "status"), [(errno.EMFILE, 503), (errno.EIO, 503), (errno.ENOENT, 404)])
def test_a_file_that_cant_be_opened_now_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    (tmp_path / "linux-64").mkdir()
    system = os.open

    def fails(path: object, *arguments: int, **options: int) -> int:
        if path == NAME:
            raise OSError(number, os.strerror(number))
        return system(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(HTTPException, match=str(status)):
        _open_beneath(tmp_path, ("linux-64", NAME))


# --- ranges that lie --------------------------------------------------------------------------------------------------

_HUGE = "9" * 5_000


def test_lying_ranges_of_readers_get_true_bytes_or_a_refusal(lab: Lab, tmp_path: Path) -> None:
    whole = make_package(lab.channel / "linux-64", size=100_000).read_bytes()
    size = len(whole)
    many = ",".join(f"{number}-{number}" for number in range(0, 8_000, 2))
    lies = {
        f"bytes=0-{_HUGE}": 400,
        f"bytes={_HUGE}-": 400,
        f"bytes=0-{size * 1000}": (206, whole),
        f"bytes={size}-": 416,
        f"bytes={size - 1}-{size + 5}": (206, whole[-1:]),
        "bytes=5-1": 400,
        "bytes=--5": 416,
        f"bytes=-{size * 9}": (206, whole),
        "bytes=-": 400,
        "bytes=a-b": 400,
        "bytes=\xb2-": 400,
        "lines=1-2": 400,
        f"bytes={many}": (200, whole),
    }
    memory = Memory(lab.server.process.pid)
    for text, expected in lies.items():
        status, found = ask(lab, "GET", f"/linux-64/{NAME}", lab.read, f"Range: {text}")
        assert (status if isinstance(expected, int) else (status, found)) == expected, text[:40]
    # Overlapping ones are one: a small request does not get the file a thousand times.
    status, found = ask(lab, "GET", f"/linux-64/{NAME}", lab.read, f"Range: bytes={','.join(['0-'] * 1_000)}")
    assert status in (200, 206, 400, 416)
    assert len(found) < 2 * size
    assert memory.grown < 16 << 20


def test_lying_uploads_are_refused_and_leave_nothing_in_the_channel(lab: Lab, tmp_path: Path) -> None:
    publish([make_package(tmp_path / "made", "there")], lab.url)
    before = check_folder(lab.channel)
    package = make_package(tmp_path / "made")
    data = package.read_bytes()
    size = len(data)
    lies = {
        f"Content-Range: bytes 0-{_HUGE}/{_HUGE}": 400,
        f"Content-Range: bytes */{_HUGE}": 400,
        "Content-Range: junk": 400,
        "Content-Range: bytes 3-1/2": 400,
        f"Content-Range: bytes 0-{size - 1}/{size + 1}": 400,
        f"Content-Range: bytes 7-{size - 1}/{size}": 409,
        f"Content-Range: bytes */{size}": 409,
        f"Content-Range: bytes 0-0/1\r\nContent-Length: {size}": 400,
        "Content-Range: bytes 0-9999999999999/10000000000000": 413,
        f"Content-Length: {_HUGE}": 400,
        "Content-Length: -1": 400,
        "Content-Length: 1, 2": 400,
        "Transfer-Encoding: chunked": 411,
    }
    for text, expected in lies.items():
        length = () if "Content-Length" in text or "Transfer" in text else (f"Content-Length: {size}",)
        fields = (announced(data), text, *length)
        status, told = ask(lab, "PUT", f"/linux-64/{NAME}", lab.write, *fields, body=data)
        assert status == expected, (text[:60], told)
    # Another digest than the bytes have.
    fields = (announced(b"other"), f"Content-Length: {size}")
    assert ask(lab, "PUT", f"/linux-64/{NAME}", lab.write, *fields, body=data)[0] == 422
    assert check_folder(lab.channel) == before
    assert publish([package], lab.url)[0].outcome == "added"
    assert not list((lab.channel / ".uploads").glob("*.part"))
    assert " 500 " not in log_of(lab)


# --- paths that lead out ----------------------------------------------------------------------------------------------

_DOTS = (
    "..",
    "%2e%2e",
    ".%2e",
    "%252e%252e",
    "%c0%ae%c0%ae",
    "%ef%bc%8e%ef%bc%8e",
    "%e2%80%a4%e2%80%a4",
    "..;",
    "..%00",
)
_SLASHES = ("/", "//", "%2f", "%252f", "%5c", "%255c", "%c0%af", "%ef%bc%8f", "%e2%88%95")
_STARTS = ("/", "/linux-64/", "/linux-64/shards/", "/noarch/", "/t/{token}/linux-64/", "/t/{token}/", "/linux-64%2f")
_ENDS = ("secret.txt", "tokens.json", "etc/passwd", "channel/linux-64/there-1.0-h1_0.conda%00")


def paths_out(token: str) -> Iterator[str]:
    """Encoded once and twice, in other alphabets and too long, one and several folders up."""
    for start, dots, slash, end in itertools.product(_STARTS, _DOTS, _SLASHES, _ENDS):
        for times in (1, 3):
            yield start.format(token=token) + (dots + slash) * times + end


@pytest.mark.parametrize("load", LOADS)
def test_no_spelling_of_a_path_leads_out_of_the_channel(lab: Lab, tmp_path: Path, load: Load) -> None:
    (tmp_path / "secret.txt").write_text("outside of the channel\n")
    publish([make_package(tmp_path / "made", "there")], lab.url)
    wanted = list(paths_out(lab.write))[:: load.every]
    outside = {path: path.read_bytes() for path in (tmp_path / "secret.txt", lab.store.path)}

    def attack(path: str) -> tuple[int, int]:
        status, told = ask(lab, "GET", path, lab.write)
        assert b"outside of" not in told, path
        assert b"sha256" not in told, path
        assert b"root:" not in told, path
        put, _ = ask(lab, "PUT", path, lab.write, announced(b"x"), "Content-Length: 1", body=b"x")
        return status, put

    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(status for both in pool.map(attack, wanted) for status in both)
    print(f"{len(wanted)} paths, each read and written: {dict(statuses)}")
    assert sum(statuses.values()) == 2 * len(wanted)
    assert set(statuses) <= {400, 403, 404, 405}
    assert {path: path.read_bytes() for path in outside} == outside
    assert check_folder(lab.channel) == {"there-1.0-h1_0.conda"}


# --- guessing tokens --------------------------------------------------------------------------------------------------


def guesses(lab: Lab, count: int) -> Iterator[str]:
    """Wrong tokens: near the right one, of any length, and what is no token at all."""
    right = lab.read
    for number in range(count):
        kind = number % 5
        if kind == 0:
            yield right[: number % len(right)]
        elif kind == 1:
            yield right[:-1] + string.ascii_letters[number % 52] + "!"
        elif kind == 2:
            yield hashlib.sha256(right.encode()).hexdigest() + str(number)
        elif kind == 3:
            yield "x" * (number % 3_000 + 1)
        else:
            yield f"ssmf-\xff\xfe{number}"


@pytest.mark.parametrize("load", LOADS)
def test_wrong_tokens_are_refused_one_like_the_other_while_others_read(lab: Lab, tmp_path: Path, load: Load) -> None:
    publish([make_package(tmp_path / "made")], lab.url)
    tried = list(guesses(lab, load.guesses))

    def guess(number: int) -> tuple[int, bytes]:
        token = tried[number]
        if number % 3 == 1:
            basic = base64.b64encode(f"any:{token}".encode()).decode()
            return ask(lab, "GET", f"/linux-64/{NAME}", "", f"Authorization: Basic {basic}")
        if number % 3 == 2 and token.isascii() and token:
            return ask(lab, "GET", f"/t/{token}/linux-64/{NAME}", "")
        return ask(lab, "GET", f"/linux-64/{NAME}", token)

    with ThreadPoolExecutor(8) as pool:
        answers = Counter(pool.map(guess, range(100)))
        memory = Memory(lab.server.process.pid)
        served = 0
        for start in range(100, load.guesses, 200):
            answers.update(pool.map(guess, range(start, min(start + 200, load.guesses))))
            served += set(read_channel(lab.url, lab.read)) == {NAME}
    print(f"{load.guesses} guesses: {memory.before >> 10} kB before, {memory.grown >> 10} kB more at most")
    assert {status for status, _ in answers} == {401}
    assert {told for _, told in answers} == {b"The token is not known here.\n", b"This channel needs a token.\n"}
    assert answers[401, b"The token is not known here.\n"] > 0.9 * load.guesses
    assert sum(answers.values()) == load.guesses
    assert served == len(range(100, load.guesses, 200))
    assert memory.grown < 16 << 20
    log = log_of(lab)
    assert log.count(" 401 GET ") == load.guesses
    assert lab.read not in log
    assert lab.write not in log


def steps(store: TokenStore, secret: str) -> list[tuple[str, str]]:
    """Every call that a look-up makes, in order: what takes time."""
    seen: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        seen.append((event, getattr(argument, "__name__", frame.f_code.co_name)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        store.find(secret)
    finally:
        sys.setprofile(before)
    return seen


def test_looking_a_token_up_takes_the_same_steps_however_near_a_guess_is(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "tokens.json")
    secret = store.add("reader", "read", 1)
    store.find(secret)  # The file is read once.
    expected = steps(store, secret)
    near = [secret[:length] + "x" * (len(secret) - length) for length in range(len(secret))]
    assert all(steps(store, guess) == expected for guess in near)
    for number in range(50):
        store.add(f"more{number}", "read", 1)
    store.find(secret)
    assert all(steps(store, guess) == expected for guess in (secret, *near))


def test_more_readers_than_the_usual_limit_of_open_files_allows(tmp_path: Path) -> None:
    """The shell's limit is raised as far as the system lets a program do it."""
    store = TokenStore(tmp_path / "tokens.json")
    make_package(tmp_path / "channel" / "linux-64")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, before[1]))  # The server inherits it.
    try:
        with serving(tmp_path / "channel", store, tmp_path / "home", "--public") as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            lab = Lab(tmp_path / "channel", server, store, "", "", tmp_path / "home")
            silent = [connect(lab) for _ in range(60)]
            for connection in silent:
                connection.sendall(b"GET /linux-64/repodata.json HTTP/1.1\r\n")
            assert ask(lab, "GET", f"/linux-64/{NAME}", "")[0] == 200
            for connection in silent:
                connection.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
