"""Solving for an environment: on this machine, and beside the packages that it has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rattler import RepoDataRecord

from ssm_forge.base import platforms
from ssm_forge.base.arch import ArchList
from ssm_forge.base.machine import glibc, gpus
from ssm_forge.base.platforms import LINUX_64
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.manifest.virtual import VirtualPackage, virtual_packages
from ssm_forge.package.installed import engine_records
from ssm_forge.solve.solver import Request, solve


def present(prefix: Path) -> tuple[RepoDataRecord, ...]:
    """The records of an existing environment's packages but ours; empty where there is no environment.

    Raises:
        InstallError: as :func:`engine_records`.
    """
    return tuple(r for r in engine_records(prefix) if r.name.normalized not in PROJECTS)


def machine_virtual_packages(subdir: str | None = None) -> tuple[VirtualPackage, ...]:
    """What this machine offers to the solver: glibc, and the driver's CUDA and the GPU where there is one.

    Args:
        subdir: as if it were one of this platform; None for its own.

    The user's CONDA_OVERRIDE_CUDA, CONDA_OVERRIDE_CUDA_ARCH and CONDA_OVERRIDE_GLIBC hold, as in conda and pixi.
    """
    from rattler import VirtualPackage as Detected
    from rattler import VirtualPackageOverrides

    detected = Detected.detect(VirtualPackageOverrides.from_env())
    versions = {str(v.into_generic().name.normalized): str(v.into_generic().version) for v in detected}
    capabilities = sorted(gpu.capability for gpu in gpus())
    return virtual_packages(
        cuda=versions.get("__cuda"),
        cuda_arch=os.environ.get("CONDA_OVERRIDE_CUDA_ARCH") or (str(capabilities[0]) if capabilities else None),
        glibc=os.environ.get("CONDA_OVERRIDE_GLIBC") or glibc() or "2.28",
        linux=versions.get("__linux", "4.18"),
        subdir=subdir or _own_subdir(),
    )


def _own_subdir() -> str:
    return (platforms.known_here() or LINUX_64).subdir


def target_machine(cuda: str, archs: ArchList | None, subdir: str | None = None) -> tuple[VirtualPackage, ...]:
    """This machine, and where it has no driver or GPU, those that the packages are for, so that it can install them.

    Args:
        cuda: CUDA release to assume where there is no driver.
        archs: what the packages are made for; where there is no GPU, one that runs them is assumed.
        subdir: the platform that the packages are for; None for this machine's.
    """

    virtual = machine_virtual_packages(subdir)
    if all(v.name != "__cuda" for v in virtual):
        virtual = (VirtualPackage("__cuda", cuda), *virtual)
    if archs is not None and all(v.name != "__cuda_arch" for v in virtual):
        virtual = (VirtualPackage("__cuda_arch", str(archs.sass[0])), *virtual)
    return virtual


def solve_for_prefix(
    specs: Sequence[str],
    channels: Sequence[str],
    *,
    prefix: Path | None,
    cuda: str,
    archs: ArchList | None = None,
    locked: Sequence[RepoDataRecord] = (),
    pending: Mapping[str, Mapping[str, Any]] | None = None,
    snapshot: Path | None = None,
    subdir: str | None = None,
) -> list[RepoDataRecord]:
    """Solve ``specs``, each package from the first channel that has it.

    Args:
        prefix: an existing environment to add to, whose packages stay as they are; None for a new one.
        cuda: CUDA release to assume where there is no driver, so that a machine without a GPU can install.
        archs: what the packages are made for; where there is no GPU, one that runs them is assumed.
        locked: the packages that a new environment is to have, as they are.
        pending: packages that are still to be built, file name -> index entry.
        snapshot: folder of recorded channel data, to solve offline.
        subdir: the platform that the environment is for; None for this machine's.

    Raises:
        SolveError: with the solver's reason, when the packages do not fit together.
    """

    kept = tuple(locked) if prefix is None else present(prefix)
    return solve(
        Request(
            specs=(*specs, *(r.name.normalized for r in kept)),
            channels=tuple(channels),
            virtual=target_machine(cuda, archs, subdir),
            subdir=subdir or _own_subdir(),
            pinned=kept,
            extra=pending or {},
            snapshot=snapshot,
            purpose=f"{prefix}" if prefix is not None and kept else "the environment",
        )
    )
