"""What doctor knows: one entry of ``rules.json`` for each failure."""

from __future__ import annotations

import functools
import json
import pkgutil
import re
from dataclasses import dataclass
from typing import Any, Pattern

SEVERITIES = ("error", "warning", "hint")


@dataclass(frozen=True)
class Rule:
    """One failure: how it is recognised, what it means, what mends it.

    Attributes:
        code: its name.
        rank: its place in the file; the lower one is the more probable cause of two.
        severity: ``error`` breaks something, ``warning`` is wrong but works, ``hint`` is said beside an error only.
        cause: one sentence by language (``en``, ``zh``).
        fix: one sentence by language.
        command: the one command that mends it; ``{env}``, ``{python}`` and ``{rebuild}`` stand for the environment's.
            Empty where no command can.
        match: patterns that a log must all hold; empty when only a probe can find it.
        needles: texts of which one is in every log that the first pattern matches: what a long log is searched for.
        see: what it looks like in a log.
        symbol: the first pattern's first group is a C++ symbol.
        yields_to: codes that explain this one; beside one of them it is not told.
        sources: public threads (``owner/name#number``) or files.
        since: what it came with.
    """

    code: str
    rank: int
    severity: str
    cause: dict[str, str]
    fix: dict[str, str]
    command: str
    match: tuple[Pattern[str], ...]
    needles: tuple[bytes, ...]
    see: str
    symbol: bool
    yields_to: tuple[str, ...]
    sources: tuple[str, ...]
    since: str


@functools.lru_cache(maxsize=None)
def load() -> dict[str, Rule]:
    """All rules by their code, the most probable cause first."""
    return {entry["code"]: _rule(rank, entry) for rank, entry in enumerate(data("rules.json"))}


def data(name: str) -> Any:
    """What is in a JSON file of this package, which may lie in a ``.pyz``.

    Raises:
        FileNotFoundError: when the package has no such file.
    """
    raw: bytes | None = pkgutil.get_data(__package__, name)
    if raw is None:
        raise FileNotFoundError(name)
    return json.loads(raw.decode("utf-8"))


def _rule(rank: int, entry: dict[str, Any]) -> Rule:
    return Rule(
        code=entry["code"],
        rank=rank,
        severity=entry["severity"],
        cause=entry["cause"],
        fix=entry["fix"],
        command=entry["command"],
        match=tuple(re.compile(pattern) for pattern in entry.get("match", ())),
        needles=tuple(needle.encode("utf-8") for needle in entry.get("needles", ())),
        see=entry.get("see", ""),
        symbol=bool(entry.get("symbol")),
        yields_to=tuple(entry.get("yields_to", ())),
        sources=tuple(entry["sources"]),
        since=entry["since"],
    )
