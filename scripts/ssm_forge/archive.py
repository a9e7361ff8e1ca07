"""Reading and rewriting the ``info/`` part of a .conda file; the payload's bytes are copied as they are.

A .conda file is a zip (stored) of ``metadata.json``, ``pkg-NAME.tar.zst`` and ``info-NAME.tar.zst``
(conda's package format, CEP-26).
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import zstandard

from ssm_forge.errors import IntegrityError

InfoFiles = dict[str, bytes]

# Every timestamp inside a package: builds at different times must give the same bytes.
EPOCH = 1_767_225_600  # 2026-01-01T00:00:00Z


def read_info(path: Path) -> InfoFiles:
    """The files of the info part: ``info/index.json`` -> bytes.

    Raises:
        IntegrityError: when the file is not a whole .conda package.
    """
    try:
        with zipfile.ZipFile(path) as package:
            member = _member(package, "info-")
            data = zstandard.ZstdDecompressor().stream_reader(package.read(member)).read()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            return {
                m.name: cast("io.BufferedReader", tar.extractfile(m)).read() for m in tar.getmembers() if m.isfile()
            }
    except (zipfile.BadZipFile, zstandard.ZstdError, tarfile.TarError, KeyError) as error:
        raise IntegrityError(f"{path} is not a whole .conda package ({error}).") from error


def read_json(path: Path, name: str) -> dict[str, Any]:
    """One JSON file of the info part, such as ``index.json``.

    Raises:
        IntegrityError: when the package or the file is damaged.
        KeyError: when the package has no such file.
    """
    data = read_info(path)[f"info/{name}"]
    try:
        return cast("dict[str, Any]", json.loads(data))
    except ValueError as error:
        raise IntegrityError(f"info/{name} of {path} is not JSON ({error}).") from error


def rewrite_info(path: Path, target: Path, edit: Callable[[InfoFiles], InfoFiles]) -> None:
    """Write ``target`` as ``path`` with its info files replaced by what ``edit`` returns.

    The same input gives the same bytes: order, times, owners and compression are fixed. ``target`` appears
    whole or not at all.
    """
    files = edit(read_info(path))
    info = _tar_zst(files)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    stem = target.name.removesuffix(".conda")
    try:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as new:
            _add(new, "metadata.json", b'{"conda_pkg_format_version":2}')
            payload = old.getinfo(_member(old, "pkg-"))
            with old.open(payload) as source, new.open(_entry(f"pkg-{stem}.tar.zst"), "w", force_zip64=True) as sink:
                while chunk := source.read(1 << 20):
                    sink.write(chunk)
            _add(new, f"info-{stem}.tar.zst", info)
        partial.replace(target)
    except zipfile.BadZipFile as error:
        raise IntegrityError(f"{path} is not a whole .conda package ({error}).") from error
    finally:
        partial.unlink(missing_ok=True)


def dump_json(value: object) -> bytes:
    """JSON in the form all our packages use: sorted, indented, newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


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
