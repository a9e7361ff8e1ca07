"""The smallest case that still fails: what a person wants to debug."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, replace
from typing import Any, NamedTuple

from ssm_forge.kernels.draws import Case

# What a field may not go below, where 1 would make no sense.
_LEAST = {"width": 2, "sequences": 0, "groups": 0}


def _smaller_values(field: Field[Any], value: Any) -> Iterator[Any]:
    """Simpler values for one field, the boldest first."""
    if isinstance(value, bool):
        if value:
            yield False
    elif isinstance(value, int):
        least = _LEAST.get(field.name, 1)
        # Channel-last layouts want multiples of 8, hence the steps of 8.
        for candidate in (least, 8, value // 2, value - 8, value - 1):
            if least <= candidate < value:
                yield candidate
    elif field.name.endswith("dtype") and value != field.default:
        yield field.default


class Shrunk(NamedTuple):
    """A case that fails, and how many runs it took to find it."""

    case: Case
    tries: int


def shrink(case: Case, fails: Callable[[Case], bool], *, seconds: float = 20.0, tries: int = 300) -> Shrunk:
    """Make ``case`` smaller while it fails.

    Args:
        case: one that fails.
        fails: runs a case; raised errors are its own business.
        seconds: time to spend.
        tries: runs to spend.

    Returns:
        A failing case of which no single simplification fails (or the best found in time).
    """
    deadline = time.monotonic() + seconds
    used = 0
    again = True
    while again:
        again = False
        for field in fields(case):
            for value in _smaller_values(field, getattr(case, field.name)):
                candidate = replace(case, **{field.name: value})
                if candidate.invalid():
                    continue
                if used >= tries or time.monotonic() > deadline:
                    return Shrunk(case, used)
                used += 1
                if fails(candidate):
                    case, again = candidate, True
                    break
    return Shrunk(case, used)
