"""Shows what ``bench build`` measured: tables for people, and a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group

from ssm_forge.base.tables import FoldingTable
from ssm_forge.base.ui import human_bytes, human_seconds
from ssm_forge.bench.tools import COMPILERS

Document = dict[str, Any]

COLOURS = {
    "cicc": "#2166ac",
    "ptxas": "#67a9cf",
    "cudafe++": "#d1e5f0",
    "host compiler": "#e08214",
    "everything else": "#999999",
}


def ratios(document: Document) -> dict[str, float]:
    """What the figures come to; only those that were measured.

    Returns:
        Name -> ratio: of wall time to another's, of CPU or of bytes; *busy* is the least busy compile window's.
    """
    steps, baseline = document["steps"], document.get("baseline", {})
    cold = steps.get("cold")
    figures: dict[str, float] = {}
    if cold:
        figures["cold: CPU outside the compilers"] = cold["cpu_outside_compilers"] / cold["cpu"]
        busy = [window["busy"] for window in cold["compile"].values()]
        figures["cold: cores busy while compiling"] = min(busy, default=0.0)
        simulated = document["simulated"]
        figures["16 cores / 2 cores, simulated"] = simulated["16"] / simulated["2"]
        for step in ("warm", "second Python"):
            if step in steps:
                figures[f"{step} / cold"] = steps[step]["wall"] / cold["wall"]
        for kind, its in baseline.items():
            figures[f"upstream, {kind} / cold"] = its["wall"] / cold["wall"]
    same = baseline.get("same capability")
    if same and cold:
        sizes = {package["file"]: package["size"] for package in cold["packages"]}
        for wheel in same["wheels"]:
            ours = next(size for file, size in sizes.items() if file.startswith(f"{wheel['project']}-"))
            figures[f"{wheel['project']}: package with upstream's flags / ours"] = wheel["size_as_package"] / ours
            figures[f"{wheel['project']}: upstream's wheel / our package"] = wheel["wheel_size"] / ours
    return figures


def tables(document: Document) -> Group:
    """Everything that was measured, as tables."""
    return Group(*filter(None, [_runs(document), _files(document), _sizes(document), _ratios(document)]))


def _rows(document: Document) -> dict[str, Document]:
    upstream = {f"upstream, {kind}": its for kind, its in document.get("baseline", {}).items()}
    return {**document["steps"], **upstream}


def _runs(document: Document) -> FoldingTable:
    table = FoldingTable("build", "wall", "CPU", "memory", *COLOURS, title="Whole builds; CPU seconds by tool")
    for name, run in _rows(document).items():
        split = _split(run)
        cells = [human_seconds(run["wall"]), f"{run['cpu']:.0f} s", human_bytes(run["peak_memory"])]
        table.add_row(name, *cells, *(f"{split[tool]:.0f}" for tool in COLOURS))
    return table


def _split(run: Document) -> dict[str, float]:
    """CPU seconds by kind of tool; they add up to the whole tree's."""
    inside = {tool: run["cpu_by_tool"].get(tool, 0.0) for tool in COMPILERS}
    return {**inside, "everything else": run["cpu_outside_compilers"]}


def _files(document: Document) -> FoldingTable | None:
    cold = document["steps"].get("cold")
    if cold is None:
        return None
    table = FoldingTable("file", "CPU", "memory", *COMPILERS, title="Cold: what each file took, in CPU seconds")
    for file in cold["files"]:
        tools = (f"{file['tools'].get(tool, 0.0):.1f}" for tool in COMPILERS)
        name = f"{file['extension']}: {file['source']}"
        table.add_row(name, f"{file['cpu']:.1f}", human_bytes(file["peak_memory"]), *tools)
    return table


def _sizes(document: Document) -> FoldingTable | None:
    same = document.get("baseline", {}).get("same capability")
    if same is None:
        return None
    table = FoldingTable(
        "project",
        "functions",
        "same SASS",
        "different",
        "wheel",
        "as a package",
        title="Upstream's flags, same kernels",
    )
    for wheel in same["wheels"]:
        code = wheel["sass"]
        differing = len(code["different"]) + len(code["only_ours"]) + len(code["only_theirs"])
        sizes = (human_bytes(wheel["wheel_size"]), human_bytes(wheel["size_as_package"]))
        table.add_row(wheel["project"], str(code["functions"][1]), str(code["identical"]), str(differing), *sizes)
    return table


def _ratios(document: Document) -> FoldingTable:
    table = FoldingTable("ratio", "", title=f"{document['machine']['cores']} cores, {document['machine']['cpu']}")
    for name, value in ratios(document).items():
        table.add_row(name, f"{value:.3f}" if value < 1 else f"{value:.1f}")
    for cores, seconds in document.get("simulated", {}).items():
        table.add_row(f"compiling on {cores} cores, simulated from each file's CPU seconds", human_seconds(seconds))
    return table


def draw(document: Document, path: Path) -> Path:
    """Write a chart of wall time and of where CPU seconds went.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = dict(reversed(_rows(document).items()))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    machine, target = document["machine"], document["target"]
    title = f"causal-conv1d and mamba-ssm, {target['variant']}, {target['cuda_arch']}"
    figure.suptitle(f"{title}\n{machine['cores']} cores of {machine['cpu']}, {document['date'][:10]}", fontsize=11)
    walls = [run["wall"] / 60 for run in rows.values()]
    bars = left.barh(list(rows), walls, color="#2166ac")
    left.bar_label(bars, [human_seconds(run["wall"]) for run in rows.values()], padding=3, fontsize=9)
    left.set_xlim(0, max(walls) * 1.25)
    left.set_xlabel("wall time, minutes")
    start = [0.0] * len(rows)
    for tool, colour in COLOURS.items():
        widths = [_split(run)[tool] / 60 for run in rows.values()]
        right.barh(list(rows), widths, left=start, label=tool, color=colour)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.set_xlabel("CPU time, minutes")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
