"""A damaged index: check names it, readers refuse it, and who owns the channel writes it anew."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zstandard
from lab import make_package, serving

from ssm_forge.base.errors import ForgeError
from ssm_forge.base.files import sha256_of
from ssm_forge.channel import check as channel_check
from ssm_forge.channel import coverage, mirror, prune
from ssm_forge.channel import folder as channels
from ssm_forge.channel import others as remote
from ssm_forge.channel import statement as trust
from ssm_forge.channel.index import DamagedIndexError
from ssm_forge.channel.source import open_source
from ssm_forge.publish.send import publish
from ssm_forge.serve.tokens import TokenStore
from ssm_forge.serve.uploads import Uploads
from ssm_forge.solve.solver import Request, solve

NAME = "tool-1.0-h1_0.conda"
REPODATA, PACKED = "repodata.json", "repodata.json.zst"
SHARDS, EXPORTS = "repodata_shards.msgpack.zst", "run_exports.json"


def packed(content: object) -> bytes:
    return zstandard.compress(msgpack.packb(content))


def listing(name: str, record: object) -> bytes:
    return json.dumps({"packages": {}, "packages.conda": {name: record}}).encode()


def whole(**changes: object) -> dict[str, object]:
    """A record that nothing is wrong with, and then some."""
    record = {"name": "tool", "version": "1.0", "build": "h1_0", "build_number": 0, "depends": [], "sha256": "ab" * 32}
    return {**record, "size": 1, "subdir": "linux-64", **changes}


# Seeing it takes msgpack, which the environment that installs may lack.
ONLY_CHECK_SEES = [
    *[(SHARDS, packed(content)) for content in ([], {}, {"shards": []}, {"shards": None})],
    *[(SHARDS, packed({"shards": {"tool": digest}})) for digest in (b"short", "text", 1, None)],
]
DAMAGES = [
    *[(REPODATA, data) for data in (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000)],
    *[(REPODATA, data) for data in (b'{"packages": []}', b'{"packages.conda": null}', b'{"info": 1, "packages": {}}')],
    *[(REPODATA, listing(NAME, record)) for record in (1, None, [], "x")],
    *[(REPODATA, listing(name, whole())) for name in ("../../evil.conda", "", "a/b.conda", "..", "x\0.conda")],
    (REPODATA, listing(NAME, whole(name=3))),
    (REPODATA, listing(NAME, whole(version=1.0))),
    (REPODATA, listing(NAME, whole(build_number="0"))),
    (REPODATA, listing(NAME, whole(depends="python"))),
    (REPODATA, listing(NAME, whole(depends=[{"name": "python"}]))),
    (REPODATA, listing(NAME, whole(sha256="short"))),
    (REPODATA, listing(NAME, whole(size="1"))),
    (REPODATA, listing(NAME, whole(attestations_sha256="../../../etc/passwd"))),
    *[(PACKED, data) for data in (b"", b"broken", zstandard.compress(b"{"))],
    *[(SHARDS, data) for data in (b"", b"broken", zstandard.compress(b""))],
    *ONLY_CHECK_SEES,
    *[(EXPORTS, data) for data in (b"", b"{", b"[]", b'{"packages.conda": []}', listing(NAME, 1))],
]
IDS = [f"{name}-{data[:60]!r}" for name, data in DAMAGES]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A channel of one signed package."""
    folder = tmp_path_factory.mktemp("sound")
    key, _ = trust.make_key(folder / "keys", "lab")
    package = make_package(folder / "made", provenance=True)
    publish([package], str(folder / "channel"), statements=trust.writer(key, ()))
    return folder / "channel"


@pytest.fixture
def channel(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copytree(sound, tmp_path / "channel")
    return tmp_path / "channel"


def kinds(channel: Path) -> dict[str, str]:
    problems, _ = channel_check.check(open_source(str(channel)))
    return {problem.file: problem.kind for problem in problems}


@pytest.mark.parametrize(("name", "data"), DAMAGES, ids=IDS)
def test_check_names_the_damage_and_repair_mends_it(channel: Path, name: str, data: bytes) -> None:
    (channel / "linux-64" / name).write_bytes(data)
    assert kinds(channel) == {f"linux-64/{name}": "index"}
    channel_check.repair(channel)
    assert kinds(channel) == {}


@pytest.mark.parametrize(("name", "data"), DAMAGES, ids=IDS)
def test_prune_removes_nothing_by_a_damaged_index(channel: Path, name: str, data: bytes) -> None:
    (channel / "linux-64" / name).write_bytes(data)
    before = {path for path in channel.rglob("*") if path.is_file()}
    if name in (REPODATA, SHARDS):
        with pytest.raises(DamagedIndexError, match=f"{name}.*channel check --repair {channel}'"):
            prune.prune(channel, keep=1, dry_run=False)
    else:
        prune.prune(channel, keep=1, dry_run=False)
    assert {path for path in channel.rglob("*") if path.is_file()} - {channel / ".lock"} == before - {channel / ".lock"}


@pytest.mark.parametrize(("name", "data"), [d for d in DAMAGES if d not in ONLY_CHECK_SEES])
def test_who_owns_the_channel_writes_a_damaged_index_anew(channel: Path, name: str, data: bytes) -> None:
    """What install, build, serve and publish do first or last."""
    (channel / "linux-64" / name).write_bytes(data)
    channels.ensure_indexed(channel)
    assert kinds(channel) == {}


@pytest.mark.parametrize("form", [REPODATA, PACKED, SHARDS, EXPORTS])
def test_publishing_and_serving_go_on_from_a_damaged_index(channel: Path, tmp_path: Path, form: str) -> None:
    damaged = channel / "linux-64" / form
    damaged.write_bytes(b"broken")
    publish([make_package(tmp_path / "made", "second")], str(channel))
    assert kinds(channel) == {}
    damaged.write_bytes(b"broken")
    with serving(channel, TokenStore(tmp_path / "tokens.json"), tmp_path / "home", "--public") as server:
        assert kinds(channel) == {}
        damaged.write_bytes(b"broken")
        found, _ = channel_check.check(open_source(server.url))
        assert [(problem.file, problem.kind) for problem in found] == [(f"linux-64/{form}", "index")]


def test_an_upload_to_a_server_whose_index_breaks_meanwhile_is_listed(
    channel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (channel / "linux-64" / REPODATA).write_bytes(b"{")
    package = make_package(tmp_path / "made", "second")
    part = channel / ".uploads" / "x.part"
    part.parent.mkdir(exist_ok=True)
    shutil.copyfile(package, part)
    assert Uploads(channel, print)._accept(part, "linux-64", package.name, sha256_of(package))
    assert set(channels.records(channel)) == {NAME, package.name}


READERS: list[Callable[[Path], object]] = [
    lambda channel: mirror.mirror(open_source(str(channel)), channel.parent / "copy", log=lambda line: None),
    lambda channel: coverage.items(open_source(str(channel))),
    lambda channel: solve(Request(specs=("tool",), channels=(channel.as_uri(),), snapshot=channel)),
    lambda channel: solve(Request(specs=("tool",), channels=(channel.as_uri(),))),
    lambda channel: remote.find(NAME, (channel.as_uri(),)),
]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", listing(NAME, 1), listing(NAME, whole(depends="python"))])
@pytest.mark.parametrize("reader", READERS, ids=["mirror", "coverage", "offline solve", "solve", "find"])
def test_who_reads_a_damaged_index_says_which_file_it_is(
    channel: Path, reader: Callable[[Path], object], data: bytes
) -> None:
    (channel / "linux-64" / REPODATA).write_bytes(data)
    with pytest.raises(DamagedIndexError, match=rf"linux-64/{REPODATA} .*channel check --repair {channel}'"):
        reader(channel)


def paths(node: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside."""
    if isinstance(node, (dict, list)):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield (key,)
            yield from ((key, *rest) for rest in paths(node[key]))


def test_no_wrong_type_anywhere_inside_is_a_crash(channel: Path) -> None:
    """Every value of the index replaced by every kind of JSON: each outcome is a result or an error with a fix."""
    index = channel / "linux-64" / REPODATA
    text = index.read_text()
    junk = [None, True, 7, 1.5, "junk", [], [[]], {}, {"junk": {}}]
    for way in paths(json.loads(text)):
        for value in junk:
            content = json.loads(text)
            node = content
            for key in way[:-1]:
                node = node[key]
            node[way[-1]] = value
            index.write_text(json.dumps(content))
            channel_check.check(open_source(str(channel)))
            for act in (lambda: prune.prune(channel, keep=1, dry_run=True), lambda: READERS[1](channel)):
                try:
                    act()
                except ForgeError as error:
                    assert error.fix, (way, value)


def test_no_cut_and_no_turned_byte_is_a_crash(channel: Path) -> None:
    chance = random.Random(1)
    for name in (REPODATA, PACKED, SHARDS, EXPORTS):
        file = channel / "linux-64" / name
        data = file.read_bytes()
        for _ in range(60):
            cut = bytearray(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.5 else data)
            if cut:
                cut[chance.randrange(len(cut))] ^= 1 << chance.randrange(8)
            file.write_bytes(bytes(cut))
            channel_check.check(open_source(str(channel)))
            try:
                prune.prune(channel, keep=1, dry_run=True)
            except ForgeError as error:
                assert error.fix
        file.write_bytes(data)
