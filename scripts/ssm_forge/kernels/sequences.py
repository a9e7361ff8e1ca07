"""What itertools and zip do from Python 3.10 on: these modules run in environments with 3.9, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def zipped(*sequences: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """``zip`` of sequences that must have equally many items.

    Raises:
        ValueError: when they have not.
    """
    lists = [list(sequence) for sequence in sequences]
    if len({len(items) for items in lists}) > 1:
        raise ValueError(f"sequences of {', '.join(str(len(items)) for items in lists)} items go together")
    return zip(*lists)  # noqa: B905 - what Python 3.9 lacks


def pairwise(items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Each item with the one that follows it."""
    first = list(items)
    return zip(first, first[1:])  # noqa: B905, RUF007 - what Python 3.9 lacks
