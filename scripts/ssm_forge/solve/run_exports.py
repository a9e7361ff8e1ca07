"""What a package adds to the needs of everything that is built with it, as its channel publishes it (CEP-12)."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import httpx
from rattler import RepoDataRecord
from rattler.package import RunExportsJson

from ssm_forge.base import mirrors
from ssm_forge.base.credentials import redact
from ssm_forge.base.errors import IntegrityError, NetworkError
from ssm_forge.base.web import session
from ssm_forge.channel import index as repodata

_FILES = ("run_exports.json.zst", "run_exports.json")


@dataclass(frozen=True)
class RunExports:
    """What a package exports: match specs, in the order in which a lock has them.

    Attributes:
        weak: for what it runs with, where the package is linked to.
        strong: for what it is built with, and what it runs with.
        noarch: for what runs with it on every system.
        weak_constrains, strong_constrains: the same, for what may be beside it.
    """

    weak: tuple[str, ...] = ()
    strong: tuple[str, ...] = ()
    noarch: tuple[str, ...] = ()
    weak_constrains: tuple[str, ...] = ()
    strong_constrains: tuple[str, ...] = ()

    def lists(self) -> dict[str, list[str]]:
        """Kind -> match specs, of those kinds that there are."""
        return {kind: list(specs) for kind in KINDS if (specs := getattr(self, kind))}


KINDS = tuple(field.name for field in fields(RunExports))


def of(records: Sequence[RepoDataRecord], snapshot: Path | None) -> dict[str, RunExports]:
    """Package name -> what it exports, in the order of ``records``.

    Args:
        snapshot: folder of recorded channel data; None to ask the channels.

    Raises:
        NetworkError: when a channel can't be asked.
        DamagedIndexError: when what it publishes is not of the format.
    """
    return {record.name.normalized: _of(record, snapshot) for record in records}


def _of(record: RepoDataRecord, snapshot: Path | None) -> RunExports:
    base = record.url.rpartition("/")[0]
    # Indexes that the engine makes have them in their records.
    in_record = json.loads(record.to_json()).get("run_exports")
    if in_record is not None:
        return _read(in_record, base)
    published = _published(base, snapshot).get(record.file_name)
    if published is not None:
        return _read(published.get("run_exports") or {}, base)
    if snapshot is not None and not base.startswith("file:"):
        raise NetworkError(
            f"{snapshot} does not say what {record.file_name} exports.", fix="Record run_exports.json of its channel."
        )
    return _from_package(record.url)


def _read(exported: Mapping[str, Any], address: str) -> RunExports:
    lists = {kind: exported.get(kind) or [] for kind in KINDS}
    if not all(isinstance(v, list) and all(isinstance(text, str) for text in v) for v in lists.values()):
        raise repodata.DamagedIndexError(f"{redact(address)}/{_FILES[1]}", "has exports that are no lists of text")
    return RunExports(**{kind: tuple(specs) for kind, specs in lists.items()})


@functools.lru_cache
def _published(base: str, snapshot: Path | None) -> dict[str, dict[str, Any]]:
    """The exports of one subdir of a channel: file name -> entry; nothing where the channel does not publish them."""
    address = urlparse(base)
    folder = None
    if address.scheme == "file":
        folder = Path(unquote(address.path))
    elif snapshot is not None:
        folder = snapshot / unquote(address.path).strip("/")
    for name in _FILES:
        file_address = str(folder / name) if folder else redact(f"{base}/{name}")
        data = _bytes_in(folder / name) if folder else _bytes_at(f"{base}/{name}")
        if data is not None:
            content = repodata.decompress(data, file_address) if name.endswith(".zst") else data
            return repodata.published_exports(content, file_address)
    return {}


def _bytes_in(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _bytes_at(url: str) -> bytes | None:
    try:
        with session() as client:
            answer = client.get(mirrors.mirrored(url))
    except httpx.HTTPError as error:
        raise NetworkError(f"{redact(url)} could not be read ({error}).", fix="Check the network.") from error
    if answer.status_code == httpx.codes.NOT_FOUND:
        return None
    if answer.status_code >= 400:
        raise NetworkError(f"{redact(url)} could not be read ({answer.status_code}).", fix="Try again later.")
    return answer.content


def _from_package(url: str) -> RunExports:
    """What the package itself says; of one on a server as little is downloaded as its format allows."""
    try:
        exported: RunExportsJson | None
        if url.startswith("file:"):
            exported = RunExportsJson.from_package_archive(Path(unquote(urlparse(url).path)))
        else:
            exported = asyncio.run(RunExportsJson.from_remote_url(mirrors.client(), url))
    except Exception as error:  # The engine has no common base class for its failures.
        # Of a package at hand that has no such file.
        if "component is missing" in str(error):
            return RunExports()
        raise IntegrityError(f"{redact(url)} does not say what it exports ({error}).") from error
    return RunExports(**{kind: tuple(getattr(exported, kind)) for kind in KINDS}) if exported else RunExports()
