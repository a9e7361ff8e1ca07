"""What ssm-forge put into an environment: a marker in it, beside the records of its packages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from ssm_forge.base import foreign
from ssm_forge.base.errors import InstallError

# Not .json: conda and pixi take every such file here for the record of a package, and refuse the environment.
MARKER = Path("conda-meta/ssm-forge")


# Written first and removed last where a prefix has to be made in its final place.
UNFINISHED = Path("conda-meta/ssm-forge-unfinished")


@dataclass(frozen=True)
class Installed:
    """What ssm-forge put into a prefix.

    Attributes:
        variant: ``cu130``.
        python: ``3.12``.
        source: ``conda`` or ``bridge``.
        packages: file names of the built packages.
        created: whether the prefix was made by ssm-forge, or existed before.
    """

    variant: str
    python: str
    source: str
    packages: tuple[str, ...]
    created: bool


def read_marker(prefix: Path) -> Installed | None:
    """What the marker in ``prefix`` says; None where there is none, or none that can be used."""
    try:
        return installed_from(foreign.json_from(foreign.read_bytes(prefix / MARKER)))
    except (OSError, ValueError):
        return None


def installed_from(content: object) -> Installed:
    """Check the content of a marker, or of the same table in a pack, and return it typed.

    An environment or an archive may come from anybody.

    Raises:
        ValueError: when the content says anything else than :class:`Installed` does.
    """
    foreign.require(content, _INSTALLED)
    fields = cast("dict[str, Any]", content)
    if set(fields) != set(_INSTALLED):
        raise ValueError(f"it says {sorted(set(fields) - set(_INSTALLED))} too")
    return Installed(**{**fields, "packages": tuple(fields["packages"])})


def _are_file_names(value: object) -> bool:
    return isinstance(value, list) and all(map(foreign.is_file_name, value))


_INSTALLED: dict[str, Callable[[object], bool]] = {
    # They become parts of paths: of a variant's lock, of lib/pythonX.Y.
    "variant": lambda value: value == "" or foreign.is_file_name(value),
    "python": lambda value: isinstance(value, str) and re.fullmatch(r"(3\.[0-9]{1,2})?", value) is not None,
    "source": lambda value: isinstance(value, str) and value.isprintable(),
    "packages": _are_file_names,
    "created": lambda value: isinstance(value, bool),
}


def write_marker(prefix: Path, installed: Installed) -> None:
    """Write into ``prefix`` what ssm-forge put there; the marker appears whole or not at all."""
    partial = prefix / f"{MARKER}.part"
    partial.write_text(json.dumps(asdict(installed), indent=2) + "\n", encoding="utf-8")
    partial.replace(prefix / MARKER)


def is_foreign(prefix: Path) -> bool:
    """Whether the prefix existed before ssm-forge put anything there."""
    if not (prefix / "conda-meta").is_dir() or (prefix / UNFINISHED).exists():
        return False
    marker = read_marker(prefix)
    return marker is None or not marker.created


def check_target(prefix: Path) -> None:
    """Refuse a prefix that an environment can't be made in, or added to.

    Raises:
        InstallError: when ``prefix`` is a file, or a folder with something in it that is no environment.
    """
    if not prefix.exists() or (prefix / "conda-meta").is_dir():
        return
    if not prefix.is_dir() or any(prefix.iterdir()):
        raise InstallError(
            f"{prefix} exists and is not a conda environment (it has no conda-meta folder).",
            fix="Name an empty or new folder, or an existing environment, with --prefix.",
        )
