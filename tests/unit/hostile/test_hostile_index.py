"""The readers of a channel's index: repodata.json, the shards, run_exports.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import msgpack
import pytest
import zstandard
from hostile import changed, damaged, deep, hostile, json_files, judge, memory_below, values, zstd_bomb
from hypothesis import given
from hypothesis import strategies as st

from ssm_forge.channel import index as repodata
from ssm_forge.channel.index import DamagedIndexError

HERE = "https://example.org/channel/linux-64/repodata.json"
RECORD = {
    "name": "tool",
    "version": "1.0",
    "build": "h1_0",
    "build_number": 0,
    "subdir": "linux-64",
    "license": "MIT",
    "depends": ["base >=1.0"],
    "constrains": [],
    "sha256": "0" * 64,
    "md5": "0" * 32,
    "attestations_sha256": "1" * 64,
    "size": 100,
    "timestamp": 1_767_225_600_000,
    "run_exports": {"weak": ["tool >=1"]},
}
INDEX = {
    "info": {"subdir": "linux-64"},
    "packages": {"base-1.0-0.tar.bz2": {**RECORD, "name": "base"}},
    "packages.conda": {"tool-1.0-h1_0.conda": RECORD},
    "repodata_version": 1,
}
SHARD = {
    "packages": {},
    "packages.conda": {
        "tool-1.0-h1_0.conda": {**RECORD, "sha256": b"\0" * 32, "md5": b"\0" * 16, "attestations_sha256": b"\1" * 32}
    },
}
SHARDS = {"info": {"base_url": "./", "shards_base_url": "./shards/", "subdir": "linux-64"}, "shards": {"a": b"\0" * 32}}


def packed(content: Any) -> bytes:
    try:
        data = msgpack.packb(content, unicode_errors="surrogatepass")
    except (OverflowError, ValueError, TypeError):
        data = b""
    return zstandard.compress(data)


def shard_files(valid: Any) -> st.SearchStrategy[bytes]:
    return st.one_of(
        changed(valid).map(packed),
        changed(valid).map(packed),
        values.map(packed),
        deep.map(packed),
        damaged(packed(valid)),
        damaged(msgpack.packb(valid)).map(zstandard.compress),
        st.binary(max_size=40),
        st.sampled_from((zstandard.compress(b"\x91" * 100_000), zstandard.compress(b"\xdd\xff\xff\xff\xff"))),
    )


def as_used(records: repodata.Records) -> None:
    """What publish, prune and check do with records."""
    for name, record in records.items():
        assert "/" not in name and name.isprintable() and len(name.encode()) < 256
        sorted([(record.build_number or 0, record.timestamp or 0, record.size or 0), (0, 0, 0)])
        [depend.split() for depend in record.depends or ()]
        f"{record.name} {record.version}".encode()
    json.dumps([asdict(record) for record in records.values()], sort_keys=True)


@hostile()
@given(json_files(INDEX))
def test_an_index_is_read_or_called_damaged(data: bytes) -> None:
    judge(lambda: repodata.records(data, HERE, repodata.COMPLETE), DamagedIndexError, then=as_used)


@hostile()
@given(json_files(INDEX))
def test_run_exports_are_made_of_every_index_that_is_read(data: bytes) -> None:
    judge(lambda: repodata.document(data, HERE), DamagedIndexError, then=repodata.run_exports)


@hostile()
@given(json_files({"info": {"subdir": "linux-64"}, "packages.conda": {"tool-1.0-h1_0.conda": {"run_exports": {}}}}))
def test_a_run_exports_file_is_read_or_called_damaged(data: bytes) -> None:
    judge(lambda: repodata.records(data, HERE), DamagedIndexError, then=as_used)


@hostile()
@given(shard_files(SHARDS))
def test_a_shard_index_is_read_or_called_damaged(data: bytes) -> None:
    def digests(found: dict[str, str]) -> None:
        assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in found.values())

    judge(lambda: repodata.shard_digests(data, HERE), DamagedIndexError, then=digests)


@hostile()
@given(shard_files(SHARD))
def test_a_shard_is_read_or_called_damaged(data: bytes) -> None:
    judge(lambda: repodata.shard(data, HERE), DamagedIndexError, then=as_used)


def test_a_valid_index_shard_index_and_shard_are_read() -> None:
    assert set(repodata.records(json.dumps(INDEX).encode(), HERE)) == {"base-1.0-0.tar.bz2", "tool-1.0-h1_0.conda"}
    assert repodata.shard_digests(packed(SHARDS), HERE) == {"a": "0" * 64}
    assert repodata.shard(packed(SHARD), HERE)["tool-1.0-h1_0.conda"].sha256 == "0" * 64


def test_a_compressed_index_of_ten_gigabytes_of_zeros_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repodata, "MOST_BYTES", 4 << 20)
    with memory_below(20 << 20), pytest.raises(DamagedIndexError, match="larger than"):
        repodata.decompress(zstd_bomb(10_000_000_000), HERE)
    with memory_below(20 << 20), pytest.raises(DamagedIndexError, match="larger than"):
        repodata.shard_digests(zstd_bomb(10_000_000_000), HERE)
