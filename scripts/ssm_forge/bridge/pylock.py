"""The bridge's lock files: PEP 751 ``pylock.*.toml``, written by uv, read here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from ssm_forge.base import foreign
from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.fetch import Artifact
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.platforms import LINUX_64, Platform

# The oldest glibc the bridge's wheels may need (a machine below it can't run torch's wheels anyway), and the names that
# some had before there was a tag for each; the last is of wheels that tell nothing.
_GLIBCS = [*(f"manylinux_2_{minor}" for minor in range(28, 4, -1)), "manylinux2014", "manylinux2010", "manylinux1"]
_TAGS = [*_GLIBCS, "linux"]


@dataclass(frozen=True)
class LockedWheel:
    """One wheel of a lock.

    Attributes:
        name: normalised project name.
        version: as the project writes it.
        artifact: the file.
    """

    name: str
    version: str
    artifact: Artifact

    @cached_property
    def tags(self) -> frozenset[Tag]:
        """Which Pythons and platforms the wheel is for."""
        return parse_wheel_filename(self.artifact.name)[3]

    @property
    def is_python_free(self) -> bool:
        """Compiled, but for no particular Python: NVIDIA's libraries and tools."""
        return all(tag.abi == "none" and tag.platform != "any" for tag in self.tags)


def lock_path(workspace: Workspace, variant: str, part: str, platform: Platform = LINUX_64) -> Path:
    """``part`` is ``py312`` or ``toolkit``."""
    return workspace.bridge_locks / f"pylock.{variant}{suffix(platform)}-{part}.toml"


def suffix(platform: Platform) -> str:
    """What the name of a lock of the bridge says of its platform: nothing of the one that there was first."""
    return "" if platform == LINUX_64 else f"-{platform.subdir}"


def read(path: Path, python: str, platform: Platform = LINUX_64) -> list[LockedWheel]:
    """The wheels of a lock for one Python minor and platform, in the lock's order.

    Raises:
        UsageError: when there is no such lock, or it is none.
        MachineError: when a package has no wheel for this platform.
    """
    if not path.exists():
        raise UsageError(f"there is no bridge lock {path.name}.", fix=f"Make it with '{launcher()} bump bridge'.")
    ranking = _ranking(python, platform)
    try:
        packages = foreign.toml_from(foreign.read_bytes(path)).get("packages")
        if not isinstance(packages, list):
            raise ValueError("it has no list of packages")
        for package in packages:
            foreign.require(package, _PACKAGE)
            for wheel in package.get("wheels") or ():
                foreign.require(wheel, _WHEEL)
        return [_best(package, ranking, path, platform) for package in packages]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is not a lock of Python packages ({error}).",
            fix=f"Restore it from git, or write it again with '{launcher()} bump bridge'.",
        ) from error


@functools.lru_cache
def _ranking(python: str, platform: Platform) -> dict[Tag, int]:
    """What the wheels of one Python minor can be tagged with, the best first."""
    major, minor = (int(part) for part in python.split("."))
    names = [f"{tag}_{platform.machine}" for tag in _TAGS]
    tags = [
        *cpython_tags((major, minor), platforms=names),
        *compatible_tags((major, minor), f"cp{major}{minor}", platforms=names),
    ]
    return {tag: rank for rank, tag in enumerate(tags)}


def _is_hashes(value: object) -> bool:
    return isinstance(value, dict) and foreign.is_hex(64)(value.get("sha256"))


# Names and digests become paths in the cache.
_PACKAGE: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("name", "version"), foreign.is_file_name),
    "wheels": lambda value: value is None or isinstance(value, list),
}
_WHEEL: dict[str, Callable[[object], bool]] = {
    "url": foreign.is_text,
    "hashes": _is_hashes,
    "name": lambda value: value is None or foreign.is_file_name(value),
    "size": lambda value: value is None or foreign.is_number(value),
}


def _best(package: dict[str, Any], ranking: dict[Tag, int], path: Path, platform: Platform) -> LockedWheel:
    candidates = []
    for wheel in package.get("wheels", []):
        name = wheel.get("name") or unquote(urlsplit(wheel["url"]).path.rsplit("/", 1)[-1])
        if not foreign.is_file_name(name):
            raise ValueError(f"a wheel of {package['name']} is called {name!r:.80}")
        ranks = [ranking[tag] for tag in parse_wheel_filename(name)[3] if tag in ranking]
        if ranks:
            candidates.append((min(ranks), name, wheel))
    if not candidates:
        raise MachineError(f"{path.name} has no wheel of {package['name']} for {platform.subdir}.")
    _, name, wheel = min(candidates, key=lambda c: c[:2])
    artifact = Artifact(url=wheel["url"], sha256=wheel["hashes"]["sha256"], size=int(wheel.get("size", 0)), name=name)
    return LockedWheel(name=package["name"], version=package["version"], artifact=artifact)
