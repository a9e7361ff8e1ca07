"""What the tests of this folder share: hostile input, and the proof that a reader refused it cleanly.

Every run makes the same inputs (``derandomize``), so that a failure is a failure of the code and can be run again.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ssm_forge.base.errors import ForgeError

T = TypeVar("T")

EXAMPLES = 2_000 if os.environ.get("SSM_FORGE_TEST_ALL") else 200


def hostile(share: float = 1.0) -> settings:
    """The settings of a test; ``share`` of the examples where each costs an engine's start or a disk's write."""
    return settings(
        max_examples=int(EXAMPLES * share),
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


# --- values -----------------------------------------------------------------------------------------------------------

_PATHS = (
    "..",
    "../../escape",
    "/tmp/ssm-forge-escape",
    "a/../../escape",
    "~nobody-here/x",
    "~/x",
    "/dev/zero",
    "x\0y",
    "C:\\x",
    "\x1b[2J",
    "",
    ".",
    "file:///etc/passwd",
    "http://[",
    "http://x:99999999/",
    "a" * 5_000,
    "x/" * 3_000,
    "\ud800",
    "é" * 200,
    "١٢",  # digits, but not those of a number in a file name
    "²",
    "9" * 5_000,
    "-60",
    "1e400",
    "\n",
)
_NUMBERS = (0, -1, 1 << 31, 1 << 63, 1 << 64, 10**10, -(1 << 70), 10**400, 1e400, float("nan"), -0.0, 0.5)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_NUMBERS),
    st.integers(),
    st.sampled_from(_PATHS),
    st.text(max_size=12),
)
_keys = st.one_of(st.sampled_from(_PATHS), st.text(max_size=6))
_tables = st.dictionaries(_keys, scalars, max_size=3)
values = st.one_of(
    scalars,
    scalars,
    st.lists(scalars, max_size=3),
    _tables,
    st.lists(_tables, max_size=2),
    st.builds(lambda v: {"a": v}, _tables),
)


def _deep(depth: int, kind: str) -> Any:
    content: Any = "bottom"
    for _ in range(depth):
        content = [content] if kind == "list" else {"a": content}
    return content


deep = st.builds(_deep, st.sampled_from((50, 300, 600)), st.sampled_from(("list", "table")))

# Deeper than any parser goes; never made as an object, which Python could not write.
DEEP_JSON = (b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000)


def places(content: Any) -> Iterator[tuple[Any, ...]]:
    """Where something in a document can be changed; without recursion, because some are nested deeply."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), content)]
    while waiting:
        path, found = waiting.pop()
        yield path
        inside = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        waiting += [((*path, key), value) for key, value in inside]


def _changed(content: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    if not path:
        return value
    # Only what the change is in is copied, and nothing is changed in place afterwards: a whole copy would recurse, and
    # how deep it may differs from run to run.
    content = holder = copy.copy(content)
    for key in path[:-1]:
        holder[key] = copy.copy(holder[key])
        holder = holder[key]
    last = path[-1]
    if how == "drop":
        del holder[last]
    elif how == "wrap":
        holder[last] = [holder[last]]
    elif how == "add" and isinstance(holder[last], dict):
        holder[last] = {**holder[last], str(value)[:50]: value}
    elif how == "rename" and isinstance(holder, dict):
        holder[str(value)[:5_000]] = holder.pop(last)
    elif how == "double" and isinstance(holder, list):
        holder.append(holder[last])
    else:
        holder[last] = value
    return content


@st.composite
def changed(draw: st.DrawFn, valid: Any, changes: int = 3) -> Any:
    """A valid document of which one to three things are dropped, renamed, doubled, or of another kind."""
    content = valid
    for _ in range(draw(st.integers(1, changes))):
        if not isinstance(content, (dict, list)):
            break
        path = draw(st.sampled_from(list(places(content))[1:] or [()]))
        how = draw(st.sampled_from(("drop", "wrap", "add", "rename", "double", "set", "set", "set")))
        content = _changed(content, path, how, draw(st.one_of(values, values, deep)))
    return content


# --- bytes ------------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file that was cut, or of which some bytes are others."""
    data = bytearray(valid)
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    for _ in range(draw(st.integers(0, 6))):
        if data:
            at = draw(st.integers(0, len(data) - 1))
            data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(data)


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def json_files(valid: Any) -> st.SearchStrategy[bytes]:
    """Files in place of one that holds ``valid``: anything, another document, a changed one, a damaged one."""
    return st.one_of(
        changed(valid).map(as_json),
        changed(valid).map(as_json),
        changed(valid).map(as_json),
        values.map(as_json),
        damaged(as_json(valid)),
        damaged(as_json(valid)).map(lambda data: b"\xef\xbb\xbf" + data),
        st.binary(max_size=40),
        st.sampled_from(DEEP_JSON),
    )


# --- the proof --------------------------------------------------------------------------------------------------------

_writes: list[str] | None = None
_MAKING = frozenset({"os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.chmod", "os.utime"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _writes is None or not (event == "open" or event in _MAKING):
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
        return
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return  # Relative to an open folder: the end of a temporary one.
    # Of a rename and a link, the second is what appears; of the others, the first is all there is.
    name = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
    if isinstance(name, (str, bytes, os.PathLike)):
        _writes.append(os.fsdecode(name))


sys.addaudithook(_watch)


@contextmanager
def writes_only_below(folder: Path | None) -> Iterator[None]:
    """Fail when Python made, changed or removed a file outside ``folder``; None: when it did so anywhere."""
    global _writes
    _writes = made = []
    try:
        yield
    finally:
        _writes = None
    for name in made:
        path = Path(os.path.realpath(name))
        # What Python compiles of a module that is imported late is no doing of the input.
        if "__pycache__" not in path.parts and (folder is None or not path.is_relative_to(folder.resolve())):
            raise AssertionError(f"{name} was written, which is outside of {folder}")


def judge(
    reader: Callable[[], T], *kinds: type[ForgeError], below: Path | None = None, then: Callable[[T], object] = id
) -> T | None:
    """Call a reader: a result, with which ``then`` works, or an error of its kinds that can be shown; else a failure.

    Args:
        kinds: what the reader may raise.
        below: the only folder that it may write into.
        then: what is done with the result elsewhere, which must not stumble over it.
    """
    with writes_only_below(below):
        try:
            found = reader()
            then(found)
        except kinds as error:
            assert type(error) in kinds or any(isinstance(error, kind) for kind in kinds)
            assert error.exit_code in {kind.exit_code for kind in kinds}
            assert error.what
            str(error).encode("utf-8", "backslashreplace")
            return None
    return found


# --- a bomb -----------------------------------------------------------------------------------------------------------


def zstd_bomb(size: int) -> bytes:
    """A zstd frame of ``size`` zeros (RFC 8878, blocks of one repeated byte): 10 GB take 320 kB."""
    block = 128 << 10
    head = b"\x28\xb5\x2f\xfd\x00\x38"  # no size told; a window of 128 KiB
    count = max(1, size // block)

    def header(last: int) -> bytes:
        return (block << 3 | 1 << 1 | last).to_bytes(3, "little") + b"\0"

    return head + header(0) * (count - 1) + header(1)


@contextmanager
def memory_below(most: int) -> Iterator[None]:
    """Fail when Python's memory grew by more than ``most`` bytes at any moment inside."""
    import tracemalloc

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        grown = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert grown < most, f"{grown} bytes of memory were taken, more than {most}"
