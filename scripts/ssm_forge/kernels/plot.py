"""Charts of a benchmark's JSON document, as PNG, where matplotlib is installed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssm_forge.kernels.sequences import zipped

COLOURS = {"fp32": "#777777", "fp16": "#e08214", "bf16": "#2166ac"}
Line = dict[str, list[tuple[int, float]]]


def missing() -> str:
    """Why no chart can be drawn; empty when one can."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    assert matplotlib
    return ""


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write the charts of a benchmark's document as PNG into a folder; their paths come out.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    charts = [_bandwidth(document, folder), _speedup(document, folder)]
    return charts + ([_builds(document, folder)] if document.get("builds") else [])


def _figure(document: dict[str, Any], title: str, columns: int, **options: Any) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(11, 4.6), layout="constrained", **options)
    device, versions = document["device"] or {}, document["versions"]
    machine = f"{device.get('name', 'no GPU')}, torch {versions['torch']}, {document['date'][:10]}"
    figure.suptitle(f"{title}\n{machine}", fontsize=11)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _lengths(axis: Any, lengths: Iterable[int]) -> None:
    """Sequence lengths as people write them, one tick each."""
    ticks = sorted(set(lengths))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{t // 1024}K" if t >= 1024 else str(t) for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("sequence length")
    axis.grid(alpha=0.3)


def _legend(figure: Any, axis: Any, columns: int) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9)


def _bandwidth(document: dict[str, Any], folder: Path) -> Path:
    """Fraction of copy bandwidth that causal_conv1d reaches, by length."""
    title = "causal_conv1d, width 4, bias and SiLU: share of the measured copy bandwidth"
    figure, axes = _figure(document, title, 2, sharey=True)
    for axis, direction in zipped(axes, ("forward", "backward")):
        lines: defaultdict[tuple[str, bool], list[tuple[int, float]]] = defaultdict(list)
        for row in document["rows"]:
            if row["kernel"] == "causal_conv1d" and row["direction"] == direction and row["size"] == 4:
                lines[row["dtype"], row["channel_last"]].append((row["length"], 100 * row["fraction"]))
        for (dtype, last), points in sorted(lines.items()):
            label = f"{dtype} {'channel-last' if last else 'channel-first'}"
            style = {"color": COLOURS[dtype], "linestyle": "--" if last else "-"}
            axis.plot(*zipped(*sorted(points)), marker="o", markersize=4, label=label, **style)
        axis.axhline(100, color="black", linewidth=0.8)
        axis.set(title=direction, ylim=(0, 108))
        _lengths(axis, (length for points in lines.values() for length, _ in points))
    axes[0].set_ylabel("% of copy bandwidth")
    _legend(figure, axes[0], 3)
    return _save(figure, folder / "conv-bandwidth.png")


def _speedup(document: dict[str, Any], folder: Path) -> Path:
    """How many times faster than each plain PyTorch way, forward, by length."""
    figure, axes = _figure(document, "Forward: times faster than plain PyTorch", 3)
    panels = (
        ("causal_conv1d", "nn.Conv1d + SiLU"),
        ("selective_scan", "sequential scan"),
        ("selective_scan", "parallel scan"),
    )
    for axis, (kernel, way) in zipped(axes, panels):
        lines: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        for row in document["rows"]:
            fits = row["kernel"] == kernel and row["direction"] == "forward" and not row["channel_last"]
            if fits and way in row["speedup"] and (kernel != "causal_conv1d" or row["size"] == 4):
                lines[row["dtype"]].append((row["length"], row["speedup"][way]))
        for dtype, points in sorted(lines.items()):
            axis.plot(*zipped(*sorted(points)), marker="o", markersize=4, label=dtype, color=COLOURS[dtype])
        axis.set(title=f"{kernel}\nover {way}", ylim=(0, None))
        _lengths(axis, (length for points in lines.values() for length, _ in points))
    _legend(figure, axes[0], 3)
    return _save(figure, folder / "speedup.png")


def _builds(document: dict[str, Any], folder: Path) -> Path:
    """The installed build's time against each other build's, at the same moment on the same inputs."""
    figure, axis = _figure(document, "Time of the installed build against another's, one dot a size", 1)
    rows = sorted({(row["other"], row["kernel"], row["direction"]) for row in document["builds"]})
    for height, (other, kernel, direction) in enumerate(reversed(rows)):
        for row in document["builds"]:
            if (row["other"], row["kernel"], row["direction"]) == (other, kernel, direction):
                axis.plot(100 * (row["ratio"] - 1), height, "o", color=COLOURS[row["dtype"]], alpha=0.7)
    for dtype, colour in COLOURS.items():
        axis.plot([], [], "o", color=colour, label=dtype)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvline(1, color="#b2182b", linewidth=0.8, linestyle="--", label="1 % slower")
    axis.set_yticks(range(len(rows)), [f"{k} {d}, against {o}" for o, k, d in reversed(rows)])
    axis.set_xlabel("% more time than the other build (left of 0: faster)")
    axis.grid(alpha=0.3, axis="x")
    _legend(figure, axis, 4)
    return _save(figure, folder / "builds.png")
