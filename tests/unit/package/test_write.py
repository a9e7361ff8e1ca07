"""Rewriting the info part of packages: same bytes every time, payload untouched, damage refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import zstandard

from ssm_forge.base.errors import IntegrityError
from ssm_forge.package.write import InfoFiles, dump_json, read_info, read_json, repack, rewrite_info

PAYLOAD = b"payload, whatever it is" * 1000


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make(tmp_path / "demo-1.0-0.conda", {"info/index.json": b'{"name": "demo"}', "info/files": b"x\n"})


def make(path: Path, files: InfoFiles) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), int(time.time())
            tar.addfile(member, io.BytesIO(data))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", '{"conda_pkg_format_version": 2}')
        archive.writestr("pkg-demo-1.0-0.tar.zst", PAYLOAD)
        archive.writestr("info-demo-1.0-0.tar.zst", zstandard.ZstdCompressor().compress(buffer.getvalue()))
    return path


def add_extra(files: InfoFiles) -> InfoFiles:
    return {**files, "info/extra.json": dump_json({"b": 1, "a": 2})}


def test_info_files_are_read(package: Path) -> None:
    assert read_info(package) == {"info/index.json": b'{"name": "demo"}', "info/files": b"x\n"}
    assert read_json(package, "index.json") == {"name": "demo"}


def test_rewriting_twice_gives_the_same_bytes(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [tmp_path / "one" / package.name, tmp_path / "two" / package.name]
    for years, target in enumerate(targets, 1):
        target.parent.mkdir()
        moment = 1_800_000_000 + years * 31_536_000
        os.utime(package, (moment, moment))
        monkeypatch.setattr(time, "time", lambda moment=moment: float(moment))
        rewrite_info(package, target, add_extra)
    monkeypatch.undo()
    first, second = (target.read_bytes() for target in targets)
    assert first == second
    assert read_json(targets[0], "extra.json") == {"a": 2, "b": 1}


def test_the_payload_keeps_its_bytes(package: Path, tmp_path: Path) -> None:
    target = tmp_path / "other-2.0-1.conda"
    rewrite_info(package, target, add_extra)
    with zipfile.ZipFile(target) as archive:
        assert archive.read("pkg-other-2.0-1.tar.zst") == PAYLOAD
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_the_engine_reads_what_was_rewritten(tmp_path: Path) -> None:
    from rattler.package_streaming import extract

    from conda_channel import make_package

    made = make_package(tmp_path / "channel", "demo", {"share/demo.txt": "demo\n"})
    target = tmp_path / made.name
    rewrite_info(made, target, add_extra)
    extract(target, tmp_path / "out")
    assert (tmp_path / "out/share/demo.txt").read_text() == "demo\n"
    assert json.loads((tmp_path / "out/info/extra.json").read_text()) == {"a": 2, "b": 1}


def test_a_replaced_file_has_the_other_bytes_and_every_other_one_its_own(tmp_path: Path) -> None:
    from rattler.package_streaming import extract

    from conda_channel import make_package

    files = {"bin/tool": "#!/bin/sh\n", "lib/demo.so": "library\n" * 100, "share/demo.txt": "demo\n"}
    made = make_package(tmp_path / "channel", "demo", files)
    before = made.read_bytes()
    for number, data in enumerate((b"", b"short", b"longer than before\n" * 1000)):
        target = tmp_path / str(number) / made.name
        target.parent.mkdir()
        repack(made, target, add_extra, {"lib/demo.so": data})
        extract(target, target.parent / "out")
        assert (target.parent / "out/lib/demo.so").read_bytes() == data
        assert (target.parent / "out/share/demo.txt").read_text() == "demo\n"
        assert (target.parent / "out/bin/tool").read_text() == "#!/bin/sh\n"
        assert read_json(target, "extra.json") == {"a": 2, "b": 1}
    assert made.read_bytes() == before


def test_a_file_replaced_by_its_own_bytes_gives_the_same_package(tmp_path: Path) -> None:
    from conda_channel import make_package

    made = make_package(tmp_path / "channel", "demo", {"lib/demo.so": "library\n", "share/demo.txt": "demo\n"})
    packages = []
    for folder, replaced in (("plain", None), ("none", {}), ("own", {"lib/demo.so": b"library\n"})):
        target = tmp_path / folder / made.name
        target.parent.mkdir()
        repack(made, target, add_extra, replaced)
        packages.append(target.read_bytes())
    assert packages[0] == packages[1] == packages[2]


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_a_truncated_package_is_refused(package: Path, keep: int, tmp_path: Path) -> None:
    package.write_bytes(package.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match=f"{package} is not a whole"):
        read_info(package)
    with pytest.raises(IntegrityError):
        rewrite_info(package, tmp_path / "target.conda", add_extra)
    assert list(tmp_path.glob("*target*")) == []


def test_a_damaged_payload_is_refused_and_no_target_appears(package: Path, tmp_path: Path) -> None:
    data = package.read_bytes()
    package.write_bytes(data.replace(PAYLOAD[:40], b"x" * 40, 1))
    with pytest.raises(IntegrityError, match="not a whole"):
        rewrite_info(package, tmp_path / "target.conda", add_extra)
    assert [path.name for path in tmp_path.iterdir()] == [package.name]


def test_a_zip_that_is_no_package_and_bad_json_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.conda"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(IntegrityError, match=r"no info-\*"):
        read_info(other)
    with pytest.raises(IntegrityError, match="is not JSON"):
        read_json(make(tmp_path / "bad.conda", {"info/index.json": b"{"}), "index.json")
    with pytest.raises(KeyError):
        read_json(make(tmp_path / "bad.conda", {"info/files": b""}), "index.json")


def test_a_failing_edit_leaves_nothing(package: Path, tmp_path: Path) -> None:
    def broken(files: InfoFiles) -> InfoFiles:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        rewrite_info(package, tmp_path / "target.conda", broken)
    assert [path.name for path in tmp_path.iterdir()] == [package.name]
