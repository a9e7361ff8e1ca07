"""What is in a shared library, read with the standard library alone: its needs, symbols, symbol versions, GPU code."""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_DYNAMIC, _DYNSYM, _NEEDED_VERSIONS, _GNU_HASH = 6, 11, 0x6FFFFFFE, 0x6FFFFFF6
_DT_NEEDED, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 1, 14, 15, 29
_WEAK = 2
_FATBIN = 0xBA55ED50
_PTX, _SASS = 1, 2
# No library has so many; a damaged one may claim them.
_MOST_SYMBOLS = 10_000_000


class DamagedError(Exception):
    """The file is no whole ELF library of this kind of machine."""


class Ptx(NamedTuple):
    """One PTX of a library: the compute capability that it is for, as ``90``, and the PTX version, as ``80``."""

    capability: int
    version: int


@dataclass(frozen=True)
class Library:
    """The dynamic part of a shared library.

    Attributes:
        path: the file.
        needed: names of the libraries it asks for.
        rpaths: where it looks for them, as written.
        undefined: symbols that others must define; weak ones are left out.
        versions: library -> versions of symbols needed from it.
        sass: compute capabilities with machine code, as ``90``.
        ptx: every PTX.
    """

    path: Path
    needed: tuple[str, ...]
    rpaths: tuple[str, ...]
    undefined: frozenset[str]
    versions: dict[str, frozenset[str]]
    sass: frozenset[int]
    ptx: frozenset[Ptx]

    def highest(self, prefix: str) -> tuple[int, ...]:
        """The highest version ``PREFIX_1.2`` needed from any library, as numbers; empty when there is none."""
        pattern = re.compile(rf"{prefix}_(\d+(?:\.\d+)*)$")
        matches = [pattern.match(version) for versions in self.versions.values() for version in versions]
        return max((numbers(match.group(1)) for match in matches if match), default=())


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, (2, 32) for ``2.32``; what is no number ends it."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def read(path: Path) -> Library:
    """The dynamic part and the GPU code of a shared library, by its headers.

    Raises:
        DamagedError: when the file is cut short or no 64-bit ELF library.
        OSError: when it can't be read.
    """
    with _Elf(path) as elf:
        needed, rpaths = elf.dynamic()
        sass, ptx = elf.gpu_code()
        return Library(path, needed, rpaths, frozenset(elf.undefined()), elf.versions(), sass, ptx)


def defines(path: Path, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that the library exports, by its hash table, so that big libraries cost nothing.

    Raises:
        DamagedError, OSError: as :func:`read`.
    """
    with _Elf(path) as elf:
        return {name for name in names if elf.exports(name)}


def version_texts(path: Path, prefix: str) -> tuple[int, ...]:
    """The highest ``PREFIX_1.2.3`` written in a file: what a libstdc++ offers.

    Raises:
        OSError: when it can't be read.
    """
    with path.open("rb") as stream:
        versions = re.findall(prefix.encode() + rb"_(\d+(?:\.\d+)+)\0", stream.read(16 << 20))
    return max((numbers(text.decode()) for text in versions), default=())


@dataclass(frozen=True)
class _Section:
    name: int
    kind: int
    offset: int
    size: int
    link: int
    entry: int


class _Elf:
    """An open ELF file. Whatever is wrong with it becomes a :class:`DamagedError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Elf:
        with self.path.open("rb") as stream:
            try:
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise DamagedError(f"{self.path} is empty") from error
        try:
            self._read_header()
        except (struct.error, ValueError, IndexError) as error:
            self._data.close()
            raise DamagedError(f"{self.path} is cut short ({self.path.stat().st_size} bytes)") from error
        except DamagedError:
            self._data.close()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._data.close()
        if isinstance(error, (struct.error, ValueError, IndexError, UnicodeDecodeError)):
            raise DamagedError(f"{self.path} is damaged ({error})") from error

    def _read_header(self) -> None:
        data = self._data
        if data[:4] != b"\x7fELF":
            raise DamagedError(f"{self.path} is no ELF file")
        if data[4:6] != b"\x02\x01":
            raise DamagedError(f"{self.path} is for another kind of machine")
        (start,) = struct.unpack_from("<Q", data, 0x28)
        entry, count, names = struct.unpack_from("<HHH", data, 0x3A)
        if start + entry * count > len(data) or (count and entry < 64):
            raise DamagedError(f"{self.path} is cut short: {len(data)} bytes of at least {start + entry * count}")
        self._sections = [self._section(start + entry * index) for index in range(count)]
        for section in self._sections:
            if section.kind != 8 and section.offset + section.size > len(data):
                raise DamagedError(f"{self.path} is cut short: {len(data)} bytes")
        self._names = self._sections[names].offset if names < count else 0

    def _section(self, start: int) -> _Section:
        name, kind, _, _, offset, size, link, _, _, entry = struct.unpack_from("<IIQQQQIIQQ", self._data, start)
        return _Section(name, kind, offset, size, link, entry)

    def _of_kind(self, kind: int) -> _Section | None:
        return next((section for section in self._sections if section.kind == kind), None)

    def _text(self, section: int, offset: int) -> str:
        start = self._sections[section].offset + offset
        end = self._data.find(b"\0", start)
        return self._data[start:end].decode("utf-8", "replace") if end >= 0 else ""

    def dynamic(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the libraries that it needs, and the folders where it looks for them."""
        section = self._of_kind(_DYNAMIC)
        if section is None:
            raise DamagedError(f"{self.path} is no shared library")
        needed, rpaths = [], []
        for position in range(section.offset, section.offset + section.size - 15, 16):
            tag, value = struct.unpack_from("<qQ", self._data, position)
            if tag == 0:
                break
            if tag == _DT_NEEDED:
                needed.append(self._text(section.link, value))
            elif tag in (_DT_RPATH, _DT_RUNPATH):
                rpaths += self._text(section.link, value).split(":")
        return tuple(needed), tuple(rpaths)

    def undefined(self) -> Iterator[str]:
        """Symbols that others must define; weak ones are left out."""
        for name, info, index in self._symbols():
            if index == 0 and info >> 4 != _WEAK:
                yield name

    def defined(self) -> Iterator[str]:
        """Symbols that it defines."""
        for name, _, index in self._symbols():
            if index:
                yield name

    def _symbols(self) -> Iterator[tuple[str, int, int]]:
        """(name, binding and kind, section) of each symbol"""
        section = self._of_kind(_DYNSYM)
        if section is None:
            return
        table = self._data[section.offset : section.offset + section.size - section.size % 24]
        for name, info, _, index, _, _ in struct.iter_unpack("<IBBHQQ", table):
            if name:
                yield self._text(section.link, name), info, index

    def versions(self) -> dict[str, frozenset[str]]:
        """Library -> versions of symbols needed from it."""
        section = self._of_kind(_NEEDED_VERSIONS)
        by_library: dict[str, frozenset[str]] = {}
        if section is None:
            return by_library
        position = section.offset
        for _ in range(1000):
            _, count, file, auxiliary, following = struct.unpack_from("<HHIII", self._data, position)
            names, inner = [], position + auxiliary
            for _ in range(min(count, 1000)):
                _, _, _, name, step = struct.unpack_from("<IHHII", self._data, inner)
                names.append(self._text(section.link, name))
                inner += step
            library = self._text(section.link, file)
            by_library[library] = by_library.get(library, frozenset()) | frozenset(names)
            if not following:
                break
            position += following
        return by_library

    def exports(self, name: str) -> bool:
        """Whether it defines a symbol, by its GNU hash table; by all its symbols where it has none."""
        section, symbols = self._of_kind(_GNU_HASH), self._of_kind(_DYNSYM)
        if symbols is None:
            return False
        encoded = name.encode()
        if section is None:
            return any(
                self._is_defined(symbols, index, encoded) for index in range(min(symbols.size // 24, _MOST_SYMBOLS))
            )
        data, start = self._data, section.offset
        buckets, first, bloom, _ = struct.unpack_from("<IIII", data, start)
        if not buckets:
            return False
        value = 5381
        for byte in encoded:
            value = (value * 33 + byte) & 0xFFFFFFFF
        chains = start + 16 + bloom * 8 + buckets * 4
        (index,) = struct.unpack_from("<I", data, start + 16 + bloom * 8 + 4 * (value % buckets))
        if index < first:
            return False
        for number in range(index, min(index + _MOST_SYMBOLS, symbols.size // 24)):
            (entry,) = struct.unpack_from("<I", data, chains + 4 * (number - first))
            if entry | 1 == value | 1 and self._is_defined(symbols, number, encoded):
                return True
            if entry & 1:
                return False
        return False

    def _is_defined(self, symbols: _Section, index: int, encoded: bytes) -> bool:
        name, _, _, section, _, _ = struct.unpack_from("<IBBHQQ", self._data, symbols.offset + 24 * index)
        start = self._sections[symbols.link].offset + name
        return section != 0 and self._data[start : start + len(encoded) + 1] == encoded + b"\0"

    def gpu_code(self) -> tuple[frozenset[int], frozenset[Ptx]]:
        """The capabilities with machine code, and every PTX."""
        sass: set[int] = set()
        ptx: set[Ptx] = set()
        for section in self._sections:
            if self._text_of_name(section) == ".nv_fatbin":
                self._read_fatbins(section, sass, ptx)
        return frozenset(sass), frozenset(ptx)

    def _text_of_name(self, section: _Section) -> str:
        start = self._names + section.name
        end = self._data.find(b"\0", start, start + 64)
        return self._data[start:end].decode("utf-8", "replace") if end >= 0 else ""

    def _read_fatbins(self, section: _Section, sass: set[int], ptx: set[Ptx]) -> None:
        position, end = section.offset, section.offset + section.size
        while position + 16 <= end:
            magic, _, header, size = struct.unpack_from("<IHHQ", self._data, position)
            if magic != _FATBIN:
                # Containers begin at multiples of 8.
                position += 8
                continue
            entry, stop = position + header, min(position + header + size, end)
            while entry + 64 <= stop:
                kind, _, length, payload = struct.unpack_from("<HHIQ", self._data, entry)
                minor, major, capability = struct.unpack_from("<HHI", self._data, entry + 24)
                if kind == _PTX:
                    ptx.add(Ptx(capability, major * 10 + minor))
                elif kind == _SASS:
                    sass.add(capability)
                if length + payload == 0:
                    break
                entry += length + payload
            position = max(stop, position + 8)


def exported(path: Path, pattern: str) -> set[str]:
    """The symbols that a library defines and whose names ``pattern`` matches from their beginning.

    Raises:
        DamagedError, OSError: as :func:`read`.
    """
    fits = re.compile(pattern)
    with _Elf(path) as elf:
        return {name for name in elf.defined() if fits.match(name)}
