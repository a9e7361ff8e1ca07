"""Which environments of this workspace hold the kernels."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ssm_forge.base.paths import Workspace
from ssm_forge.install.marker import MARKER, read_marker


def installed_prefixes(workspace: Workspace) -> list[Path]:
    """The prefixes that hold the kernels, the newest first: in this workspace, and remembered by path elsewhere."""
    # Names that start with a dot are what killed installations left.
    prefixes = [path.parent.parent for path in workspace.envs.glob(f"[!.]*/{MARKER}")]
    with contextlib.suppress(OSError):
        prefixes += [Path(line) for line in (workspace.state / "prefixes").read_text().splitlines()]
    unique = [path for path in dict.fromkeys(prefixes) if read_marker(path)]
    return sorted(unique, key=lambda path: (path / MARKER).stat().st_mtime, reverse=True)


def prefix_of(variant: str, workspace: Workspace) -> Path:
    """The prefix that holds the kernels of a variant, the newest of several; where none does, the usual one."""
    prefixes = [p for p in installed_prefixes(workspace) if (m := read_marker(p)) is not None and m.variant == variant]
    return prefixes[0] if prefixes else workspace.envs / variant


def remember(prefix: Path, workspace: Workspace) -> None:
    """Keep the path of a prefix outside the workspace, for ``verify`` and ``python`` without --prefix."""
    if prefix.is_relative_to(workspace.envs):
        return
    file = workspace.state / "prefixes"
    remembered = file.read_text().splitlines() if file.exists() else []
    if str(prefix) not in remembered:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join([*remembered, str(prefix)]) + "\n")
