"""Reading and rewriting .conda files, so that the same content gives the same bytes.

A .conda file is a zip (stored) of ``metadata.json``, ``pkg-NAME.tar.zst`` and ``info-NAME.tar.zst``
(conda's package format, CEP-26).
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.files import replacing
from ssm_forge.base.foreign import from_zstd, json_from
from ssm_forge.base.unpacking import DAMAGE, Member

InfoFiles = dict[str, bytes]

# What a damaged .conda file makes the libraries raise: an unknown compression and a password are errors of their own.
ZIP_DAMAGE = (zipfile.BadZipFile, zstandard.ZstdError, NotImplementedError, RuntimeError, *DAMAGE)
# Of all info files of a package together.
MOST_INFO_BYTES = 256_000_000

# Every timestamp inside a package: builds at different times must give the same bytes.
EPOCH = 1_767_225_600  # 2026-01-01T00:00:00Z


def read_info(path: Path) -> InfoFiles:
    """The files of the info part: ``info/index.json`` -> bytes.

    Raises:
        IntegrityError: when the file is not a whole .conda package.
    """
    with _opened(path) as package, package.open(_member(package, "info-")) as packed:
        data = from_zstd(packed, MOST_INFO_BYTES)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", tarinfo=Member) as tar:
            return {
                m.name: cast("io.BufferedReader", tar.extractfile(m)).read() for m in tar.getmembers() if m.isfile()
            }


def read_json(path: Path, name: str) -> dict[str, Any]:
    """One JSON file of the info part, such as ``index.json``.

    Raises:
        IntegrityError: when the package or the file is damaged.
        KeyError: when the package has no such file.
    """
    return json_of(read_info(path), name, path)


def json_of(info: InfoFiles, name: str, path: Path) -> dict[str, Any]:
    """One JSON object of the info part that was read already; raises as :func:`read_json` does."""
    try:
        content = json_from(info[f"info/{name}"])
    except ValueError as error:
        raise IntegrityError(f"info/{name} of {path} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"info/{name} of {path} is not a JSON object.")
    return cast("dict[str, Any]", content)


def rewrite_info(path: Path, target: Path, edit: Callable[[InfoFiles], InfoFiles]) -> None:
    """Write ``target`` as ``path`` with its info files replaced by what ``edit`` returns; the payload is copied.

    ``target`` appears whole or not at all.
    """
    info_files = edit(read_info(path))
    with _opened(path) as old, old.open(_member(old, "pkg-")) as payload:
        _write(target, payload, info_files)


def repack(
    path: Path,
    target: Path,
    edit: Callable[[InfoFiles], InfoFiles],
    replaced: Mapping[str, bytes] | None = None,
) -> None:
    """Like :func:`rewrite_info`, with a payload that depends on nothing but the files' names, modes and bytes.

    ``target`` appears whole or not at all.

    Args:
        replaced: files of the payload that get other bytes, by their path in it.
    """
    info_files = edit(read_info(path))
    with (
        tempfile.TemporaryFile() as plain,
        tempfile.TemporaryFile() as normal,
        tempfile.TemporaryFile() as packed,
    ):
        with _opened(path) as old, old.open(_member(old, "pkg-")) as source:
            zstandard.ZstdDecompressor().copy_stream(source, plain)
        plain.seek(0)
        _normalise(plain, normal, replaced or {})
        # The size is part of the frame, so that the window is chosen for it.
        size = normal.seek(0, io.SEEK_END)
        normal.seek(0)
        zstandard.ZstdCompressor(compression_params=_parameters(size)).copy_stream(normal, packed, size=size)
        packed.seek(0)
        _write(target, packed, info_files)


def _parameters(size: int) -> zstandard.ZstdCompressionParameters:
    """Compiled kernels resemble each other over long distances: the window is as large as every zstd reads.

    The highest level would take twenty times as long for a sixth of the size.
    """
    return zstandard.ZstdCompressionParameters.from_level(12, source_size=size, window_log=27, enable_ldm=True)


def _normalise(source: IO[bytes], sink: IO[bytes], replaced: Mapping[str, bytes]) -> None:
    """The same tar with members in order of name, and fixed times and owners."""
    with tarfile.open(fileobj=source) as old, tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda m: m.name):
            member.mtime = EPOCH
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.pax_headers = {}
            if member.name in replaced:
                member.size = len(replaced[member.name])
                new.addfile(member, io.BytesIO(replaced[member.name]))
            else:
                new.addfile(member, old.extractfile(member) if member.isfile() else None)


def _write(target: Path, payload: IO[bytes], info_files: InfoFiles) -> None:
    stem = target.name.removesuffix(".conda")
    with replacing(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as new:
        _add(new, "metadata.json", b'{"conda_pkg_format_version":2}')
        with new.open(_entry(f"pkg-{stem}.tar.zst"), "w", force_zip64=True) as sink:
            shutil.copyfileobj(payload, sink, 1 << 20)
        _add(new, f"info-{stem}.tar.zst", _tar_zst(info_files))


def dump_json(value: object) -> bytes:
    """JSON in the form all our packages use: sorted, indented, newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The package as a zip; whatever shows it to be damaged becomes an integrity error."""
    try:
        with zipfile.ZipFile(path) as package:
            yield package
    except (*ZIP_DAMAGE, KeyError) as error:
        raise IntegrityError(f"{path} is not a whole .conda package ({error}).") from error


@contextmanager
def opened_payload(path: Path) -> Iterator[tarfile.TarFile]:
    """The payload as a tar that is read from its beginning to its end.

    Raises:
        IntegrityError: when the file is no whole .conda package; what reading the tar raises is in ``ZIP_DAMAGE``.
    """
    with (
        _opened(path) as package,
        package.open(_member(package, "pkg-")) as packed,
        zstandard.ZstdDecompressor().stream_reader(packed) as plain,
        tarfile.open(fileobj=plain, mode="r|", tarinfo=Member) as tar,
    ):
        yield tar


def _member(package: zipfile.ZipFile, prefix: str) -> str:
    for name in package.namelist():
        if name.startswith(prefix) and name.endswith(".tar.zst"):
            return name
    raise KeyError(f"no {prefix}*.tar.zst in it")


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0))
    entry.external_attr = 0o644 << 16
    return entry


def _add(package: zipfile.ZipFile, name: str, data: bytes) -> None:
    package.writestr(_entry(name), data)


def _tar_zst(files: InfoFiles) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            member.mtime = EPOCH
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(files[name]))
    return zstandard.ZstdCompressor(level=19).compress(buffer.getvalue())
