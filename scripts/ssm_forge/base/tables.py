"""Tables that lose nothing in a narrow terminal: what doesn't fit side by side is printed row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

# A column of sentences is wrapped, but not into a thread of single words.
_NARROWEST = 28
_INDENT = "  "


class FoldingTable:
    """A table, or below the width that it needs: each first cell as a heading, with the rows that share it below.

    Cells are literal text; :class:`rich.text.Text` is for what has a colour.

    Args:
        title: a line above.
        wraps: columns of sentences, which may take several lines.
    """

    def __init__(self, *columns: str, title: str = "", wraps: Sequence[str] = ()) -> None:
        self._columns, self._title, self._wraps = columns, title, frozenset(wraps)
        self._rows: list[list[Text]] = []

    def add_row(self, *cells: str | Text) -> None:
        """One cell for each column."""
        self._rows.append([cell if isinstance(cell, Text) else Text(cell) for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self._needs() <= options.max_width:
            yield self._table()
        else:
            yield from self._folded(console, options.max_width)

    def _needs(self) -> int:
        """The width in which no column but those of sentences is squeezed."""
        total = 1
        for column, cells in zip(
            self._columns, zip(*self._rows, strict=True) if self._rows else [()] * len(self._columns), strict=True
        ):
            widest = max([Text(column).cell_len, *(line.cell_len for cell in cells for line in cell.split("\n"))])
            total += 3 + (min(widest, _NARROWEST) if column in self._wraps else widest)
        return total

    def _table(self) -> Table:
        table = Table(title=Text(self._title) if self._title else None, title_justify="left")
        for column in self._columns:
            table.add_column(Text(column), overflow="fold", no_wrap=column not in self._wraps)
        for row in self._rows:
            table.add_row(*row)
        return table

    def _folded(self, console: Console, width: int) -> Iterator[Text]:
        if self._title:
            yield Text(self._title, style="italic")
        heading = None
        for first, *rest in self._rows:
            if first.plain != heading:
                heading = first.plain
                yield Text(heading, style="bold")
            lines = list(self._row(rest, console, width - 2 * len(_INDENT)))
            # The first line of a row stands out, so that rows of one heading are told apart.
            yield from (Text.assemble(_INDENT * min(later + 1, 2), line) for later, line in enumerate(lines))

    def _row(self, cells: Sequence[Text], console: Console, width: int) -> Iterator[Text]:
        line = Text()
        for column, cell in zip(self._columns[1:], cells, strict=True):
            if not cell.plain.strip():
                continue
            value = Text("; ").join(cell.split("\n"))
            item = value if column in self._wraps or not column else Text.assemble(f"{column} ", value)
            if line and line.cell_len + 2 + item.cell_len <= width:
                line = Text(", ").join((line, item))
                continue
            if line:
                yield from line.wrap(console, width, overflow="fold")
            line = item
        if line:
            yield from line.wrap(console, width, overflow="fold")
