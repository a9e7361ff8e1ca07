"""Lets ninja start with the files that take longest, so that no core waits for a last long one.

usage: order.py COSTS EXTENSION BUILD.NINJA

ninja starts what is ready in the order of the file, and setuptools sorts the sources by name. A file that COSTS does
not know goes first: it may be long. Only the order of the statements changes, no command and no result.
"""

import re
import sys
from pathlib import Path

_STATEMENT = re.compile(r"build \S+: (?:cuda_)?compile (\S+)")


def reordered(text: str, seconds: dict[str, float]) -> str:
    lines = text.splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if _STATEMENT.match(line)]

    def cost(line: str) -> float:
        found = _STATEMENT.match(line)
        return seconds.get(Path(found.group(1)).name, float("inf")) if found else 0.0

    longest_first = iter(sorted((lines[p] for p in places), key=cost, reverse=True))
    for place in places:
        lines[place] = next(longest_first)
    return "".join(lines)


def main(costs: Path, extension: str, ninja: Path) -> None:
    rows = [line.split() for line in costs.read_text().splitlines() if line and not line.startswith("#")]
    seconds = {source: float(took) for name, source, took, _ in rows if name == extension}
    ninja.write_text(reordered(ninja.read_text(), seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
