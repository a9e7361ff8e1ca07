"""Reads the log of a failed build or import: pip, uv, ninja, conda, pixi, Slurm, a notebook. Streamed.

Rules are looked for by their needles, plain texts, block by block; a pattern is tried only around a needle.
"""

from __future__ import annotations

import codecs
import gzip
import re
import sys
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

from ssm_forge.doctor.rules import Rule, load

_BLOCK_BYTES = 1 << 20
# What is kept of a block for the next one: texts of one failure may stand that far apart.
_NEAR_BYTES = 1 << 15
# Around a needle, and how many of one needle are looked at in a block.
_WINDOW_BYTES = 1 << 11
_MOST_HITS = 100
# Up to this size a log is searched whole; of the rest of a longer one, one line of each kind.
_SMALL_BYTES = 8 << 20
_MOST_KINDS = 200_000
_TAIL_BLOCKS = 8
# An endless stream ends here.
_MOST_BYTES = 1 << 30
# Of this process: what else a busy machine does must not change what is found.
_SEARCH_SECONDS = 3.5
_LONGEST_LINE = 300

_FAILED = (b"rror", b"FAILED", b"Killed", b"Segmentation", b"Traceback", b"fatal:")
_LAST = (b"Error: ", b"error: ", b"ERROR", b"Error\n", b"fatal: ", b"Segmentation fault", b"Killed")
_ANSI = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|[()][0-9A-B])")
# All quotes are one: compilers, shells and languages differ in nothing else.
_QUOTES = bytes.maketrans(b'`"', b"''")
_WIDE_QUOTES = tuple(quote.encode("utf-8") for quote in "\u2018\u2019\u201c\u201d\u300c\u300d\uff07\uff02")
_LINE = re.compile(r"[\n\x1e]")


@dataclass(frozen=True)
class Hit:
    """A rule that the log fits.

    Attributes:
        rule: the rule.
        line: number of the line, from 1; 0 where lines before it were not read.
        text: that line, at most 300 characters.
        symbol: the C++ symbol in it, where the rule is about one.
        name: what the rule's pattern calls ``name``.
    """

    rule: Rule
    line: int
    text: str
    symbol: str = ""
    name: str = ""


@dataclass
class Reading:
    """What a log says.

    Attributes:
        hits: recognised failures, the most probable cause first.
        bytes: how long it is, as far as it was read.
        skipped: bytes in the middle that there was no time to search.
        failed: it holds some sign of a failure.
        binary: it is no text.
        last_error: the last line that looks like an error.
    """

    hits: list[Hit] = field(default_factory=list)
    bytes: int = 0
    skipped: int = 0
    failed: bool = False
    binary: bool = False
    last_error: str = ""


def read(name: str) -> Reading:
    """What the log in the file ``name`` says, or on standard input for ``-``; ``.gz`` and UTF-16 are understood.

    Raises:
        OSError: when there is no such file, or it can't be read.
    """
    if name == "-":
        return search(sys.stdin.buffer)
    path = Path(name)
    size = path.stat().st_size if path.is_file() else None
    with path.open("rb") as stream:
        if size is not None:
            packed = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            if packed:
                with gzip.open(stream, "rb") as unpacked:
                    return search(unpacked)
        return search(stream, size)


def recognise(text: str) -> list[Hit]:
    """The rules that a short text fits, the most probable cause first."""
    finder = _Finder()
    finder.search(_clean(text.encode("utf-8", "replace")), 1)
    return finder.hits()


def search(stream: Any, size: int | None = None) -> Reading:
    """What a binary stream says, read to its end. After some seconds of work only its last megabytes are searched.

    Args:
        size: its length in bytes, where that is known.
    """
    reading = Reading()
    finder = _Finder()
    seen: set[int] = set()
    carry, line, seconds = b"", 1, 0.0
    late: deque[bytes] = deque(maxlen=_TAIL_BLOCKS)
    for raw in _blocks(stream):
        if not reading.bytes:
            reading.binary = _is_binary(raw)
        reading.bytes += len(raw)
        if seconds > _SEARCH_SECONDS:
            if len(late) == _TAIL_BLOCKS:
                reading.skipped += len(late[0])
            late.append(raw)
            continue
        start = time.process_time()
        text = _clean(raw)
        if reading.bytes > _SMALL_BYTES and (size is None or size > _SMALL_BYTES):
            text = _news(text, seen)
        text = carry + text
        finder.search(text, line)
        _note_errors(text, reading)
        carry = text[-_NEAR_BYTES:]
        line += text.count(b"\n", 0, len(text) - len(carry))
        seconds += time.process_time() - start
    if late:
        text = carry + _clean(b"".join(late))
        finder.search(text, 0)
        _note_errors(text, reading)
    reading.hits = finder.hits()
    return reading


def _blocks(stream: Any) -> Iterator[bytes]:
    decoder = None
    total = 0
    while total < _MOST_BYTES:
        try:
            raw = stream.read(_BLOCK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            # A packed file that was cut short.
            return
        if not raw:
            return
        if total == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            decoder = codecs.getincrementaldecoder("utf-16")("replace")
        total += len(raw)
        yield decoder.decode(raw).encode("utf-8", "replace") if decoder else raw


def _is_binary(raw: bytes) -> bool:
    sample = raw[:8192]
    odd = sum(byte < 9 or 13 < byte < 27 or byte == 127 for byte in sample)
    return odd > len(sample) // 20


def _clean(raw: bytes) -> bytes:
    """Without colours, with one kind of quote; a carriage return alone becomes a record separator."""
    if b"\\u001b[" in raw:
        # A notebook's file: its lines are JSON texts.
        raw = raw.replace(b"\\u001b[", b"\x1b[").replace(b'\\n"', b"\n").replace(b"\\n", b"\n")
    if b"\x1b" in raw:
        raw = _ANSI.sub(b"", raw)
    if b"\r" in raw:
        raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\x1e")
    raw = raw.translate(_QUOTES)
    if b"\xe2\x80" in raw or b"\xe3\x80" in raw or b"\xef\xbc" in raw:
        for quote in _WIDE_QUOTES:
            raw = raw.replace(quote, b"'")
    return raw


def _news(text: bytes, seen: set[int]) -> bytes:
    """``text`` with lines of a kind that was seen before made empty: long logs say the same with other numbers.

    The first and the last line stay: they may be halves.
    """
    lines = text.split(b"\n")
    kinds = text.translate(None, b"0123456789").split(b"\n")
    last = len(lines) - 1
    for number, kind in enumerate(map(hash, kinds)):
        if kind in seen and 0 < number < last:
            lines[number] = b""
        elif len(seen) < _MOST_KINDS:
            seen.add(kind)
    return b"\n".join(lines)


def _note_errors(text: bytes, reading: Reading) -> None:
    reading.failed = reading.failed or any(sign in text for sign in _FAILED)
    position = max(text.rfind(sign) for sign in _LAST)
    if position >= 0:
        reading.last_error = _line_at(text, position)


def _line_at(text: bytes, position: int) -> str:
    around = text[max(0, position - _LONGEST_LINE) : position + _LONGEST_LINE]
    middle = min(position, _LONGEST_LINE)
    before = _LINE.split(around[:middle].decode("utf-8", "replace"))[-1]
    after = _LINE.split(around[middle:].decode("utf-8", "replace"))[0]
    return printable(before + after)


def printable(text: str) -> str:
    """``text`` as one line of at most 300 characters without control characters."""
    line = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."


class _Finder:
    """Collects, for each rule, the first place that fits it."""

    def __init__(self) -> None:
        self._rules = [rule for rule in load().values() if rule.match]
        self._found: dict[str, Hit] = {}

    def search(self, text: bytes, line: int) -> None:
        """Look in a block of the log for the rules that were not found yet; what is found is kept.

        Args:
            text: a cleaned block.
            line: number of its first line; 0 where that is not known.
        """
        for rule in self._rules:
            if rule.code not in self._found:
                hit = _find(rule, text, line)
                if hit is not None:
                    self._found[rule.code] = hit

    def hits(self) -> list[Hit]:
        """What was found so far, the most probable cause first; what another hit explains is left out."""
        hits = [hit for hit in self._found.values() if not any(code in self._found for code in hit.rule.yields_to)]
        return sorted(hits, key=lambda hit: hit.rule.rank)


def _find(rule: Rule, text: bytes, line: int) -> Hit | None:
    for needle in rule.needles:
        position = text.find(needle)
        for _ in range(_MOST_HITS):
            if position < 0:
                break
            hit = _match(rule, text, position, line)
            if hit is not None:
                return hit
            position = text.find(needle, position + max(len(needle), _WINDOW_BYTES // 2))
    return None


def _match(rule: Rule, text: bytes, position: int, line: int) -> Hit | None:
    start = max(0, position - _WINDOW_BYTES)
    window = text[start : position + _WINDOW_BYTES].decode("utf-8", "replace")
    match = rule.match[0].search(window)
    if match is None:
        return None
    if len(rule.match) > 1:
        near = text[max(0, position - _NEAR_BYTES) : position + _NEAR_BYTES].decode("utf-8", "replace")
        if not all(pattern.search(near) for pattern in rule.match[1:]):
            return None
    begin = start + len(window[: match.start()].encode("utf-8", "replace"))
    groups = match.groupdict()
    symbol = next((group for group in match.groups() if group), "") if rule.symbol else ""
    number = line + text.count(b"\n", 0, begin) if line else 0
    name = groups.get("name") or ""
    return Hit(rule, number, _line_at(text, min(begin + 1, len(text) - 1)), symbol, name)
