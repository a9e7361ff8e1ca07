"""Is this file a conda package that may enter a channel? Read without unpacking anything to disk."""

from __future__ import annotations

import posixpath
import re
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import zstandard

from ssm_forge.base import platforms
from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.foreign import json_from
from ssm_forge.base.unpacking import Member
from ssm_forge.package.intact import Digest
from ssm_forge.package.write import MOST_INFO_BYTES, ZIP_DAMAGE, read_json

SUBDIRS = frozenset(
    {
        *("noarch", "linux-32", "linux-64", "linux-aarch64", "linux-armv6l", "linux-armv7l", "linux-ppc64le"),
        *("linux-riscv64", "linux-s390x", "osx-64", "osx-arm64", "win-32", "win-64", "win-arm64"),
    }
)
# CEP-26: what a package file may be called; a leading dot or a slash never occurs.
FILENAME = re.compile(r"[a-z0-9_][a-z0-9._-]*-[A-Za-z0-9._+!]+-[A-Za-z0-9._+]+\.conda")

# What a package of ours has of compiled modules.
_EXTENSION = re.compile(r"lib/python3\.\d+/site-packages/.+\.so")

# What a finished package says of its build.
PROVENANCE = "info/ssm-forge.json"


@dataclass(frozen=True)
class Package:
    """A whole package file.

    Attributes:
        path: where it is.
        subdir: the folder of a channel that it belongs into.
        sha256: of the file.
        size: bytes.
        index: its ``info/index.json``.
    """

    path: Path
    subdir: str
    sha256: str
    size: int
    index: dict[str, Any]

    @property
    def filename(self) -> str:
        """The name that the package has to have in a channel."""
        return self.path.name


def inspect(path: Path, *, filename: str = "") -> Package:
    """Read a package through and check it.

    Args:
        filename: the name it is to have in the channel, where that is not its own.

    Raises:
        IntegrityError: when it is no whole .conda file, when its metadata belong to another file name, or
            when a member would be unpacked outside of the environment.
    """
    filename = filename or path.name
    if not FILENAME.fullmatch(filename):
        raise IntegrityError(f"'{filename}' is no name of a conda package (NAME-VERSION-BUILD.conda).")
    try:
        with zipfile.ZipFile(path) as package:
            index = _check_parts(package, filename)
    except (*ZIP_DAMAGE, OSError) as error:
        raise IntegrityError(f"{filename} is not a whole .conda package ({error}).") from error
    named = f"{index.get('name')}-{index.get('version')}-{index.get('build')}.conda"
    if named != filename:
        raise IntegrityError(f"{filename} holds the metadata of {named}.")
    subdir = index.get("subdir")
    if not isinstance(subdir, str) or subdir not in SUBDIRS:
        raise IntegrityError(f"{filename} is for '{subdir}', which is no conda platform.")
    return Package(path, str(subdir), sha256_of(path), path.stat().st_size, index)


def _check_parts(package: zipfile.ZipFile, filename: str) -> dict[str, Any]:
    """Check every member of both parts; returns ``info/index.json``."""
    stem = filename.removesuffix(".conda")
    expected = {"metadata.json", f"pkg-{stem}.tar.zst", f"info-{stem}.tar.zst"}
    names = package.namelist()
    if sorted(names) != sorted(expected):
        odd = sorted({*names} ^ expected) or names
        raise IntegrityError(f"{filename} is not a .conda package: {', '.join(odd)} is missing or does not belong.")
    index: dict[str, Any] = {}
    # Others may have reasons to carry a library for another machine.
    is_ours = False
    for part in (f"info-{stem}.tar.zst", f"pkg-{stem}.tar.zst"):
        with _open_tar(package, part) as tar:
            for member in tar:
                _check_member(member, filename)
                is_ours = is_ours or member.name == PROVENANCE
                if is_ours and _EXTENSION.fullmatch(member.name) and member.isfile():
                    _check_machine(tar, member, index, filename)
                if part.startswith("info-") and member.name == "info/index.json":
                    index = _read_json(tar, member, filename)
    if not index:
        raise IntegrityError(f"{filename} has no info/index.json.")
    return index


def _check_machine(tar: tarfile.TarFile, member: tarfile.TarInfo, index: dict[str, Any], filename: str) -> None:
    """Refuse a compiled module that is for another machine than the package."""
    stream = tar.extractfile(member)
    found = platforms.of_elf(stream.read(20)) if stream is not None else None
    known = {platform.subdir: platform for platform in platforms.PLATFORMS}
    wanted = known.get(str(index.get("subdir")))
    if found is not None and wanted is not None and found != wanted:
        name = found if isinstance(found, str) else found.people
        raise IntegrityError(f"{filename} is for {wanted.people}, and its {Path(member.name).name} is for {name}.")


@contextmanager
def _open_tar(package: zipfile.ZipFile, part: str) -> Iterator[tarfile.TarFile]:
    with (
        package.open(part) as packed,
        zstandard.ZstdDecompressor().stream_reader(packed) as plain,
        tarfile.open(fileobj=plain, mode="r|", tarinfo=Member) as tar,
    ):
        yield tar


def _check_member(member: tarfile.TarInfo, filename: str) -> None:
    """Refuse what would be written outside of the folder that the package is unpacked into."""
    if _escapes(member.name):
        raise IntegrityError(f"{filename} has an entry '{member.name}' that leads out of the environment.")
    if member.issym():
        target = posixpath.join(posixpath.dirname(member.name), member.linkname)
        if member.linkname.startswith("/") or _escapes(target):
            raise IntegrityError(f"{filename} has a link '{member.name}' to '{member.linkname}' that leads outside.")
    elif member.islnk():
        if _escapes(member.linkname):
            raise IntegrityError(f"{filename} has a hard link '{member.name}' that leads out of the environment.")
    elif not (member.isfile() or member.isdir()):
        raise IntegrityError(f"{filename} has an entry '{member.name}' that is neither file, folder nor link.")


def _escapes(name: str) -> bool:
    path = PurePosixPath(posixpath.normpath(name))
    return name.startswith("/") or path.parts[:1] == ("..",) or "\\" in name or "\0" in name


def _read_json(tar: tarfile.TarFile, member: tarfile.TarInfo, filename: str) -> dict[str, Any]:
    if member.size > MOST_INFO_BYTES:
        raise IntegrityError(f"{filename}: info/index.json is {member.size} bytes long.")
    stream = tar.extractfile(member)
    try:
        data = json_from(stream.read() if stream else b"")
    except ValueError as error:
        raise IntegrityError(f"{filename}: info/index.json is not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise IntegrityError(f"{filename}: info/index.json is not a JSON object.")
    return cast("dict[str, Any]", data)


def provenance(package: Path) -> dict[str, Any]:
    """What :func:`ssm_forge.build.finalize.finalize` wrote into a package; empty for one made elsewhere."""
    try:
        return read_json(package, PROVENANCE.removeprefix("info/"))
    except KeyError:
        return {}


Material = dict[str, str]


def material_digest(item: Material) -> Digest:
    """The hash of a material."""
    algorithm = "md5" if "md5" in item and "sha256" not in item else "sha256"
    return Digest(algorithm, item[algorithm])
