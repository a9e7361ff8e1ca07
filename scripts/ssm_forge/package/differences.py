"""How two .conda files differ, as a person can read it: down to the line, the section, the instruction.

Whatever was built is compared before what only repeats it (lists of hashes, bytecode), and the first difference
is shown in full: one changed line of C++ changes a library, its hash in RECORD and that of RECORD in paths.json.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zstandard
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from ssm_forge.base.errors import IntegrityError, MachineError
from ssm_forge.base.files import sha256_of
from ssm_forge.package import libraries as elf

OLD, NEW = "package", "rebuilt"

# How much of one difference is shown: lines of a diff, names of a list.
LINES = 40
NAMES = 10
_WIDTH = 200

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
    """Compare two packages.

    Raises:
        IntegrityError: when one of them is not a whole .conda package.
    """
    digests = sha256_of(package), sha256_of(rebuilt)
    if digests[0] == digests[1]:
        return Comparison(digests, ())
    with tempfile.TemporaryDirectory(prefix="ssm-forge-diff-") as folder:
        old, new = (_open(path, Path(folder) / label) for path, label in ((package, OLD), (rebuilt, NEW)))
        found = _contents(old, new, Path(folder))
        return Comparison(digests, tuple(found or _container(old, new, Path(folder))))


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
    found = []
    for role in ("pkg", "info"):
        before, after = old.parts[role], new.parts[role]
        for name in before.entries.keys() | after.entries.keys():
            if before.entries.get(name) != after.entries.get(name):
                found.append((bool(_DERIVED.search(name)), role == "info", name))
    differences: list[Difference] = []
    for _, is_info, name in sorted(found):
        before, after = (package.parts["info" if is_info else "pkg"] for package in (old, new))
        one, other = before.entries.get(name), after.entries.get(name)
        detail: Sequence[str] = ()
        if not differences and one and other and one.sha256 != other.sha256 and one.kind == other.kind == "file":
            detail = _detail(before.read(name), after.read(name), folder)
        differences.append(_difference(name, _what(one, other), detail))
    return differences


def _what(old: _Entry | None, new: _Entry | None) -> str:
    if old is None or new is None:
        return _only(old)
    told = []
    if old.kind != new.kind:
        told.append(f"a {old.kind}, {NEW} a {new.kind}")
    if old.mode != new.mode:
        told.append(f"mode {old.mode:o}, {NEW} {new.mode:o}")
    if old.link != new.link:
        told.append(f"points to '{old.link}', {NEW} to '{new.link}'")
    if (old.size, old.sha256) != (new.size, new.sha256):
        before, after = (f"{e.size} bytes with sha256 {e.sha256[:12] or '(none)'}" for e in (old, new))
        told.append(f"{before}, {NEW} {after}")
    return "; ".join(told)


def _only(old: object) -> str:
    return f"only in the {NEW} one" if old is None else f"only in the {OLD}"


def _difference(where: str, what: str, detail: Sequence[str] = ()) -> Difference:
    return Difference(_plain(where), _plain(what), tuple(_plain(line) for line in detail))


def _plain(text: str) -> str:
    """One line for a terminal: what a package holds must not move the cursor or fill the screen."""
    safe = "".join(c if c.isprintable() else "    " if c == "\t" else f"\\x{ord(c):02x}" for c in text)
    return safe if len(safe) <= _WIDTH else f"{safe[:_WIDTH]}..."


def _detail(old: bytes, new: bytes, folder: Path) -> list[str]:
    """The difference between two files, in the form that fits them."""
    if old.startswith(b"\x7fELF") and new.startswith(b"\x7fELF"):
        try:
            return _elf_detail(old, new, folder)
        except ELFError as error:
            return [f"not a readable ELF file ({error})", *_hex(old, new)]
    before, after = _lines(old), _lines(new)
    if before is None or after is None:
        return _hex(old, new)
    return _diff(before, after)


def _lines(data: bytes) -> list[str] | None:
    """A text's lines, JSON with one value a line; None for what is no text."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    if "\n" not in text.strip():
        try:
            return json.dumps(json.loads(text), indent=2).split("\n")
        except ValueError:
            pass
    return text.split("\n")


def _diff(old: list[str], new: list[str]) -> list[str]:
    if old == new:
        return ["the same values, spelt otherwise"]
    return _head(list(difflib.unified_diff(old, new, OLD, NEW, lineterm="")), LINES)


def _head(lines: list[str], limit: int) -> list[str]:
    return lines if len(lines) <= limit else [*lines[:limit], f"... and {len(lines) - limit} more"]


def _first_byte(old: bytes | memoryview, new: bytes | memoryview) -> int:
    """Offset of the first byte that differs; the shorter one's length where it is the other's beginning."""
    size, step = min(len(old), len(new)), 1 << 16
    for start in range(0, size, step):
        one, other = bytes(old[start : min(start + step, size)]), bytes(new[start : min(start + step, size)])
        if one != other:
            return start + next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return size


def _hex(old: bytes | memoryview, new: bytes | memoryview) -> list[str]:
    """The bytes around the first one that differs."""
    first = _first_byte(old, new)
    start = max(0, first // 16 * 16 - 16)
    lines = [f"first differing byte: {first:#x} of {len(old):#x}, {NEW} of {len(new):#x}"]
    for sign, data in (("-", old), ("+", new)):
        for row in range(start, min(start + 48, len(data)), 16):
            chunk = bytes(data[row : row + 16])
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in chunk)
            lines.append(f"{sign}{row:08x}  {chunk.hex(' '):<47}  {text}")
    return lines


@dataclass(frozen=True)
class _Section:
    offset: int
    size: int
    data: memoryview


def _elf_detail(old: bytes, new: bytes, folder: Path) -> list[str]:
    """
    Raises:
        ELFError: when one can't be read.
    """
    before, after = _sections(old), _sections(new)
    changed = _changed(before, after)
    if not changed:
        return ["every section is the same; headers or padding differ", *_hex(old, new)]
    lines = [f"sections that differ: {len(changed)} of {len(before.keys() | after.keys())}"]
    lines += _head([_section_line(name, before.get(name), after.get(name)) for name in changed], LINES)
    lines += _symbols_line("added", _symbols(new) - _symbols(old))
    lines += _symbols_line("removed", _symbols(old) - _symbols(new))
    if ".comment" in changed and ".comment" in before and ".comment" in after:
        lines += _diff(*(str(bytes(s[".comment"].data), "ascii", "replace").split("\0") for s in (before, after)))
    if ".nv_fatbin" in changed:
        return [*lines, "the GPU code differs (.nv_fatbin)", *_gpu_detail(old, new, folder)]
    shown = next((name for name in changed if name in before and name in after), None)
    return lines if shown is None else [*lines, f"in {shown}:", *_hex(before[shown].data, after[shown].data)]


def _sections(data: bytes) -> dict[str, _Section]:
    view, found = memoryview(data), dict[str, _Section]()
    for section in ELFFile(io.BytesIO(data)).iter_sections():
        header = section.header
        name = section.name if section.name not in found else f"{section.name} ({len(found)})"
        held = 0 if header.sh_type == "SHT_NOBITS" else header.sh_size
        found[name] = _Section(header.sh_offset, header.sh_size, view[header.sh_offset : header.sh_offset + held])
    return found


def _changed(old: dict[str, _Section], new: dict[str, _Section]) -> list[str]:
    """Names of sections whose bytes differ, in the file's order; one that only moved is the same."""
    names = dict.fromkeys([*old, *new])
    return [
        n for n in names if n not in old or n not in new or old[n].size != new[n].size or old[n].data != new[n].data
    ]


def _section_line(name: str, old: _Section | None, new: _Section | None) -> str:
    if old is None or new is None:
        return f"  {name}: {_what_section(old or new)}, {_only(old)}"
    place = f"  {name}: {_what_section(old)}"
    if (old.offset, old.size) != (new.offset, new.size):
        place += f"; {NEW}: {_what_section(new)}"
    return f"{place}; first differing byte {_first_byte(old.data, new.data):#x} into it"


def _what_section(section: _Section | None) -> str:
    return f"{section.size} bytes at {section.offset:#x}" if section else ""


def _symbols(data: bytes) -> set[str]:
    tables = (s for s in ELFFile(io.BytesIO(data)).iter_sections() if isinstance(s, SymbolTableSection))
    return {symbol.name for table in tables for symbol in table.iter_symbols() if symbol.name}


def _symbols_line(verb: str, names: set[str]) -> list[str]:
    if not names:
        return []
    return [f"symbols {verb}: {len(names)}", *(f"  {name}" for name in _head(sorted(names), NAMES))]


def _gpu_detail(old: bytes, new: bytes, folder: Path) -> list[str]:
    """Which of the embedded GPU binaries differ, and the first differing one's function as instructions."""
    try:
        tool = elf.cuobjdump()
    except MachineError as error:
        return [f"not disassembled: {error.what}"]
    before, after = (_gpu_files(tool, data, folder / f"gpu-{label}") for data, label in ((old, OLD), (new, NEW)))
    lines = [f"  {name}: only in the {OLD}" for name in before if name not in after]
    lines += [f"  {name}: only in the {NEW} one" for name in after if name not in before]
    both = [name for name in before if name in after]
    changed = [name for name in both if before[name].read_bytes() != after[name].read_bytes()]
    lines = _head(lines, NAMES)
    if not changed:
        return lines or ["every cubin and PTX in it is the same; its own headers differ"]
    lines.append(f"GPU binaries that differ: {len(changed)} of {len(both)}, the first one: {changed[0]}")
    if changed[0].endswith(".ptx"):
        return lines + _diff(before[changed[0]].read_text().split("\n"), after[changed[0]].read_text().split("\n"))
    return lines + _cubin_detail(tool, before[changed[0]], after[changed[0]])


def _gpu_files(tool: Path, library: bytes, folder: Path) -> dict[str, Path]:
    """Every cubin and PTX of a library, extracted, in the order in which they lie in it."""
    folder.mkdir()
    (folder / "code.so").write_bytes(library)
    for option in ("--extract-elf", "--extract-ptx"):
        # It fails where there is none of the kind: what counts is what it writes.
        subprocess.run([tool, option, "all", "code.so"], cwd=folder, capture_output=True, check=False)
    files = [path for path in folder.iterdir() if path.suffix in (".cubin", ".ptx")]
    return {path.name: path for path in sorted(files, key=lambda p: (p.suffix, _number(p), p.name))}


def _number(path: Path) -> int:
    found = re.search(r"\.(\d+)\.", path.name)
    return int(found.group(1)) if found else 0


def _cubin_detail(tool: Path, old: Path, new: Path) -> list[str]:
    before, after = _sections(old.read_bytes()), _sections(new.read_bytes())
    changed = _changed(before, after)
    functions = [name.removeprefix(".text.") for name in changed if name.startswith(".text.")]
    both = [name for name in functions if f".text.{name}" in before and f".text.{name}" in after]
    if not both:
        lines = [f"no function's instructions differ; {len(changed)} sections of the cubin do:"]
        return lines + _head([_section_line(name, before.get(name), after.get(name)) for name in changed], NAMES)
    lines = [f"functions in it that differ: {len(functions)}, the first one: {both[0]}"]
    one, other = (_sass(tool, path, both[0]) for path in (old, new))
    if not one or not other:
        return [*lines, *_hex(before[f".text.{both[0]}"].data, after[f".text.{both[0]}"].data)]
    # The encodings beside the instructions tell only where nothing else does: scheduling, which has no mnemonic.
    plain = [[text for line in code if (text := _without_encoding(line))] for code in (one, other)]
    return lines + (_diff(*plain) if plain[0] != plain[1] else _diff(one, other))


def _sass(tool: Path, cubin: Path, function: str) -> list[str]:
    done = subprocess.run(
        [tool, "--dump-sass", "--function", function, cubin], capture_output=True, text=True, check=False
    )
    return done.stdout.split("\n") if done.returncode == 0 else []


def _without_encoding(line: str) -> str:
    return re.sub(r"/\* 0x[0-9a-f]+ \*/", "", line).rstrip()


def _container(old: _Package, new: _Package, folder: Path) -> list[Difference]:
    """Where two packages of the same files differ all the same: tar headers, compression, the zip itself."""
    found = [*_zip_members(old, new, folder)]
    for role in ("pkg", "info"):
        before, after = old.parts[role], new.parts[role]
        what, one, other = "the same files in another tar", before.tar.read_bytes(), after.tar.read_bytes()
        if one == other:
            what, one, other = (
                "the same tar, compressed otherwise",
                before.packed.read_bytes(),
                after.packed.read_bytes(),
            )
        elif told := _tar_metadata(before, after):
            what = f"{what}: {told}"
        if one != other:
            found.append(_difference(before.member, what, _hex(one, other)))
    found += _zip_metadata(old, new)
    rest = _difference(
        "zip", "the same members in another structure", _hex(old.path.read_bytes(), new.path.read_bytes())
    )
    return found or [rest]


def _tar_metadata(old: _Part, new: _Part) -> str:
    if list(old.entries) != list(new.entries):
        return "its members are in another order"
    for name, entry in old.entries.items():
        labels = ("time", "uid", "gid", "owner", "group")
        pairs = zip(labels, entry.stamp, new.entries[name].stamp, strict=True)
        told = ", ".join(f"{label} {a}, {NEW} {b}" for label, a, b in pairs if a != b)
        if told:
            return f"{name} has {told}"
    return ""


def _zip_members(old: _Package, new: _Package, folder: Path) -> Iterator[Difference]:
    before, after = ([entry.filename for entry in package.zip] for package in (old, new))
    if before != after:
        yield _difference("zip", "its members have other names or another order", _diff(before, after))
    for name in sorted(old.others.keys() & new.others.keys()):
        if old.others[name] != new.others[name]:
            detail = _detail(old.others[name], new.others[name], folder)
            yield _difference(name, "a member of the zip with other bytes", detail)


def _zip_metadata(old: _Package, new: _Package) -> Iterator[Difference]:
    for one, other in zip(old.zip, new.zip, strict=False):
        pairs = ((key, getattr(one, key), getattr(other, key)) for key in _ZIP_METADATA)
        told = ", ".join(f"{key} {a}, {NEW} {b}" for key, a, b in pairs if a != b)
        if told:
            yield _difference(one.filename, f"zip metadata: {told}")
    if old.comment != new.comment:
        yield _difference("zip", f"its comment is {old.comment!r}, {NEW} {new.comment!r}")
