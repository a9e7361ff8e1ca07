"""The one reader of a channel's index, in all its forms.

Goes in: the bytes of ``repodata.json``, ``repodata_shards.msgpack.zst``, a shard or ``run_exports.json``, and their
address (a path or URL, for messages). Comes out: records whose names and fields have the types that the rest of this
project counts on, or :class:`DamagedIndexError`. Nothing here opens a file or a connection.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.foreign import (
    MOST_BYTES,
    from_zstd,
    is_file_name,
    is_hex,
    is_list_of_text,
    is_number,
    is_text,
    json_from,
)
from ssm_forge.base.paths import launcher


@dataclass(frozen=True)
class IndexRecord:
    """What a channel's index says of one package file; None for what it does not say.

    Not py-rattler's ``RepoDataRecord``, which drops the hash of the signed statement, and of a damaged index says
    neither the file nor the record.

    Attributes:
        size: bytes of the file.
        timestamp: of the build, milliseconds since 1970.
        sha256, md5: of the file, hex.
        attestations_sha256: of the signed statements beside the file, hex.
        run_exports: as in the package's own run_exports.json.
    """

    name: str
    version: str
    build: str
    build_number: int | None = None
    subdir: str | None = None
    depends: tuple[str, ...] | None = None
    constrains: tuple[str, ...] | None = None
    size: int | None = None
    timestamp: int | None = None
    sha256: str | None = None
    md5: str | None = None
    attestations_sha256: str | None = None
    run_exports: Mapping[str, Any] | None = field(default=None, hash=False)


Records = dict[str, IndexRecord]

# What ranking packages by age, or telling what they are, needs of each record.
COMPLETE = ("name", "version", "build", "build_number")

_PARTS = ("packages", "packages.conda")
_FIELDS_KEPT_AS_READ = (
    *("build_number", "subdir", "size", "timestamp", "sha256", "md5", "attestations_sha256", "run_exports"),
)
# serde's words for a position: how the engine's errors about a damaged index end.
_POSITION = re.compile(r"at line \d+ column \d+")


class DamagedIndexError(IntegrityError):
    """An index that is not what its format says.

    Attributes:
        reason: what is wrong with the file, without its name.
    """

    def __init__(self, address: str, reason: str) -> None:
        fix = "Tell whoever runs the channel."
        if "://" not in address:
            channel = shlex.quote(str(PurePosixPath(address).parent.parent))
            fix = f"'{launcher()} channel check --repair {channel}' makes the index anew from the packages."
        super().__init__(f"{address} {reason}.", fix=fix)
        self.reason = reason


def _is_word(value: object) -> bool:
    """A part of a file's name, which is shown to people too."""
    return isinstance(value, str) and value.isprintable() and "/" not in value


# The fields that we use; a field that is absent or null is no damage.
_FIELDS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("name", "version", "build", "subdir"), _is_word),
    "license": is_text,
    **dict.fromkeys(("build_number", "size", "timestamp"), is_number),
    **dict.fromkeys(("depends", "constrains"), is_list_of_text),
    **dict.fromkeys(("sha256", "attestations_sha256"), is_hex(64)),
    "md5": is_hex(32),
    "run_exports": lambda value: isinstance(value, dict),
}


def document(data: bytes, address: str) -> dict[str, Any]:
    """A whole ``repodata.json`` or ``run_exports.json``, every record checked.

    Raises:
        DamagedIndexError: when it is not one.
    """
    try:
        content = json_from(data)
    except ValueError as error:
        raise DamagedIndexError(address, f"is not JSON ({error})") from error
    return _checked(content, address)


def records(data: bytes, address: str, needed: Sequence[str] = ()) -> Records:
    """What an index lists: file name -> record.

    Args:
        needed: fields that every record must have.

    Raises:
        DamagedIndexError: when it is no index.
    """
    entries = _entries(document(data, address))
    for name, entry in entries.items():
        for key in needed:
            if entry.get(key) is None:
                raise DamagedIndexError(address, f"lists {name} without its {key}")
    return {name: _record(entry) for name, entry in entries.items()}


def listed_in(index: Mapping[str, Any]) -> Records:
    """What a checked :func:`document` lists: file name -> record."""
    return {name: _record(entry) for name, entry in _entries(index).items()}


def _entries(index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {**index.get("packages", {}), **index.get("packages.conda", {})}


def _record(entry: Mapping[str, Any]) -> IndexRecord:
    """A checked entry as a record."""
    depends, constrains = (entry.get(key) for key in ("depends", "constrains"))
    return IndexRecord(
        name=entry.get("name") or "",
        version=entry.get("version") or "",
        build=entry.get("build") or "",
        depends=None if depends is None else tuple(depends),
        constrains=None if constrains is None else tuple(constrains),
        **{key: entry.get(key) for key in _FIELDS_KEPT_AS_READ},
    )


def shard_digests(data: bytes, address: str) -> dict[str, str]:
    """A ``repodata_shards.msgpack.zst``: package name -> sha256 of its shard.

    Raises:
        DamagedIndexError: when it is not one.
    """
    content = _unpacked(data, address)
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        raise DamagedIndexError(address, "has no table of shards")
    for name, digest in shards.items():
        if not isinstance(name, str) or not isinstance(digest, bytes) or len(digest) != 32:
            raise DamagedIndexError(address, f"has no sha256 for the shard of {name!r}")
    return {name: digest.hex() for name, digest in shards.items()}


def shard(data: bytes, address: str) -> Records:
    """The records of one shard, where hashes are bytes instead of text.

    Raises:
        DamagedIndexError: when it is no shard.
    """

    content = _unpacked(data, address)
    for part in _PARTS:
        listed = content.get(part) if isinstance(content, dict) else None
        for record in listed.values() if isinstance(listed, dict) else ():
            if isinstance(record, dict):
                record.update({key: value.hex() for key, value in record.items() if isinstance(value, bytes)})
    return listed_in(_checked(content, address))


def decompress(data: bytes, address: str) -> bytes:
    """The content of a zstd file, given as bytes.

    Raises:
        DamagedIndexError: when it is none, an empty one, or larger than any index is.
    """
    try:
        content = from_zstd(data, MOST_BYTES)
    except ValueError as error:
        raise DamagedIndexError(address, f"is no zstd file ({error})") from error
    if not content:
        raise DamagedIndexError(address, "is empty")
    return content


def run_exports(repodata: Mapping[str, Any]) -> bytes:
    """The bytes of run_exports.json (CEP-12), from a repodata.json, where the engine keeps them in the records."""
    info = {"subdir": repodata.get("info", {}).get("subdir"), "version": 1}
    parts = {part: exports_of(listed_in({part: repodata.get(part, {})})) for part in _PARTS}
    return json.dumps({"info": info, **parts}, sort_keys=True).encode()


def exports_of(listed: Records) -> dict[str, dict[str, Any]]:
    """What run_exports.json says of these packages: file name -> entry."""
    return {name: {"run_exports": record.run_exports or {}} for name, record in listed.items()}


def published_exports(data: bytes, address: str) -> dict[str, dict[str, Any]]:
    """What a ``run_exports.json`` says: file name -> its entry.

    Raises:
        DamagedIndexError: when it is not one.
    """
    return _entries(document(data, address))


def damage_in(message: str) -> str:
    """The engine's words for a damaged index, when an error's text holds them; else empty."""
    return next((line.removeprefix("Caused by: ") for line in message.splitlines() if _POSITION.search(line)), "")


def _unpacked(data: bytes, address: str) -> Any:
    import msgpack

    content = decompress(data, address)
    try:
        return msgpack.unpackb(content)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise DamagedIndexError(address, f"is not msgpack ({error})") from error


def _checked(content: object, address: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise DamagedIndexError(address, f"holds a {type(content).__name__}, not an object")
    if not isinstance(content.get("info", {}), dict):
        raise DamagedIndexError(address, "has an 'info' that is no object")
    for part in _PARTS:
        listed = content.get(part, {})
        if not isinstance(listed, dict):
            raise DamagedIndexError(address, f"has '{part}' that is no object")
        for name, record in listed.items():
            _check_record(name, record, address)
    return content


def _check_record(name: object, record: object, address: str) -> None:
    # Names become paths: whoever wrote the index must not choose a folder with them.
    if not is_file_name(name) or not str(name).endswith((".conda", ".tar.bz2")):
        raise DamagedIndexError(address, f"lists {name!r}, which is no name of a package")
    if not isinstance(record, dict):
        raise DamagedIndexError(address, f"lists {name} with a {type(record).__name__} instead of a record")
    for key, fits in _FIELDS.items():
        value = record.get(key)
        if value is not None and not fits(value):
            raise DamagedIndexError(address, f"lists {name} with {key} {value!r:.80}")
