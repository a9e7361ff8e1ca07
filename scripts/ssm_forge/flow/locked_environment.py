"""The kernels on top of a locked environment: no channel is asked for what the lock has."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rattler import RepoDataRecord

from ssm_forge.build import locked as locked_build
from ssm_forge.manifest.virtual import VirtualPackage
from ssm_forge.solve.solver import Request, solve


def solve_on_top(
    specs: Sequence[str],
    locked: Sequence[RepoDataRecord],
    channels: Sequence[str],
    virtual: tuple[VirtualPackage, ...],
    pending: Mapping[str, Mapping[str, Any]],
) -> list[RepoDataRecord]:
    """Solve ``specs`` with exactly the locked packages beside them; the records of all of them come out.

    Args:
        specs: the kernels, and what else is asked for.
        channels: those that have the kernels; for anything else there is only the lock.
        pending: kernels that are still to be built, file name -> index entry.

    Raises:
        SolveError: when the kernels need something that the lock has not.
        NetworkError: when one of ``channels`` can't be reached.
    """
    with tempfile.TemporaryDirectory(prefix="ssm-forge-locked-") as folder:
        indexes = locked_build.indexes(locked, Path(folder))
        records = solve(
            Request(
                specs=(*specs, *(r.name.normalized for r in locked)),
                channels=(*channels, *indexes),
                virtual=virtual,
                extra=pending,
                purpose="the environment",
            )
        )
    # As they were locked: the folders were only for the solver.
    as_locked = {r.file_name: r for r in locked}
    return [as_locked.get(r.file_name, r) for r in records]
