"""Charts of a benchmark's JSON document, as PNG, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def missing() -> str:
    """Why no chart can be drawn; empty when one can."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed"
    assert matplotlib
    return ""


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write the charts.

    Returns:
        The files written.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [_bandwidth(document, folder), _speedup(document, folder)]


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _title(document: dict[str, Any], text: str) -> str:
    device, versions = document["device"] or {}, document["versions"]
    name = device.get("name", "no GPU")
    return f"{text}\n{name}, torch {versions['torch']}, {document['date'][:10]}"


def _bandwidth(document: dict[str, Any], folder: Path) -> Path:
    """Fraction of copy bandwidth that causal_conv1d reaches, by length."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in document["rows"]:
            if row["kernel"] == "causal_conv1d" and row["direction"] == direction and row["size"] == 4:
                layout = "channel-last" if row["channel_last"] else "channel-first"
                lines.setdefault(f"{row['dtype']} {layout}", []).append((row["length"], row["fraction"]))
        for label, points in sorted(lines.items()):
            style = "--" if "last" in label else "-"
            axis.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3, label=label)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="sequence length", title=direction, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("fraction of measured copy bandwidth")
    axes[0].legend(fontsize=8)
    figure.suptitle(_title(document, "causal_conv1d, width 4, bias and SiLU"), fontsize=10)
    return _save(figure, folder / "conv-bandwidth.png")


def _speedup(document: dict[str, Any], folder: Path) -> Path:
    """How many times faster than each plain PyTorch way, forward, by length."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axis, kernel in zip(axes, ("causal_conv1d", "selective_scan"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in document["rows"]:
            if row["kernel"] != kernel or row["direction"] != "forward" or row["channel_last"]:
                continue
            if kernel == "causal_conv1d" and row["size"] != 4:
                continue
            for way, times in row["speedup"].items():
                lines.setdefault(f"{row['dtype']} over {way}", []).append((row["length"], times))
        for label, points in sorted(lines.items()):
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
        axis.set(xscale="log", yscale="log", xlabel="sequence length", title=f"{kernel} forward")
        axis.set_ylabel("times faster")
        axis.grid(alpha=0.3, which="both")
        if lines:
            axis.legend(fontsize=8)
    figure.suptitle(_title(document, "Speed-up over plain PyTorch"), fontsize=10)
    return _save(figure, folder / "speedup.png")
