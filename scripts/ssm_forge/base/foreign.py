"""Bytes that others wrote: read with a limit, and damage of every kind shows as one ``ValueError``.

Each reader says in its own words what is wrong with its file; this makes sure that there is nothing else to catch.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What a file that is read into memory at once may have; the largest real ones are the indexes of public channels.
MOST_BYTES = 1 << 30
# Of files that people and this project write: tokens, policies, statements, pack.json, records of a prefix.
MOST_SMALL_BYTES = 64 << 20

_BLOCK_BYTES = 1 << 20
# Half of a pair in an escape: no text has it, no file name and no terminal takes it.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HEX = re.compile(r"[0-9a-f]+")


def read_bytes(path: Path, most: int = MOST_SMALL_BYTES) -> bytes:
    """The content of a file.

    Raises:
        OSError: when it can't be read.
        ValueError: when it is larger than ``most``, or its name can't be one.
    """
    with path.open("rb") as stream:
        return limited(stream, most)


def limited(stream: IO[bytes] | io.BufferedIOBase, most: int) -> bytes:
    """Everything that a stream gives.

    Raises:
        ValueError: when that is more than ``most``.
    """
    content = bytearray()
    while block := stream.read(min(_BLOCK_BYTES, most + 1 - len(content))):
        content += block
        if len(content) > most:
            raise ValueError(f"it is larger than {most} bytes")
    return bytes(content)


def json_from(data: bytes) -> Any:
    """A JSON document of text that can be written again.

    Raises:
        ValueError: when it is none.
    """
    try:
        content = json.loads(data)
        if _SURROGATE.search(data):
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return content


def toml_from(data: bytes) -> dict[str, Any]:
    """A TOML document.

    Raises:
        ValueError: when it is none.
    """
    try:
        content: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return content


def from_zstd(data: bytes | IO[bytes], most: int = MOST_BYTES) -> bytes:
    """What a zstd file holds.

    Raises:
        ValueError: when it is none, is cut, or would be larger than ``most``.
    """
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as stream:
            return limited(stream, most)
    except (zstandard.ZstdError, MemoryError) as error:
        raise ValueError(str(error)) from error


def from_xz(data: bytes, most: int = MOST_BYTES) -> bytes:
    """What an xz file holds.

    Raises:
        ValueError: when it is none, is cut, or would be larger than ``most``.
    """
    try:
        with lzma.open(io.BytesIO(data)) as stream:
            return limited(stream, most)
    except (lzma.LZMAError, EOFError, MemoryError) as error:
        raise ValueError(str(error)) from error


def is_text(value: object) -> bool:
    """Whether a value is a string."""
    return isinstance(value, str)


def is_number(value: object) -> bool:
    """A count that every format and every library takes."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def is_list_of_text(value: object) -> bool:
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_hex(digits: int) -> Callable[[object], bool]:
    """A question: whether a value is this many lower-case hexadecimal digits."""
    return lambda value: isinstance(value, str) and len(value) == digits and _HEX.fullmatch(value) is not None


def is_inside(path: object) -> bool:
    """Whether a relative path stays below the folder that it starts from, by its words."""
    if not isinstance(path, str) or not path or "\0" in path or path.startswith("/"):
        return False
    parts = path.split("/")
    return ".." not in parts and all(len(part.encode()) <= 255 for part in parts) and len(path.encode()) < 4096


def is_file_name(name: object) -> bool:
    """Whether it can be the name of a file in a folder, and nothing else."""
    return is_inside(name) and isinstance(name, str) and "/" not in name and name != "." and name.isprintable()


def require(content: object, fields: Mapping[str, Callable[[object], bool]], *, all_of_them: bool = True) -> None:
    """Make sure that a table has these fields, each of its kind.

    Args:
        all_of_them: a field that is absent or null is damage.

    Raises:
        ValueError: when it has not; names the first field that is wrong.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a table")
    for name, fits in fields.items():
        value = content.get(name)
        if value is None and not all_of_them:
            continue
        if not fits(value):
            raise ValueError(f"its {name} is {value!r:.80}" if name in content else f"it has no {name}")
