"""Which tests may be skipped, and where: the entries of ``skips.toml``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TIERS = ("fast", "middle", "all")


@dataclass(frozen=True)
class Skip:
    """One test that was not run, or a file of them.

    Attributes:
        test: pytest's node ID.
        reason: what it said.
    """

    test: str
    reason: str

    @classmethod
    def of(cls, report: Any) -> Skip:
        """From a report of a skipped test or file."""
        _, _, message = report.longrepr
        return cls(report.nodeid, message.removeprefix("Skipped: "))


@dataclass(frozen=True)
class Expected:
    """An entry of the list.

    Attributes:
        reason: pattern of what a skipped test says.
        tiers: where that is in order.
        why: what it depends on, or where else the test runs.
    """

    reason: re.Pattern[str]
    tiers: tuple[str, ...]
    why: str


def read(document: Mapping[str, Any]) -> tuple[Expected, ...]:
    """The entries of the parsed list.

    Raises:
        ValueError: for an entry that names no tier that exists, or no reason.
    """
    entries = []
    for entry in document["skip"]:
        tiers = tuple(entry["tiers"])
        if not tiers or set(tiers) - set(TIERS) or not entry["why"]:
            raise ValueError(f"'{entry['reason']}' names no tier of {', '.join(TIERS)}, or does not say why")
        entries.append(Expected(re.compile(entry["reason"]), tiers, entry["why"]))
    return tuple(entries)


def load() -> tuple[Expected, ...]:
    """The list of this repository, ``tests/skips.toml``."""
    return read(tomllib.loads((Path(__file__).parents[1] / "skips.toml").read_text(encoding="utf-8")))


def unexpected(skips: Iterable[Skip], expected: Sequence[Expected], tier: str) -> list[Skip]:
    """The skips that no entry expects in this tier."""
    here = [entry for entry in expected if tier in entry.tiers]
    return [skip for skip in skips if not any(entry.reason.match(skip.reason) for entry in here)]
