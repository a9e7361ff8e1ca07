"""What is installed in an environment: its package records (``conda-meta/NAME-VERSION-BUILD.json``), checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from rattler import PrefixRecord

from ssm_forge.base import foreign
from ssm_forge.base.errors import InstallError


class InstalledPath(NamedTuple):
    """One file, link or folder that a package brought.

    Attributes:
        path: relative to the prefix, and inside of it.
        kind: ``hardlink``, ``softlink`` or ``directory``; empty where the record does not say it.
        sha256: of the file in the package, 64 hex digits; empty where none is recorded.
        sha256_in_prefix: of the file as it was installed, where the prefix was written into it; else empty.
        placeholder: whether the installer writes the prefix into it.
    """

    path: str
    kind: str
    sha256: str
    sha256_in_prefix: str
    placeholder: bool


@dataclass(frozen=True)
class InstalledRecord:
    """What an environment says of one package.

    Not py-rattler's ``PrefixRecord``, which refuses what other installers write and nobody here needs (a null for an
    absent field, a path without its kind, no build number), takes paths that lead out of the environment, and calls
    every damage by another name.

    Attributes:
        filename: of the package file, ``tool-1.0-h1_0.conda``; empty where the record does not say it.
        url, channel: where the package was taken from; empty where the record does not say it.
        sha256, md5: of the package file in hex; empty where the record does not say it.
        files: what the package brought by name, where ``paths`` has not all of it.
    """

    name: str
    version: str
    build: str
    filename: str
    url: str
    channel: str
    sha256: str
    md5: str
    depends: tuple[str, ...]
    files: tuple[str, ...]
    paths: tuple[InstalledPath, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.version} {self.build}"


def records(prefix: Path) -> dict[str, InstalledRecord]:
    """The packages of a prefix by name; empty where there is no environment.

    Raises:
        InstallError: when a record is damaged; names its file.
    """
    by_name = {}
    for path in sorted((prefix / "conda-meta").glob("*.json")):
        try:
            content = foreign.json_from(foreign.read_bytes(path))
            if isinstance(content, dict) and "name" not in content:
                continue
            record = _record(content)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        by_name[record.name] = record
    return by_name


def engine_records(prefix: Path) -> tuple[PrefixRecord, ...]:
    """The same as the engine takes them, to solve with or to pack.

    Raises:
        InstallError: when the engine can't read a record; names its file.
    """
    return tuple(_engine_record(path) for path in sorted((prefix / "conda-meta").glob("*.json")))


def added_by_hand(prefix: Path) -> list[str]:
    """Python packages in the prefix that no conda package brought: what a user installed there with pip.

    Raises:
        InstallError: as :func:`records`.
    """
    brought = {path.path for record in records(prefix).values() for path in record.paths}
    metadata = prefix.glob("lib/python*/site-packages/*.dist-info/METADATA")
    return sorted(
        p.parent.name.removesuffix(".dist-info") for p in metadata if str(p.relative_to(prefix)) not in brought
    )


def _engine_record(path: Path) -> PrefixRecord:
    try:
        return PrefixRecord.from_path(path)
    except Exception as error:  # The engine has an error of its own for each thing that is wrong.
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InstallError:
    return InstallError(f"the package record {path} can't be read ({error}).", fix="Make the environment anew.")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and value != "" and "/" not in value


_RECORD: dict[str, Callable[[object], bool]] = dict.fromkeys(("name", "version", "build"), _is_name)
# What may be absent; null is as good.
_OPTIONAL: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("url", "channel", "license", "subdir"), foreign.is_text),
    "fn": foreign.is_file_name,
    "sha256": foreign.is_hex(64),
    "md5": foreign.is_hex(32),
    **dict.fromkeys(("depends", "constrains"), foreign.is_list_of_text),
    "files": lambda value: isinstance(value, list) and all(map(foreign.is_inside, value)),
    "paths_data": lambda value: isinstance(value, dict) and isinstance(value.get("paths", []), list),
}
_PATH: dict[str, Callable[[object], bool]] = {
    "path_type": foreign.is_text,
    "sha256": foreign.is_hex(64),
    "sha256_in_prefix": foreign.is_hex(64),
}


def _record(content: object) -> InstalledRecord:
    """One record of ``conda-meta``, from its JSON, with the fields that are used checked.

    Raises:
        ValueError: when a field that is used is not what it has to be: an environment may come from anybody, and its
            paths lead into itself.
    """
    foreign.require(content, _RECORD)
    foreign.require(content, _OPTIONAL, all_of_them=False)
    fields = cast("dict[str, Any]", content)
    return InstalledRecord(
        name=fields["name"],
        version=fields["version"],
        build=fields["build"],
        filename=fields.get("fn") or "",
        url=fields.get("url") or "",
        channel=fields.get("channel") or "",
        sha256=fields.get("sha256") or "",
        md5=fields.get("md5") or "",
        depends=tuple(fields.get("depends") or ()),
        files=tuple(fields.get("files") or ()),
        paths=tuple(_path(entry) for entry in (fields.get("paths_data") or {}).get("paths", [])),
    )


def _path(entry: object) -> InstalledPath:
    foreign.require(entry, {"_path": foreign.is_inside})
    foreign.require(entry, _PATH, all_of_them=False)
    fields = cast("dict[str, Any]", entry)
    kind, sha256, in_prefix = (fields.get(key) or "" for key in _PATH)
    return InstalledPath(fields["_path"], kind, sha256, in_prefix, "prefix_placeholder" in fields)
