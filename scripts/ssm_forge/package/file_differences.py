"""How two versions of one file differ, in the form that fits the file: lines, sections, instructions, bytes.

Two byte strings go in; lines for a person come out, as many as they can read.
"""

from __future__ import annotations

import difflib
import io
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from ssm_forge.base.errors import MachineError
from ssm_forge.package import libraries as elf

OLD, NEW = "package", "rebuilt"

# How much of one difference is shown: lines of a diff, names of a list.
LINES = 40
NAMES = 10


def only(old: object) -> str:
    """That a thing is in one of the two alone: in the new one where there is no ``old``."""
    return f"only in the {NEW} one" if old is None else f"only in the {OLD}"


def explain(old: bytes, new: bytes, folder: Path) -> list[str]:
    """The difference between the bytes of two files, in lines; ``folder`` is for files that tools must read."""
    if old.startswith(b"\x7fELF") and new.startswith(b"\x7fELF"):
        try:
            return _elf_detail(old, new, folder)
        except ELFError as error:
            return [f"not a readable ELF file ({error})", *bytes_around(old, new)]
    before, after = _lines(old), _lines(new)
    if before is None or after is None:
        return bytes_around(old, new)
    return lines_that_differ(before, after)


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


def lines_that_differ(old: list[str], new: list[str]) -> list[str]:
    """A unified diff of two texts' lines, its first ``LINES``."""
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


def bytes_around(old: bytes | memoryview, new: bytes | memoryview) -> list[str]:
    """The bytes around the first one that differs, as lines of 16 in hexadecimal."""
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
    """The difference between two ELF files: sections, symbols, and where the first section differs.

    Raises:
        ELFError: when one can't be read.
    """
    before, after = _sections(old), _sections(new)
    changed = _changed(before, after)
    if not changed:
        return ["every section is the same; headers or padding differ", *bytes_around(old, new)]
    lines = [f"sections that differ: {len(changed)} of {len(before.keys() | after.keys())}"]
    lines += _head([_section_line(name, before.get(name), after.get(name)) for name in changed], LINES)
    lines += _symbols_line("added", _symbols(new) - _symbols(old))
    lines += _symbols_line("removed", _symbols(old) - _symbols(new))
    if ".comment" in changed and ".comment" in before and ".comment" in after:
        lines += lines_that_differ(*(_comments(sections[".comment"]) for sections in (before, after)))
    if ".nv_fatbin" in changed:
        return [*lines, "the GPU code differs (.nv_fatbin)", *_gpu_detail(old, new, folder)]
    shown = next((name for name in changed if name in before and name in after), None)
    return lines if shown is None else [*lines, f"in {shown}:", *bytes_around(before[shown].data, after[shown].data)]


def _sections(data: bytes) -> dict[str, _Section]:
    """The sections of an ELF file by name; a second one of a name gets a number."""
    view, sections = memoryview(data), dict[str, _Section]()
    for section in ELFFile(io.BytesIO(data)).iter_sections():
        header = section.header
        name = section.name if section.name not in sections else f"{section.name} ({len(sections)})"
        held = 0 if header.sh_type == "SHT_NOBITS" else header.sh_size
        sections[name] = _Section(header.sh_offset, header.sh_size, view[header.sh_offset : header.sh_offset + held])
    return sections


def _comments(section: _Section) -> list[str]:
    """The texts of a ``.comment``: which compilers made the file."""
    return str(bytes(section.data), "ascii", "replace").split("\0")


def _changed(old: dict[str, _Section], new: dict[str, _Section]) -> list[str]:
    """Names of sections whose bytes differ, in the file's order; one that only moved is the same."""
    names = dict.fromkeys([*old, *new])
    return [
        n for n in names if n not in old or n not in new or old[n].size != new[n].size or old[n].data != new[n].data
    ]


def _section_line(name: str, old: _Section | None, new: _Section | None) -> str:
    if old is None or new is None:
        return f"  {name}: {_what_section(old or new)}, {only(old)}"
    sizes = f"  {name}: {_what_section(old)}"
    if (old.offset, old.size) != (new.offset, new.size):
        sizes += f"; {NEW}: {_what_section(new)}"
    return f"{sizes}; first differing byte {_first_byte(old.data, new.data):#x} into it"


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
    one, other = before[changed[0]], after[changed[0]]
    if changed[0].endswith(".ptx"):
        return lines + lines_that_differ(one.read_text().split("\n"), other.read_text().split("\n"))
    return lines + _cubin_detail(tool, one, other)


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
    digits = re.search(r"\.(\d+)\.", path.name)
    return int(digits.group(1)) if digits else 0


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
        return [*lines, *bytes_around(before[f".text.{both[0]}"].data, after[f".text.{both[0]}"].data)]
    # The encodings beside the instructions tell only where nothing else does: scheduling, which has no mnemonic.
    plain = [[text for line in code if (text := _without_encoding(line))] for code in (one, other)]
    return lines + (lines_that_differ(*plain) if plain[0] != plain[1] else lines_that_differ(one, other))


def _sass(tool: Path, cubin: Path, function: str) -> list[str]:
    done = subprocess.run(
        [tool, "--dump-sass", "--function", function, cubin], capture_output=True, text=True, check=False
    )
    return done.stdout.split("\n") if done.returncode == 0 else []


def _without_encoding(line: str) -> str:
    return re.sub(r"/\* 0x[0-9a-f]+ \*/", "", line).rstrip()
