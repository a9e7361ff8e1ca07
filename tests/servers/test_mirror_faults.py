"""Mirroring from a source that cuts: an attempt waits, goes on or starts over, and the last one says why it failed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import make_package

from ssm_forge.base import web
from ssm_forge.base.errors import ForgeError, IntegrityError, NetworkError
from ssm_forge.base.web import TransientError
from ssm_forge.channel import folder as channels
from ssm_forge.channel.mirror import mirror

NAME = "tool-1.0-h1_0.conda"


class Source:
    """A channel of one package, whose connections end after so many bytes."""

    name = "https://lab.example"

    def __init__(self, data: bytes, cuts: list[int], *, resumes: bool = True, sha256: str = "") -> None:
        self._data, self._cuts, self._resumes = data, cuts, resumes
        self._sha256 = sha256 or hashlib.sha256(data).hexdigest()
        self.firsts: list[int] = []

    def subdirs(self) -> list[str]:
        return ["linux-64"]

    def read(self, path: str) -> bytes | None:
        return json.dumps({"packages.conda": {NAME: {"name": "tool", "sha256": self._sha256}}}).encode()

    def chunks(self, path: str, first: int = 0) -> Iterator[bytes] | None:
        self.firsts.append(first)
        if first and not self._resumes:
            raise NetworkError("the server can't go on in the middle of a file.")
        if first >= len(self._data):
            raise NetworkError("answered 416.")
        return self._send(first)

    def _send(self, first: int) -> Iterator[bytes]:
        if self._cuts:
            yield self._data[first : first + self._cuts.pop(0)]
            raise TransientError("the connection was cut.")
        yield self._data[first:]


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    return make_package(tmp_path / "made", size=10_000).read_bytes()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(web.time, "sleep", found.append)
    return found


def left(target: Path, source: Source, data: bytes) -> None:
    """What an earlier run left behind."""
    folder = target / ".uploads"
    folder.mkdir(parents=True)
    (folder / f"{source._sha256}.part").write_bytes(data)


def test_it_goes_on_after_each_cut_and_waits_longer_each_time(data: bytes, tmp_path: Path, pauses: list[float]) -> None:
    source, lines = Source(data, [100, 100, 100, 100]), list[str]()
    assert mirror(source, tmp_path / "copy", log=lines.append) == (1, 0)
    assert source.firsts == [0, 100, 200, 300, 400]
    assert (tmp_path / "copy" / "linux-64" / NAME).read_bytes() == data
    assert len(pauses) == 4
    assert all(0.5 <= pause / 0.25 / 2 ** (number + 1) <= 1.5 for number, pause in enumerate(pauses))
    assert [line[:14] for line in lines[:4]] == [f"attempt {number} of 5" for number in range(1, 5)]


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("earlier", [b"", b"left by an earlier run"])
def test_the_last_attempt_says_what_happened(
    data: bytes, tmp_path: Path, pauses: list[float], resumes: bool, earlier: bytes
) -> None:
    """With a partial file and a server that can't go on, the fifth attempt ended without file and without error."""
    source = Source(data, [50] * 20, resumes=resumes)
    if earlier:
        left(tmp_path / "copy", source, earlier)
    with pytest.raises(NetworkError, match="the connection was cut"):
        mirror(source, tmp_path / "copy", log=lambda line: None)
    assert len(pauses) == web.ATTEMPTS - 1
    assert channels.records(tmp_path / "copy") == {}


@pytest.mark.parametrize(
    "damage", [lambda data: b"x" * 50, lambda data: data + b"x", lambda data: data, lambda data: data[:70]]
)
@pytest.mark.parametrize("resumes", [True, False])
def test_what_an_earlier_run_left_is_used_or_replaced_but_never_the_end(
    data: bytes, tmp_path: Path, pauses: list[float], damage: Callable[[bytes], bytes], resumes: bool
) -> None:
    source = Source(data, [], resumes=resumes)
    left(tmp_path / "copy", source, damage(data))
    assert mirror(source, tmp_path / "copy", log=lambda line: None) == (1, 0)
    assert (tmp_path / "copy" / "linux-64" / NAME).read_bytes() == data
    assert pauses == []


@pytest.mark.parametrize("error", [NetworkError("refused"), IntegrityError("other bytes")])
def test_what_does_not_pass_is_not_tried_again(
    data: bytes, tmp_path: Path, pauses: list[float], error: ForgeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(data, [])
    asked: list[str] = []

    def refuse(path: str, first: int = 0) -> None:
        asked.append(path)
        raise error

    monkeypatch.setattr(source, "chunks", refuse)
    with pytest.raises(type(error), match=str(error)):
        mirror(source, tmp_path / "copy", log=lambda line: None)
    assert (len(asked), pauses) == (1, [])
