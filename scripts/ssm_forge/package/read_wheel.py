"""Is this file one of our wheels, and whole? Read without unpacking anything to disk."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from ssm_forge.base import foreign, platforms
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.platforms import PLATFORMS, Platform
from ssm_forge.package import wheel
from ssm_forge.package.pip_torch import Torch, page, page_of
from ssm_forge.package.write import ZIP_DAMAGE

# Where a channel has its wheels.
FOLDER = "simple"
# A leading dot or a slash never occurs.
FILENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*-[A-Za-z0-9_.!+]+(-[0-9]+_[a-z0-9_]+)?-cp\d+-cp\d+-[a-z0-9_]+\.whl")
PAGE = re.compile(r"cu\d{2,4}-torch\d{2,4}(-trees|-upstream)?")

_MOST_METADATA_BYTES = 4 << 20
_BLOCK = 1 << 20
_ORIGIN = {
    "package": foreign.is_text,
    "sha256": foreign.is_hex(64),
    "torch": foreign.is_text,
    "cuda": foreign.is_text,
    "page": foreign.is_text,
    "made_from": lambda value: isinstance(value, dict),
}


@dataclass(frozen=True)
class Wheel:
    """A whole wheel of ours.

    Attributes:
        path: where it is.
        filename: the name that it has in the index.
        project: its normalized name, ``mamba-ssm``.
        version: with the local part.
        page: the index that it belongs to, ``cu130-torch211``.
        sha256, size: of the file.
        metadata: the bytes of its METADATA.
        requires_python: version range; may be empty.
        origin: what it says of the conda package that it was made from.
    """

    path: Path
    filename: str
    project: str
    version: str
    page: str
    sha256: str
    size: int
    metadata: bytes
    requires_python: str
    origin: dict[str, Any]

    @property
    def subdir(self) -> str:
        """The folder of a channel that it belongs into."""
        return f"{FOLDER}/{self.page}"

    def provenance(self) -> dict[str, Any]:
        """What it was built from: what the conda package was, and that."""
        made_from: dict[str, Any] = self.origin["made_from"]
        package = {"uri": self.origin["package"], "sha256": self.origin["sha256"], "role": "conda package"}
        return {**made_from, "materials": [*(made_from.get("materials") or []), package]} if made_from else {}


@dataclass(frozen=True)
class Name:
    """What a wheel's file name says.

    Attributes:
        public: the version without its local part.
        python: ``3.12``.
        archs: its GPU code.
        machine: what it runs on, ``x86_64``.
        order: what pip compares wheels of one Python by: the higher is the newer.
    """

    project: str
    version: Version
    public: str
    python: str
    archs: ArchList
    machine: str
    order: tuple[Any, ...]


def parse(filename: str) -> Name:
    """What the file name of a wheel of ours says.

    Raises:
        IntegrityError: when that is no name of a wheel of ours.
    """
    try:
        if not FILENAME.fullmatch(filename):
            raise InvalidWheelFilename(filename)
        project, version, build, tags = parse_wheel_filename(filename)
    except (InvalidWheelFilename, InvalidVersion) as error:
        what = f"'{filename}' is no name of a wheel (NAME-VERSION-BUILD-PYTHON-ABI-PLATFORM.whl)."
        raise IntegrityError(what) from error
    digits = next(iter(tags)).interpreter.removeprefix("cp")
    archs = ArchList.from_tag(build[1].removeprefix("_")) if build else ArchList(())
    machine = next((p.machine for p in PLATFORMS if filename.endswith(f"_{p.machine}.whl")), "")
    return Name(project, version, version.public, f"{digits[0]}.{digits[1:]}", archs, machine, (version, build))


def inspect(path: Path, *, filename: str = "") -> Wheel:
    """Read a wheel through and check it: every file is what RECORD says, and its name what its metadata say.

    Args:
        filename: the name it is to have in the index, where that is not its own.

    Raises:
        IntegrityError: when it is no whole wheel, or none that :mod:`ssm_forge.build.make_wheel` makes.
    """
    filename = filename or path.name
    named = parse(filename)
    try:
        with zipfile.ZipFile(path) as archive:
            info = _info(archive, filename)
            _check_record(archive, info, filename)
            _check_machine(archive, filename)
            metadata = _member(archive, f"{info}/METADATA", filename)
            origin = foreign.json_from(_member(archive, f"{info}/{wheel.ORIGIN}", filename))
    except (*ZIP_DAMAGE, OSError, csv.Error) as error:
        raise IntegrityError(f"{filename} is not a whole wheel ({error}).") from error
    headers = HeaderParser().parsestr(metadata.decode("utf-8", "replace"))
    told = (canonicalize_name(headers.get("Name", "")), headers.get("Version", ""))
    if told != (named.project, str(named.version)):
        raise IntegrityError(f"{filename} holds the metadata of {' '.join(told)}.")
    where = _page(origin, filename, named)
    size, sha256 = path.stat().st_size, sha256_of(path)
    requires_python = headers.get("Requires-Python", "")
    return Wheel(path, filename, named.project, told[1], where, sha256, size, metadata, requires_python, origin)


def origin_of(path: Path) -> dict[str, Any]:
    """What a wheel says of the package that it was made from; empty where it says nothing, or is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = foreign.json_from(_member(archive, f"{_info(archive, path.name)}/{wheel.ORIGIN}", path.name))
    except (*ZIP_DAMAGE, OSError, IntegrityError):
        return {}
    return found if isinstance(found, dict) else {}


def _page(told: dict[str, Any], filename: str, named: Name) -> str:
    """The index that a wheel is for, where its version says the same."""
    try:
        foreign.require(told, _ORIGIN)
    except ValueError as error:
        raise IntegrityError(f"{filename} does not say what it was made from ({error}).") from error
    torch = Torch(told["torch"], told["cuda"])
    where = str(told["page"])
    fits = PAGE.fullmatch(where) and where == page(torch, page_of(where))
    if not fits or f".{torch.local}." not in f".{named.version.local}.":
        raise IntegrityError(f"{filename} says that it is for {where}, and its version says {named.version.local}.")
    return where


def _info(archive: zipfile.ZipFile, filename: str) -> str:
    infos = {name.split("/", 1)[0] for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)}
    if len(infos) != 1:
        raise IntegrityError(f"{filename} has {len(infos)} RECORDs, instead of one.")
    return infos.pop()


def _check_record(archive: zipfile.ZipFile, info: str, filename: str) -> None:
    names = archive.namelist()
    record = _member(archive, f"{info}/RECORD", filename).decode("utf-8", "replace")
    listed = {row[0]: row[1] for row in csv.reader(io.StringIO(record)) if len(row) == 3}
    if sorted(names) != sorted(listed):
        odd = sorted({*names} ^ {*listed}) or sorted(names)
        raise IntegrityError(f"{filename} and its RECORD differ in {', '.join(odd[:3])}.")
    for name in names:
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/") or name.endswith("/"):
            raise IntegrityError(f"{filename} has an entry '{name}' that leads out of the environment.")
        if name != f"{info}/RECORD" and _digest(archive, name) != listed[name]:
            raise IntegrityError(f"{filename}: {name} is not what its RECORD says.")


def _check_machine(archive: zipfile.ZipFile, filename: str) -> None:
    """Refuse a compiled module that is for another machine than the wheel's name says."""
    for name in archive.namelist():
        if not name.endswith(".so"):
            continue
        with archive.open(name) as stream:
            found = platforms.of_elf(stream.read(20))
        if found is not None and not (isinstance(found, Platform) and filename.endswith(f"_{found.machine}.whl")):
            people = found if isinstance(found, str) else found.people
            raise IntegrityError(f"{filename} holds {name}, which is for {people}: its name says another machine.")


def _digest(archive: zipfile.ZipFile, name: str) -> str:
    total = hashlib.sha256()
    with archive.open(name) as stream:
        while block := stream.read(_BLOCK):
            total.update(block)
    return f"sha256={base64.urlsafe_b64encode(total.digest()).rstrip(b'=').decode()}"


def _member(archive: zipfile.ZipFile, name: str, filename: str) -> bytes:
    if name not in archive.namelist():
        raise IntegrityError(f"{filename} has no {name}: it is none that this project makes.")
    with archive.open(name) as stream:
        return foreign.limited(stream, _MOST_METADATA_BYTES)
