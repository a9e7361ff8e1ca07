"""Packages of anyone's, as a channel takes them and as a bundle is made of them; and the bundle on another machine."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hostile import DEEP_JSON, as_json, changed, damaged, hostile, judge, memory_below, values, zstd_bomb
from hypothesis import given
from hypothesis import strategies as st

from ssm_forge.base.errors import IntegrityError, UsageError
from ssm_forge.bundle import main as bundle_main
from ssm_forge.bundle import write as bundle
from ssm_forge.package import write as archive
from ssm_forge.package.read import inspect

STEM = "mamba-ssm-2.2.5-py312_0"
INDEX = {
    "name": "mamba-ssm",
    "version": "2.2.5",
    "build": "py312_0",
    "build_number": 0,
    "subdir": "linux-64",
    "depends": ["python_abi 3.12.* *_cp312", "pytorch 2.9.*", "cuda-version >=13.0,<14", "__glibc >=2.28,<3.0.a0"],
}
PATHS = {"paths": [{"_path": "lib/a.so", "path_type": "hardlink", "sha256": "0" * 64, "size_in_bytes": 1}]}
INFO = {"index.json": INDEX, "paths.json": PATHS}


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _conda(info: bytes, payload: bytes = b"") -> bytes:
    """A .conda of these parts, which are compressed already."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as package:
        package.writestr("metadata.json", '{"conda_pkg_format_version":2}')
        package.writestr(f"pkg-{STEM}.tar.zst", payload or zstandard.compress(_tar({"lib/a.so": b"a"})))
        package.writestr(f"info-{STEM}.tar.zst", info)
    return stream.getvalue()


def _of_info(content: Any) -> bytes:
    files = content.items() if isinstance(content, dict) else ()
    named = {f"info/{name}"[:90].encode("ascii", "replace").decode(): as_json(data) for name, data in files}
    return _conda(zstandard.compress(_tar(named)))


VALID = _of_info(INFO)
packages = st.one_of(
    changed(INFO).map(_of_info),
    changed(INFO).map(_of_info),
    damaged(VALID),
    damaged(_tar({"info/index.json": as_json(INDEX)})).map(zstandard.compress).map(_conda),
    st.sampled_from(DEEP_JSON).map(lambda data: _conda(zstandard.compress(_tar({"info/index.json": data})))),
    values.map(_of_info),
    st.binary(max_size=40),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundle")


@hostile()
@given(packages)
def test_a_package_is_taken_for_a_bundle_or_refused(folder: Path, data: bytes) -> None:
    path = folder / f"{STEM}.conda"
    path.write_bytes(data)

    def use(package: bundle.Package) -> None:
        bundle._common([package])
        assert all(not name.startswith("/") and ".." not in Path(name).parts for name in package.files)

    judge(lambda: bundle.Package.read(path), IntegrityError, UsageError, then=use)


@hostile()
@given(packages)
def test_a_package_is_taken_for_a_channel_or_refused(folder: Path, data: bytes) -> None:
    path = folder / f"{STEM}.conda"
    path.write_bytes(data)
    judge(lambda: inspect(path), IntegrityError)


@pytest.mark.parametrize("reader", [inspect, bundle.Package.read])
def test_a_package_that_unpacks_to_ten_gigabytes_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reader: Any
) -> None:
    monkeypatch.setattr(archive, "MOST_INFO_BYTES", 4 << 20)
    # A header of a name of 10 GB in front, so that even a reader of streams must hold it or refuse it.
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 10_000_000_000
    bomb = zstandard.compress(long_name.tobuf(tarfile.GNU_FORMAT)) + zstd_bomb(10_000_000_000)
    path = folder / f"{STEM}.conda"
    for data in (_conda(bomb), _conda(zstd_bomb(10_000_000_000))):
        path.write_bytes(data)
        with memory_below(30 << 20), pytest.raises(IntegrityError):
            reader(path)


MANIFEST = {
    "needs": {"python": "3.12", "torch": "2.9", "cuda": "13", "glibc": "2.28"},
    "packages": [
        {"file": f"{STEM}.conda", "sha256": "0" * 64, "payload": "packages/a.tar.xz", "files": {"lib/a.so": "0" * 64}}
    ],
    "tests": [],
    "others": [],
    "notes": "",
}


def _xz(names: list[str]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz", preset=0) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


_PAYLOADS = tuple(_xz([name, "lib/a.so"]) for name in ("lib/b", "../escape", "/tmp/ssm-forge-escape", "lib/a.so/x"))


def _bundle(manifest: bytes, payload: bytes, name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("bundle.json", manifest)
        made.writestr(name, b"x")
        made.writestr("packages/a.tar.xz", payload)
        made.writestr("others/..tar.xz", payload)
    return stream.getvalue()


bundles = st.one_of(
    st.builds(
        _bundle,
        st.one_of(changed(MANIFEST).map(as_json), st.just(as_json(MANIFEST)), st.sampled_from(DEEP_JSON)),
        st.one_of(st.sampled_from(_PAYLOADS), damaged(_PAYLOADS[0])),
        st.sampled_from(("src/a", "src/../../escape", "tests//a", "pytest/" + "a" * 300, "src/a/../b")),
    ),
    damaged(_bundle(as_json(MANIFEST), _PAYLOADS[0], "src/a")),
)


@hostile()
@given(bundles)
def test_a_bundle_is_unpacked_into_its_folder_or_called_damaged(folder: Path, data: bytes) -> None:
    target = Path(tempfile.mkdtemp(dir=folder)) / "target"
    target.mkdir()

    def unpack() -> None:
        # The bundle brings the standard library's errors only: it runs where ssm-forge is not.
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as opened:
                bundle_main.unpack(opened, target)
        except zipfile.BadZipFile as error:  # Python itself finds no program in it.
            raise IntegrityError("no bundle") from error
        except bundle_main.UnfitError as error:
            raise IntegrityError(str(error)) from error

    judge(unpack, IntegrityError, below=target)


def test_the_valid_package_is_taken(folder: Path) -> None:
    path = folder / f"{STEM}.conda"
    path.write_bytes(VALID)
    assert inspect(path).index == json.loads(json.dumps(INDEX))
    assert bundle.Package.read(path).needs["glibc"] == "2.28"
