"""What a build and an environment from the locks still need of the network: nothing, where the caches have it all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import httpx
from rattler import RepoDataRecord

from ssm_forge.base import fetch, mirrors
from ssm_forge.base.arch import ArchList
from ssm_forge.base.credentials import redact
from ssm_forge.base.errors import ForgeError, IntegrityError, NetworkError
from ssm_forge.base.fetch import Artifact
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.web import HOW_TO_LOG_IN, session
from ssm_forge.build.request import BuildRequest
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest import recipe
from ssm_forge.manifest.recipe import PROJECTS, Rendered
from ssm_forge.manifest.variants import Variant
from ssm_forge.package.intact import digest
from ssm_forge.solve import lock, solver

_COUNTER, _SHA256 = 8, 32
# More than that is not downloaded only to see what is wrong.
_MOST_BYTES = 200_000_000


def missing(records: Iterable[RepoDataRecord], workspace: Workspace) -> list[RepoDataRecord]:
    """The packages that are neither in a folder of this machine nor, with their bytes, in the package cache."""
    unique = {r.url: r for r in records}.values()
    return [r for r in unique if not r.url.startswith("file:") and not _is_cached(r, workspace.package_cache)]


def _is_cached(record: RepoDataRecord, cache: Path) -> bool:
    stem = f"{record.name.normalized}-{record.version}-{record.build}"
    if not (cache / stem).is_dir():
        return False
    # Beside each package the engine keeps what it was unpacked from: how often it was, and the archive's sha256.
    try:
        unpacked_from = (cache / f"{stem}.lock").read_bytes()[_COUNTER:]
    except OSError:
        return True
    return len(unpacked_from) != _SHA256 or not record.sha256 or unpacked_from == bytes(record.sha256)


def blame(records: Iterable[RepoDataRecord], workspace: Workspace) -> ForgeError | None:
    """Find the locked package that can't be had as it is locked, and why: the engine says neither.

    The smallest is asked for first; of those that are left when much was downloaded only the size is compared.

    Returns:
        The error to raise; None where every package is as it is locked, or there is no network.
    """
    bytes_left = _MOST_BYTES
    for record in sorted(missing(records, workspace), key=lambda r: r.size or 0):
        bytes_left -= record.size or 0
        try:
            with session() as client, client.stream("GET", mirrors.mirrored(record.url)) as answer:
                error = _refusal(record, answer, whole=bytes_left > 0)
        except httpx.HTTPError:
            # Without a network no package is to blame.
            return None
        if error is not None:
            return error
    return None


def _lock_anew() -> str:
    return f"Write the locks anew with '{launcher()} lock'."


def _refusal(record: RepoDataRecord, answer: httpx.Response, *, whole: bool) -> ForgeError | None:
    url = redact(str(answer.url))
    if answer.status_code >= 400:
        message = f"{record.file_name}, which is locked, can't be had: {url} answered {answer.status_code}."
        gone = answer.status_code in (httpx.codes.NOT_FOUND, httpx.codes.GONE)
        return NetworkError(
            message, fix=_lock_anew() if gone else HOW_TO_LOG_IN if answer.status_code in (401, 403) else ""
        )
    locked, size = digest(record), int(answer.headers.get("Content-Length") or 0)
    found, expected = f"{size} bytes", f"{record.size} bytes"
    if not (record.size and size and record.size != size):
        if not whole or not locked.algorithm:
            return None
        state = hashlib.new(locked.algorithm)
        for chunk in answer.iter_raw(1 << 20):
            state.update(chunk)
        found, expected = f"{locked.algorithm} {state.hexdigest()}", " ".join(locked)
    if found == expected:
        return None
    return IntegrityError(
        f"{url} is not the package that is locked: {expected} is locked, {found} was found.",
        fix=f"If the lock was edited, restore it. {_lock_anew()}",
    )


def sources(rendered: Rendered) -> list[Artifact]:
    """The archives that a recipe downloads, each with its sha256."""
    listed = [(str(source["url"]), str(source["sha256"])) for source in recipe.sources(rendered)]
    return [Artifact(url, sha256, 0, url.rpartition("/")[2]) for url, sha256 in listed]


def has_all(variant: Variant, python: str, workspace: Workspace) -> bool:
    """Whether the variant's environment, compilers and sources are in the caches, as the locks have them."""
    try:
        locked = [
            lock.environment(path, variant.name) for path in (workspace.lock, workspace.source_lock) if path.exists()
        ]
        if len(locked) != 2 or manifest.load(workspace.manifest).environment(variant.name).python != python:
            return False
        built_with = [r for source in locked[1].sources for r in (*source.build, *source.host)]
        archives = [artifact for name in PROJECTS for artifact in _archives(name, variant, python, workspace)]
    except ForgeError:
        # Whoever uses the lock says what is wrong with it.
        return False
    return not missing([*locked[0].records, *built_with], workspace) and not fetch.missing(archives, workspace)


def _archives(name: str, variant: Variant, python: str, workspace: Workspace) -> list[Artifact]:
    key = variant.key(python, ArchList.parse(variant.default_archs))
    return sources(recipe.render(name, key, workspace))


def lacking(requests: Sequence[BuildRequest], workspace: Workspace) -> list[str]:
    """The names of the files that builds with locked packages, and their environment, still need of the network."""
    records = [r for request in requests for r in (*request.built_with, *request.beside)]
    archives = fetch.missing([a for request in requests for a in sources(request.rendered)], workspace)
    return sorted([*(r.file_name for r in missing(records, workspace)), *(a.name for a in archives)])


def require_reachable(channels: Sequence[str], lacks: Sequence[str]) -> None:
    """Ask whether the channels that are needed answer.

    Args:
        channels: their URLs.
        lacks: the names of the locked files that are not in the caches, at least one.

    Raises:
        NetworkError: when one of the channels can't be reached; says what of the locks is not in the caches.
    """
    try:
        solver.require_reachable(channels)
    except NetworkError as error:
        more = f" (and {len(lacks) - 1} more)" if len(lacks) > 1 else ""
        raise NetworkError(f"{error.what} The caches lack {lacks[0]}{more}, which is locked.", fix=error.fix) from error


def keep_sources(rendered: Sequence[Rendered], folder: Path, workspace: Workspace) -> None:
    """Keep what pixi downloaded to build with, which it does in each checkout anew, in the download cache.

    Args:
        rendered: the recipes that were built.
        folder: where pixi builds.
    """
    for artifact in fetch.missing([a for package in rendered for a in sources(package)], workspace):
        for path in folder.glob(f"*/*/output/src_cache/*_{artifact.name}"):
            if path.is_file() and sha256_of(path) == artifact.sha256:
                fetch.adopt(artifact, path, workspace)
                break
