"""What an archive of another machine holds: pack.json, and the tar around it."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

import pytest
from hostile import damaged, hostile, json_files, judge, memory_below
from hypothesis import given
from hypothesis import strategies as st

from ssm_forge.base.errors import IntegrityError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.unpacking import unpack_tar
from ssm_forge.install import pack as packing
from ssm_forge.install.marker import Installed, read_marker

INSTALLED = {
    "variant": "cu130",
    "python": "3.12",
    "source": "conda",
    "packages": ["mamba-ssm-2.2.5-py312_0.conda"],
    "created": True,
}
PACK = {
    "format": 1,
    "environment": "cu130",
    "subdir": "linux-64",
    "packages": 3,
    "kernels": ["mamba-ssm-2.2.5-py312_0.conda"],
    "installed": INSTALLED,
}


def as_used(installed: Installed | None) -> None:
    """Parts of it become paths."""
    if installed is not None:
        for part in (installed.variant, installed.python, *installed.packages):
            assert "/" not in part and part != ".." and part.isprintable()


@hostile()
@given(json_files(PACK))
def test_a_pack_json_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "pack.json").write_bytes(data)

    def use(made: packing.Pack) -> None:
        assert "/" not in made.environment and made.environment != ".." and len(made.environment) < 129
        assert all("/" not in name for name in (made.subdir, *made.kernels))
        as_used(made.installed)

    judge(lambda: packing._read_pack(tmp_path, tmp_path), UsageError, IntegrityError, then=use)


@hostile()
@given(json_files(INSTALLED))
def test_a_marker_is_read_or_taken_for_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "conda-meta").mkdir(exist_ok=True)
    (tmp_path / "conda-meta" / "ssm-forge").write_bytes(data)
    judge(lambda: read_marker(tmp_path), then=as_used)


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("top/pack.json", "top/" + "long/" * 30 + "name", "top/ü"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("top/link")
        link.type, link.linkname = tarfile.SYMTYPE, "pack.json"
        tar.addfile(link)
    return stream.getvalue()


_NAMES = (
    "../escape",
    "/tmp/ssm-forge-escape",
    "top/../../escape",
    "top/x\0y",
    "a" * 300,
    "top/\udcff",
    "top/link/x",
    "",
)
_TYPES = (b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"V", b"\0")
_SIZES = (0, 2, 3, 1 << 30, 10_000_000_000, -1, -512, -(1 << 40))


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Members of every kind, with names and sizes that no archive of ours has."""
    data = b""
    for _ in range(draw(st.integers(1, 4))):
        member = tarfile.TarInfo(draw(st.sampled_from((*_NAMES, "top/a", "top/a", "top/link"))))
        member.type = draw(st.sampled_from(_TYPES))
        member.linkname = draw(st.sampled_from((*_NAMES, "a")))
        member.size = draw(st.sampled_from(_SIZES))
        member.mtime = draw(st.sampled_from((0, 1, 1 << 40, -(1 << 40), 1 << 62)))
        member.mode = draw(st.sampled_from((0o644, 0o7777, 0)))
        try:
            data += member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        except (ValueError, OverflowError):
            continue
        data += draw(
            st.sampled_from((b"", b"{}".ljust(512, b"\0"), b"30 path=../../escape/by/pax\n".ljust(512, b"\0")))
        )
    return data + draw(st.sampled_from((b"", b"\0" * 1024)))


archives = st.one_of(tars(), tars(), damaged(_tar()), st.binary(max_size=40))


@hostile()
@given(archives)
def test_an_archive_is_unpacked_into_its_scratch_folder_or_refused(tmp_path: Path, data: bytes) -> None:
    source = tmp_path / "pack.tar"
    source.write_bytes(data)
    place = Workspace(root=tmp_path / "workspace", cache=tmp_path / "cache")

    def unpack() -> None:
        with packing._opened(source, place):
            pass

    judge(unpack, UsageError, IntegrityError, below=place.cache)


@hostile()
@given(archives)
def test_a_tar_of_anyones_is_unpacked_below_its_folder_or_refused(tmp_path: Path, data: bytes) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    judge(lambda: unpack_tar(io.BytesIO(data), folder / "target"), IntegrityError, below=folder / "target")
    assert [path.name for path in folder.iterdir()] in ([], ["target"])


class Endless(io.RawIOBase):
    """A tar whose first header announces a name of 10 GB, with as many bytes."""

    def __init__(self) -> None:
        member = tarfile.TarInfo("././@LongLink")
        member.type, member.size = tarfile.GNUTYPE_LONGNAME, 10_000_000_000
        self._head = io.BytesIO(member.tobuf(tarfile.GNU_FORMAT))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._head.seek(offset, whence)

    def tell(self) -> int:
        return self._head.tell()

    def read(self, size: int = -1) -> bytes:
        assert size < 100 << 20, "a name of 10 GB is read into memory"
        return self._head.read(size).ljust(size, b"a")


def test_a_name_of_ten_gigabytes_is_not_read(tmp_path: Path) -> None:
    with memory_below(20 << 20), pytest.raises(IntegrityError):
        unpack_tar(Endless(), tmp_path / "target")  # type: ignore[arg-type]
