"""What a mirror of Debian gives: the release, its list of packages, the packages; and the lock of them."""

from __future__ import annotations

import io
import lzma
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hostile import changed, damaged, hostile, judge, memory_below, zstd_bomb
from hypothesis import given
from hypothesis import strategies as st

from ssm_forge.base import foreign
from ssm_forge.base.errors import IntegrityError, UsageError
from ssm_forge.bridge import deb_file, debian

RELEASE = b"Origin: Debian\nVersion: 12.11\nDate: Sat, 17 May 2025 09:15:44 UTC\nSHA256:\n 00 1 main/Packages.xz\n"
FIELDS = {"Package": "g++", "Version": "4:12", "Filename": "pool/main/g/g++_12.deb", "SHA256": "0" * 64, "Size": "9"}
DEBS = {
    "deb": [
        {
            **{"package": "g++", "version": "12", "suite": "bookworm", "component": "main", "sha256": "0" * 64},
            **{"url": "https://deb.example/debian/pool/main/g/g++_12.deb", "size": 9, "part": "tool", "also": []},
        }
    ]
}
DEB = b"!<arch>\n" + b"".join(
    name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) + b"0".ljust(6) + b"100644".ljust(8) + b"4".ljust(10) + b"`\n2.0\n"
    for name in (b"debian-binary", b"control.tar.xz", b"data.tar.zst")
)


def _paragraph(fields: Any) -> bytes:
    lines = fields.items() if isinstance(fields, dict) else ()
    text = "".join(f"{key}: {value}\n" for key, value in lines)
    return b"Package: other\nSize: 1\n\n" + text.encode("utf-8", "backslashreplace")


packages = st.one_of(
    changed(FIELDS).map(_paragraph).map(lambda text: lzma.compress(text, preset=0)),
    changed(FIELDS).map(_paragraph).map(lambda text: lzma.compress(text, preset=0)),
    damaged(lzma.compress(_paragraph(FIELDS), preset=0)),
    damaged(_paragraph(FIELDS)).map(lambda text: lzma.compress(text, preset=0)),
    st.binary(max_size=40),
)


@hostile()
@given(packages)
def test_a_list_of_packages_names_plain_files_or_is_refused(data: bytes) -> None:
    def find() -> debian.Deb:
        try:
            stanzas = debian.read_packages(data)
        except ValueError as error:
            raise IntegrityError(str(error)) from error
        return debian.Index("https://deb.example/debian", "bookworm", "main", "12", "", "", stanzas).find("g++")

    judge(find, IntegrityError, UsageError, then=as_used)


def as_used(deb: debian.Deb) -> None:
    artifact = deb.artifact()
    assert "/" not in artifact.name and artifact.name not in ("", ".", "..") and "\0" not in artifact.name
    assert len(artifact.sha256) == 64 and artifact.size >= 0


@hostile()
@given(st.one_of(damaged(RELEASE), st.binary(max_size=60), st.text(max_size=40).map(lambda t: f"Date: {t}".encode())))
def test_a_release_says_when_or_is_refused(data: bytes) -> None:
    def read() -> tuple[str, str]:
        try:
            return debian.read_release(data.decode("utf-8"))
        except ValueError as error:
            raise IntegrityError(str(error)) from error

    def use(told: tuple[str, str]) -> None:
        assert len(told[1]) == 16

    judge(read, IntegrityError, then=use)


@hostile()
@given(
    st.one_of(
        damaged(DEB),
        damaged(DEB.replace(b"4         `", b"-60       `")),
        damaged(DEB.replace(b"4         `", b"9999999999`")),
        st.binary(max_size=80),
    )
)
def test_a_package_is_unpacked_into_its_folder_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tool.deb"
    path.write_bytes(data)
    judge(lambda: deb_file.unpack(path, tmp_path / "target"), IntegrityError, below=tmp_path / "target")


def _toml(content: Any) -> bytes:
    try:
        return tomlkit.dumps(content).encode()
    except Exception:  # Not everything that JSON has can be said in TOML.
        return b""


@hostile()
@given(st.one_of(changed(DEBS).map(_toml), damaged(_toml(DEBS)), st.binary(max_size=40)))
def test_a_lock_of_packages_names_plain_files_or_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "debs.toml"
    path.write_bytes(data)
    judge(lambda: debian.read_lock(path), UsageError, then=lambda debs: [as_used(deb) for deb in debs])


def test_a_member_of_negative_size_does_not_read_the_file_forever() -> None:
    with pytest.raises(ValueError, match="no number"):
        deb_file._data_member(io.BytesIO(DEB.replace(b"4         `", b"-60       `")))


def test_a_package_that_unpacks_to_ten_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deb_file, "_MOST_DATA_BYTES", 4 << 20)
    bomb = zstd_bomb(10_000_000_000)
    head = b"data.tar.zst".ljust(48) + str(len(bomb)).encode().ljust(10) + b"`\n"
    path = tmp_path / "tool.deb"
    path.write_bytes(b"!<arch>\n" + head + bomb)
    with memory_below(20 << 20), pytest.raises(IntegrityError, match="larger than"):
        deb_file.unpack(path, tmp_path / "target")


def test_a_list_of_packages_that_unpacks_to_more_than_the_limit_is_refused() -> None:
    bomb = lzma.compress(bytes(16 << 20), preset=0)
    with memory_below(20 << 20), pytest.raises(ValueError, match="larger than"):
        foreign.from_xz(bomb, 1 << 20)
