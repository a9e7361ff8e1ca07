"""How much an installation downloads, and which disks it fills: known and refused before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base.errors import MachineError
from ssm_forge.base.machine import device, free_disk
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import human_bytes
from ssm_forge.bridge import assemble
from ssm_forge.bridge import parts as bridge_parts
from ssm_forge.manifest.variants import Variant
from ssm_forge.solve import lock

# Seen with one capability: work folder, objects and the package of one project, times the list's length.
_PER_BUILD_BYTES = 400_000_000
_PER_ENVIRONMENT_BYTES = 500_000_000
# Unpacked, a package of conda-forge, torch's among them, takes this many times its archive; one of the bridge, whose
# archives are packed anew and lightly, this many.
_UNPACKED = {"conda": 4.0, "bridge": 2.0}


@dataclass(frozen=True)
class Need:
    """Bytes that are needed in a folder.

    Attributes:
        move: how to have them elsewhere, as half a sentence.
    """

    folder: Path
    bytes: int
    move: str


@dataclass(frozen=True)
class Packages:
    """The bytes that the packages of an environment and of its builds take.

    Attributes:
        download_bytes: still to download.
        cached_bytes: what the caches still grow by.
        unpacked_bytes: all of them in an environment, where it can't share files with the cache.
    """

    download_bytes: int
    cached_bytes: int
    unpacked_bytes: int


def packages(variant: Variant, parts: bridge_parts.Parts | None, workspace: Workspace) -> Packages:
    """The bytes of a variant's packages: the bridge's parts, else all of pixi.lock's, most of which builds need too."""
    factor = _UNPACKED[variant.source]
    if parts is not None:
        _, download, cached = assemble.bytes_needed(parts, workspace)
        return Packages(download, cached, round(factor * sum(a.size for a in parts.artifacts)))
    records = lock.environment(workspace.lock, variant.name).records
    cache = workspace.package_cache
    stems = {r: f"{r.name.normalized}-{r.version}-{r.build}" for r in records}
    download = sum(r.size or 0 for r, stem in stems.items() if not (cache / stem).is_dir())
    return Packages(download, round(factor * download), round(factor * sum(r.size or 0 for r in records)))


def needs(taken: Packages, prefix: Path, builds: int, archs: int, workspace: Workspace) -> tuple[Need, ...]:
    """The bytes that an installation needs, folder by folder.

    Args:
        taken: by the packages.
        prefix: where they are installed.
        builds: how many packages are built.
        archs: for how many capabilities.
    """
    cache, engine = workspace.cache, workspace.package_cache
    elsewhere = "choose another --prefix"
    wanted = [
        Need(engine, taken.cached_bytes, workspace.moves_package_cache),
        Need(prefix, _PER_ENVIRONMENT_BYTES, elsewhere),
    ]
    # Environments share files with the cache by hard link, which no file system allows across its border.
    if device(prefix) != device(engine):
        wanted.append(Need(prefix, taken.unpacked_bytes, elsewhere))
    if builds:
        move = "set SSM_FORGE_CACHE_DIR to a folder on a larger disk"
        wanted.append(Need(cache, builds * _PER_BUILD_BYTES * max(1, archs), move))
        if device(cache) != device(engine):
            wanted.append(Need(cache, taken.unpacked_bytes, move))
    return tuple(wanted)


def check(wanted: Sequence[Need]) -> None:
    """Refuse what does not fit on the disks that it goes to; needs of one disk are added up.

    Raises:
        MachineError: when a disk has less than is needed of it; names the folders there, and how to move the largest.
    """
    by_disk: dict[int, list[Need]] = {}
    for need in wanted:
        by_disk.setdefault(device(need.folder), []).append(need)
    for on_disk in by_disk.values():
        total, free = sum(need.bytes for need in on_disk), free_disk(on_disk[0].folder)
        if free < total:
            folders = " and ".join(dict.fromkeys(str(need.folder) for need in on_disk))
            largest = max(on_disk, key=lambda need: need.bytes)
            raise MachineError(
                f"this takes {human_bytes(total)} of disk at {folders}, and {human_bytes(free)} are free.",
                fix=f"Free space, or {largest.move}.",
            )
