"""How two .conda files differ, as a person can read it: down to the line, the section, the instruction.

Whatever was built is compared before what only repeats it (lists of hashes, bytecode), and the first difference
is shown in full: one changed line of C++ changes a library, its hash in RECORD and that of RECORD in paths.json.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.files import sha256_of
from ssm_forge.package.file_differences import NEW, OLD, bytes_around, explain, lines_that_differ, only

_MOST_CHARACTERS = 200

# What a zip notes of a member beside its bytes.
_ZIP_METADATA = ("date_time", "external_attr", "compress_type", "create_system", "flag_bits", "extra", "comment")

# Files that say again what other files are.
_DERIVED = re.compile(r"\.pyc$|\.dist-info/RECORD$|^info/(paths\.json|files)$")


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same.

    Attributes:
        where: path of the file in the package, or the part of the .conda file.
        what: the difference in one line.
        detail: the difference in full, as far as a person can read it; of the first one only.
    """

    where: str
    what: str
    detail: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two .conda files side by side.

    Attributes:
        sha256: of the first file and of the second.
        differences: the most telling one first; empty when the files are the same.
    """

    sha256: tuple[str, str]
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        """Whether the files have the same bytes."""
        return self.sha256[0] == self.sha256[1]


@dataclass(frozen=True)
class _Entry:
    """A member of a tar; ``stamp`` is what says nothing about the file itself: time and owner."""

    kind: str
    mode: int
    link: str
    size: int
    sha256: str
    stamp: tuple[object, ...] = field(compare=False)


@dataclass(frozen=True)
class _Part:
    """One unpacked ``.tar.zst`` of a package."""

    member: str
    packed: Path
    tar: Path
    entries: dict[str, _Entry]

    def read(self, name: str) -> bytes:
        with tarfile.open(self.tar) as tar:
            stream = tar.extractfile(name)
            return stream.read() if stream else b""


@dataclass(frozen=True)
class _Package:
    """An opened .conda file: its zip's entries, ``pkg`` and ``info``, and whatever else is in the zip."""

    path: Path
    zip: tuple[zipfile.ZipInfo, ...]
    comment: bytes
    parts: dict[str, _Part]
    others: dict[str, bytes]


def compare(package: Path, rebuilt: Path) -> Comparison:
    """Two .conda files in; what differs between them out, the most telling first.

    Raises:
        IntegrityError: when one of them is not a whole .conda package.
    """
    digests = sha256_of(package), sha256_of(rebuilt)
    if digests[0] == digests[1]:
        return Comparison(digests, ())
    with tempfile.TemporaryDirectory(prefix="ssm-forge-diff-") as folder:
        old, new = (_open(path, Path(folder) / label) for path, label in ((package, OLD), (rebuilt, NEW)))
        differences = _contents(old, new, Path(folder))
        return Comparison(digests, tuple(differences or _container(old, new, Path(folder))))


def _open(path: Path, folder: Path) -> _Package:
    folder.mkdir()
    parts, others = {}, {}
    try:
        with zipfile.ZipFile(path) as package:
            for name in package.namelist():
                role = name.partition("-")[0]
                if role in ("pkg", "info") and name.endswith(".tar.zst"):
                    parts[role] = _unpack(package, name, folder / role)
                else:
                    others[name] = package.read(name)
            entries, comment = tuple(package.infolist()), package.comment
    except (zipfile.BadZipFile, zstandard.ZstdError, tarfile.TarError, EOFError) as error:
        raise IntegrityError(f"{path} is not a whole .conda package ({error}).") from error
    missing = {"pkg", "info"} - set(parts)
    if missing:
        raise IntegrityError(f"{path} is not a whole .conda package (no {min(missing)}-*.tar.zst in it).")
    return _Package(path, entries, comment, parts, others)


def _unpack(package: zipfile.ZipFile, name: str, target: Path) -> _Part:
    packed, tar = target.with_suffix(".tar.zst"), target.with_suffix(".tar")
    packed.write_bytes(package.read(name))
    with packed.open("rb") as source, tar.open("wb") as sink:
        zstandard.ZstdDecompressor().copy_stream(source, sink)
    with tarfile.open(tar) as opened:
        return _Part(name, packed, tar, dict(_entry(opened, member) for member in opened))


def _entry(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[str, _Entry]:
    digest = hashlib.sha256()
    stream = tar.extractfile(member) if member.isfile() else None
    while stream is not None and (chunk := stream.read(1 << 20)):
        digest.update(chunk)
    kinds = {tarfile.DIRTYPE: "folder", tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link"}
    kind = "file" if member.isfile() else kinds.get(member.type, f"tar type {member.type!r}")
    stamp = (member.mtime, member.uid, member.gid, member.uname, member.gname)
    sha256 = digest.hexdigest() if member.isfile() else ""
    return member.name, _Entry(kind, member.mode, member.linkname, member.size, sha256, stamp)


def _contents(old: _Package, new: _Package, folder: Path) -> list[Difference]:
    """Differences of the files in both parts, the first one in full."""
    names = []
    for role in ("pkg", "info"):
        before, after = old.parts[role], new.parts[role]
        for name in before.entries.keys() | after.entries.keys():
            if before.entries.get(name) != after.entries.get(name):
                names.append((bool(_DERIVED.search(name)), role == "info", name))
    differences: list[Difference] = []
    for _, is_info, name in sorted(names):
        before, after = (package.parts["info" if is_info else "pkg"] for package in (old, new))
        one, other = before.entries.get(name), after.entries.get(name)
        detail: Sequence[str] = ()
        if not differences and one and other and one.sha256 != other.sha256 and one.kind == other.kind == "file":
            detail = explain(before.read(name), after.read(name), folder)
        differences.append(_difference(name, _what(one, other), detail))
    return differences


def _what(old: _Entry | None, new: _Entry | None) -> str:
    if old is None or new is None:
        return only(old)
    parts = []
    if old.kind != new.kind:
        parts.append(f"a {old.kind}, {NEW} a {new.kind}")
    if old.mode != new.mode:
        parts.append(f"mode {old.mode:o}, {NEW} {new.mode:o}")
    if old.link != new.link:
        parts.append(f"points to '{old.link}', {NEW} to '{new.link}'")
    if (old.size, old.sha256) != (new.size, new.sha256):
        before, after = (f"{e.size} bytes with sha256 {e.sha256[:12] or '(none)'}" for e in (old, new))
        parts.append(f"{before}, {NEW} {after}")
    return "; ".join(parts)


def _difference(where: str, what: str, detail: Sequence[str] = ()) -> Difference:
    return Difference(_plain(where), _plain(what), tuple(_plain(line) for line in detail))


def _plain(text: str) -> str:
    """One line for a terminal: what a package holds must not move the cursor or fill the screen."""
    safe = "".join(c if c.isprintable() else "    " if c == "\t" else f"\\x{ord(c):02x}" for c in text)
    return safe if len(safe) <= _MOST_CHARACTERS else f"{safe[:_MOST_CHARACTERS]}..."


def _container(old: _Package, new: _Package, folder: Path) -> list[Difference]:
    """Where two packages of the same files differ all the same: tar headers, compression, the zip itself."""
    differences = [*_zip_members(old, new, folder)]
    for role in ("pkg", "info"):
        before, after = old.parts[role], new.parts[role]
        what, one, other = "the same files in another tar", before.tar.read_bytes(), after.tar.read_bytes()
        if one == other:
            what, one, other = (
                "the same tar, compressed otherwise",
                before.packed.read_bytes(),
                after.packed.read_bytes(),
            )
        elif metadata := _tar_metadata(before, after):
            what = f"{what}: {metadata}"
        if one != other:
            differences.append(_difference(before.member, what, bytes_around(one, other)))
    differences += _zip_metadata(old, new)
    rest = _difference(
        "zip",
        "the same members in another structure",
        bytes_around(old.path.read_bytes(), new.path.read_bytes()),
    )
    return differences or [rest]


def _tar_metadata(old: _Part, new: _Part) -> str:
    if list(old.entries) != list(new.entries):
        return "its members are in another order"
    for name, entry in old.entries.items():
        labels = ("time", "uid", "gid", "owner", "group")
        pairs = zip(labels, entry.stamp, new.entries[name].stamp, strict=True)
        changes = ", ".join(f"{label} {a}, {NEW} {b}" for label, a, b in pairs if a != b)
        if changes:
            return f"{name} has {changes}"
    return ""


def _zip_members(old: _Package, new: _Package, folder: Path) -> Iterator[Difference]:
    before, after = ([entry.filename for entry in package.zip] for package in (old, new))
    if before != after:
        yield _difference("zip", "its members have other names or another order", lines_that_differ(before, after))
    for name in sorted(old.others.keys() & new.others.keys()):
        if old.others[name] != new.others[name]:
            detail = explain(old.others[name], new.others[name], folder)
            yield _difference(name, "a member of the zip with other bytes", detail)


def _zip_metadata(old: _Package, new: _Package) -> Iterator[Difference]:
    for one, other in zip(old.zip, new.zip, strict=False):
        pairs = ((key, getattr(one, key), getattr(other, key)) for key in _ZIP_METADATA)
        changes = ", ".join(f"{key} {a}, {NEW} {b}" for key, a, b in pairs if a != b)
        if changes:
            yield _difference(one.filename, f"zip metadata: {changes}")
    if old.comment != new.comment:
        yield _difference("zip", f"its comment is {old.comment!r}, {NEW} {new.comment!r}")
