"""Applies unified diffs strictly: patches and a source tree go in, changed files and refreshed patches come out.

Every line of context must be there, though it may have moved. Own code, because that rule is the point: whatthepatch
looks for no moved lines, unidiff applies nothing, and ``patch`` guesses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ssm_forge.base.errors import BuildError

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


@dataclass(frozen=True)
class HunkResult:
    """What became of one hunk.

    Attributes:
        patch: file name of the patch.
        file: path in the source tree.
        hunk: number within the file, from 1.
        line: where the patch says it is.
        found: where it was found, None where it does not fit.
        reason: why it does not fit.
    """

    patch: str
    file: str
    hunk: int
    line: int
    found: int | None
    reason: str = ""

    def __str__(self) -> str:
        where = f"{self.patch}: {self.file}, hunk {self.hunk} (line {self.line})"
        if self.found is None:
            return f"{where} does not fit: {self.reason}"
        return f"{where} fits" + (f", now at line {self.found}" if self.found != self.line else "")


@dataclass(frozen=True)
class _Hunk:
    line: int
    before: tuple[str, ...]
    after: tuple[str, ...]


def header(patch: str) -> str:
    """What a patch says before its first file: why it exists, and upstream's view."""
    return patch[: patch.index("--- ")]


def reapply(patches: Iterable[Path], tree: Path) -> tuple[dict[str, str], list[HunkResult]]:
    """Apply patches one after the other to the files of ``tree``, in memory.

    Returns:
        The patches' new texts by file name, with the line numbers of this tree and their headers kept, and
        what became of each hunk. The texts are only of use if every hunk fits.

    Raises:
        BuildError: when a file is not a unified diff.
    """
    applied = _apply_all(patches, tree)
    return applied.patches, applied.hunks


def patched(patches: Iterable[Path], tree: Path) -> tuple[dict[str, str], list[HunkResult]]:
    """The files of ``tree`` that ``patches`` change, as they are after all of them, by path in it.

    Raises:
        BuildError: when a file is not a unified diff.
    """
    applied = _apply_all(patches, tree)
    return applied.files, applied.hunks


class _Applied(NamedTuple):
    """Changed files by path, patches refreshed by file name, and what became of each hunk."""

    files: dict[str, str]
    patches: dict[str, str]
    hunks: list[HunkResult]


def _apply_all(patches: Iterable[Path], tree: Path) -> _Applied:
    state: dict[str, str] = {}
    texts: dict[str, str] = {}
    results: list[HunkResult] = []
    for patch in patches:
        source = patch.read_text(encoding="utf-8")
        text = header(source) if "--- " in source else ""
        files = _parse(source)
        if not files:
            raise BuildError(f"{patch} is not a unified diff.")
        for name, (hunks, is_new) in files.items():
            exists = name in state or (tree / name).is_file()
            if exists == is_new:
                reason = "a file of that name is there" if is_new else "the file is gone"
                results += [HunkResult(patch.name, name, n, hunk.line, None, reason) for n, hunk in enumerate(hunks, 1)]
                continue
            if name not in state:
                state[name] = "" if is_new else (tree / name).read_text(encoding="utf-8")
            before = state[name]
            after = _apply(before, hunks, patch.name, name, results)
            state[name] = after
            old, new = before.splitlines(True), after.splitlines(True)
            text += "".join(difflib.unified_diff(old, new, "/dev/null" if is_new else f"a/{name}", f"b/{name}"))
        texts[patch.name] = text
    return _Applied(state, texts, results)


def _parse(text: str) -> dict[str, tuple[list[_Hunk], bool]]:
    """File -> its hunks, and whether the patch creates it. Counts in ``@@`` lines say where a hunk ends."""
    files: dict[str, tuple[list[_Hunk], bool]] = {}
    lines = text.splitlines()
    position, old_name, name = 0, "", ""
    while position < len(lines):
        line = lines[position]
        position += 1
        if line.startswith("--- "):
            old_name = _path(line)
        elif line.startswith("+++ "):
            name = _path(line)
            files[name] = ([], old_name == "/dev/null")
        elif (match := _HUNK.match(line)) and name:
            first, old, new = int(match[1]), int(match[2] or 1), int(match[3] or 1)
            before: list[str] = []
            after: list[str] = []
            while (len(before) < old or len(after) < new) and position < len(lines):
                line = lines[position]
                position += 1
                if line[:1] in (" ", "-", ""):
                    before.append(line[1:])
                if line[:1] in (" ", "+", ""):
                    after.append(line[1:])
            files[name][0].append(_Hunk(max(first, 1), tuple(before), tuple(after)))
    return files


def _path(line: str) -> str:
    path = line[4:].split("\t")[0].strip()
    return path.split("/", 1)[1] if path.startswith(("a/", "b/")) else path


def _apply(text: str, hunks: list[_Hunk], patch: str, name: str, results: list[HunkResult]) -> str:
    lines = text.splitlines()
    shift = 0
    for number, hunk in enumerate(hunks, 1):
        size = len(hunk.before)
        places = [i for i in range(len(lines) - size + 1) if tuple(lines[i : i + size]) == hunk.before]
        expected = hunk.line - 1 + shift
        position = expected if expected in places else places[0] if len(places) == 1 else None
        if position is None:
            reason = _reason(hunk, lines, places)
            results.append(HunkResult(patch, name, number, hunk.line, None, reason))
            continue
        results.append(HunkResult(patch, name, number, hunk.line, position + 1 - shift))
        lines[position : position + size] = hunk.after
        shift += len(hunk.after) - size
    return "".join(f"{line}\n" for line in lines)


def _reason(hunk: _Hunk, lines: list[str], places: list[int]) -> str:
    if places:
        return f"it fits at {len(places)} places"
    missing = [line.strip() for line in hunk.before if line not in lines]
    if not missing:
        return "its lines are no longer together"
    named = next((line for line in missing if line), "")
    return f"'{named}' is gone" if named else "the white space of an empty line differs"
