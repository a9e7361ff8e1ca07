"""Whether somebody works in an environment at this moment: then nothing in it is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ssm_forge.base.errors import InstallError
from ssm_forge.existing.reader import Existing
from ssm_forge.existing.torch import Torch
from ssm_forge.manifest.recipe import EXTENSIONS

_PROCESSES = Path("/proc")


def require_idle(existing: Existing, torch: Torch, processes: Path = _PROCESSES) -> None:
    """Refuse to change an environment whose libraries a process has loaded.

    Args:
        processes: the folder of Linux' processes.

    Raises:
        InstallError: when a process has loaded the environment's torch, or kernels where they would be installed:
            what it imports later would be of another release. Beside a ``--target`` torch stays as it is.
    """
    watched = [str(existing.site.resolve() / f"{extension}.") for extension in EXTENSIONS.values()]
    if existing.target is None:
        watched.append(f"{torch.folder.resolve() / 'lib'}/")
    users = list(_users(watched, processes))
    if users:
        more = f" and {len(users) - 3} more" if len(users) > 3 else ""
        beside = "" if existing.target else ", or leave the environment as it is: --target DIR installs beside it"
        raise InstallError(
            f"{existing.root} is in use: its libraries are loaded by {', '.join(users[:3])}{more}.",
            fix=f"End that process and run the same command again{beside}.",
        )


def _users(watched: list[str], processes: Path) -> Iterator[str]:
    """``python (process 42)`` for each process with a library of one of these paths; those of others can't be seen."""
    for maps in sorted(processes.glob("[0-9]*/maps")):
        try:
            text = maps.read_text(encoding="utf-8", errors="replace")
            if any(f" {path}" in text for path in watched):
                name = (maps.parent / "comm").read_text(encoding="utf-8", errors="replace").strip()
                yield f"{name} (process {maps.parent.name})"
        except OSError:
            continue  # It has ended, or is somebody else's.
