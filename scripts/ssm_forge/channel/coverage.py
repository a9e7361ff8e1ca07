"""What a channel covers: the build matrix against the packages that exist; table, JSON or static page."""

from __future__ import annotations

import html
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version

from ssm_forge.base.arch import ArchList
from ssm_forge.base.files import write_whole
from ssm_forge.base.platforms import LINUX_64
from ssm_forge.base.tables import FoldingTable
from ssm_forge.channel.index import COMPLETE, IndexRecord
from ssm_forge.channel.source import ChannelSource, records
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.manifest.variants import Matrix
from ssm_forge.package.kernels import DEFAULT, Kernels, claimed

_BUILD = re.compile(r"cuda(\d+?)(\d)_py(\d)(\d+)_((?:sm|compute).*)_h[0-9a-f]+_\d+$")
_TORCH = re.compile(r"pytorch (?:==)?(\d+\.\d+)")


@dataclass(frozen=True)
class Item:
    """One package of ours in a channel.

    Attributes:
        kind: whether it is a conda package or a wheel.
        cuda, torch, python: minor releases, ``13.0``, ``2.11``, ``3.12``.
        archs: compute capabilities in the binary, ``8.0;9.0+PTX``.
        size: bytes of the file.
        signed: whether a signed statement lies beside it.
        kernels: ours, or upstream's as they are.
        subdir: conda's name of the platform that it is for.
    """

    filename: str
    name: str
    version: str
    cuda: str
    torch: str
    python: str
    archs: str
    size: int
    signed: bool
    kind: Literal["conda", "wheel"] = "conda"
    kernels: Kernels = DEFAULT
    subdir: str = LINUX_64.subdir

    @property
    def label(self) -> str:
        """What a cell of the table shows: the capabilities, whose kernels, a wheel, and any platform but linux-64."""
        whose = " upstream" if self.kernels == "upstream" else ""
        more = ["wheel"] if self.kind == "wheel" else []
        more += [self.subdir] if self.subdir != LINUX_64.subdir else []
        in_brackets = f" ({', '.join(more)})" if more else ""
        return f"{self.archs}{whose}{in_brackets}"


@dataclass(frozen=True)
class Row:
    """A variant's packages of one project.

    Attributes:
        cells: Python minor -> what exists for it; empty where nothing does.
        wanted: Python minors that the matrix has for it.
    """

    variant: str
    cuda: str
    torch: str
    project: str
    version: str
    wanted: tuple[str, ...]
    cells: Mapping[str, tuple[Item, ...]]


def items(source: ChannelSource) -> list[Item]:
    """The packages of ours that a channel lists.

    Raises:
        DamagedIndexError: when its index is no index.
    """
    return [
        item
        for subdir in source.subdirs()
        for filename, record in sorted(records(source, subdir, COMPLETE).items())
        if (item := _item(filename, record, subdir)) is not None
    ]


def rows(packages: list[Item], matrix: Matrix) -> list[Row]:
    """The matrix, one row a variant and project, its cells filled with ``packages``.

    Versions that the matrix no longer has get rows of their own below.
    """
    table: dict[tuple[str, str, str, str], tuple[str, tuple[str, ...]]] = {}
    for variant in matrix.variants:
        for project, version in variant.projects.items():
            key = (project, version, variant.cuda, variant.torch)
            earlier = table.get(key, ("", ()))[1]
            table[key] = (variant.name, tuple(sorted({*earlier, *variant.pythons}, key=Version)))
    for item in packages:
        table.setdefault((item.name, item.version, item.cuda, item.torch), ("", ()))
    result = []
    for (project, version, cuda, torch), (name, wanted) in table.items():
        of_this_row = [i for i in packages if (i.name, i.version, i.cuda, i.torch) == (project, version, cuda, torch)]
        pythons = sorted({*wanted, *(i.python for i in of_this_row)}, key=Version)
        cells = {python: tuple(i for i in of_this_row if i.python == python) for python in pythons}
        result.append(Row(name or "(earlier)", cuda, torch, project, version, wanted, cells))
    return sorted(result, key=lambda r: (r.variant == "(earlier)", r.variant, r.torch, r.project))


def pythons(table: list[Row]) -> list[str]:
    """All Python minors of a table, oldest first."""
    return sorted({python for row in table for python in row.cells}, key=Version)


def as_dicts(table: list[Row]) -> list[dict[str, Any]]:
    """The rows as plain values, for --json."""
    return [
        {
            "variant": row.variant,
            "cuda": row.cuda,
            "torch": row.torch,
            "project": row.project,
            "version": row.version,
            "pythons": {python: [item.filename for item in packages] for python, packages in row.cells.items()},
            "missing": [python for python in row.wanted if not row.cells[python]],
        }
        for row in table
    ]


def table(matrix_rows: list[Row]) -> FoldingTable:
    """The rows as a table for people in a terminal, a column for each Python."""
    columns = pythons(matrix_rows)
    shown = FoldingTable("variant", "CUDA", "torch", "package", *columns)
    for row in matrix_rows:
        cells = []
        for python in columns:
            packages = row.cells.get(python, ())
            absent = "not built" if python in row.wanted else ""
            cells.append("\n".join(item.label for item in packages) or absent)
        shown.add_row(row.variant, row.cuda, row.torch, f"{row.project} {row.version}", *cells)
    return shown


def page(table: list[Row], channel: str) -> str:
    """The rows as an HTML page that needs nothing but itself: no script, no font, no picture from elsewhere."""
    columns = pythons(table)
    head = "".join(f"<th scope=col>Python {python}</th>" for python in columns)
    body = "\n".join(_html_row(row, columns) for row in table)
    have = sum(bool(packages) for row in table for python, packages in row.cells.items() if python in row.wanted)
    wanted = sum(len(row.wanted) for row in table)
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    # What is to be pasted into a shell is one word there, whatever the folder is called.
    names = {"channel": html.escape(channel), "word": html.escape(shlex.quote(channel))}
    return _PAGE.format(**names, head=head, body=body, have=have, wanted=wanted, day=day, style=_STYLE)


def _item(filename: str, record: IndexRecord, subdir: str) -> Item | None:
    build_match = _BUILD.search(record.build)
    if record.name not in PROJECTS or not build_match:
        return None
    major, minor, python_major, python_minor, tag = build_match.groups()
    torch = next((m.group(1) for spec in record.depends or () if (m := _TORCH.match(spec))), "")
    return Item(
        filename=filename,
        name=record.name,
        version=record.version,
        cuda=f"{major}.{minor}",
        torch=torch,
        python=f"{python_major}.{python_minor}",
        archs=str(ArchList.from_tag(tag)),
        size=record.size or 0,
        signed=bool(record.attestations_sha256),
        kernels=claimed(record.build),
        subdir=subdir,
    )


def _html_row(row: Row, columns: list[str]) -> str:
    cells = "".join(_html_cell(row, python) for python in columns)
    label = f"{html.escape(row.project)} <b>{html.escape(row.version)}</b>"
    return (
        f"<tr><th scope=row>{html.escape(row.variant)}<small>CUDA {row.cuda}, torch {row.torch}</small></th>"
        f"<td>{label}</td>{cells}</tr>"
    )


def _html_cell(row: Row, python: str) -> str:
    packages = row.cells.get(python, ())
    if packages:
        names = "".join(
            f'<li title="{html.escape(item.filename)}">{html.escape(item.label.replace(";", " "))}'
            f"{_SIGNED if item.signed else ''}</li>"
            for item in packages
        )
        return f"<td class=yes><ul>{names}</ul></td>"
    return "<td class=no>not built</td>" if python in row.wanted else "<td class=never>–</td>"


_SIGNED = ' <abbr title="with a signed statement">✓</abbr>'

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --yes: #2e7d3222; --no: #c6282818; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border: 1px solid var(--line); padding: .4rem .6rem; text-align: left; vertical-align: top; }
th small { display: block; font-weight: normal; opacity: .75; }
td.yes { background: var(--yes); } td.no { background: var(--no); }
td.never { opacity: .5; text-align: center; }
ul { list-style: none; margin: 0; padding: 0; }
code { background: #8882; padding: .1rem .3rem; border-radius: .2rem; overflow-wrap: anywhere; }
"""

_PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>What {channel} covers</title>
<style>{style}</style>
</head>
<body>
<h1>What this channel covers</h1>
<p><code>{channel}</code>: {have} of {wanted} packages of the build matrix, as of {day}.</p>
<p>A cell lists the compute capabilities that a package has kernels for; +PTX runs on newer GPUs too, after a
compilation at first use. ✓ marks a signed statement of what the package was built from.</p>
<p>Install: <code>pixi workspace channel add --prepend {word}</code> and <code>pixi add mamba-ssm</code>, or
<code>conda install -c {word} mamba-ssm</code>.</p>
<div class=scroll>
<table>
<thead><tr><th scope=col>Variant</th><th scope=col>Package</th>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
</body>
</html>
"""


def write_page(table: list[Row], channel: str, target: Path) -> None:
    """Write the HTML page of the rows to ``target``, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page(table, channel).encode())
