"""What a Python package index has: releases and their files (PEP 691), for the refresh command only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import httpx
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

from ssm_forge.base import foreign, web
from ssm_forge.base.errors import NetworkError
from ssm_forge.base.fetch import Artifact, mirrored
from ssm_forge.base.paths import Workspace

_ACCEPT = "application/vnd.pypi.simple.v1+json"
_FILE: dict[str, Callable[[object], bool]] = {
    "filename": foreign.is_file_name,  # It becomes one, in the cache.
    "url": foreign.is_text,
    "hashes": lambda value: isinstance(value, dict),
}


@dataclass(frozen=True)
class Release:
    """One file of a release.

    Attributes:
        version: of the project.
        artifact: the file, pinned.
        is_sdist: a source archive, else a wheel.
    """

    version: Version
    artifact: Artifact
    is_sdist: bool


def index_url(workspace: Workspace) -> str:
    """The index that ``recipes/bridge/sources.toml`` names."""
    return str(foreign.toml_from((workspace.bridge_locks / "sources.toml").read_bytes())["python_index"])


def releases(project: str, workspace: Workspace) -> list[Release]:
    """All files of final releases that were not withdrawn, oldest release first.

    Raises:
        NetworkError: when the index does not answer.
    """
    url = f"{index_url(workspace)}/{project}/"
    try:
        answer = web.get(mirrored(url), headers={"Accept": _ACCEPT})
        answer.raise_for_status()
        files = [release for file in _files(answer.content) if (release := _release(file, url)) is not None]
    except (httpx.HTTPError, ValueError) as error:
        raise NetworkError(
            f"the releases of {project} could not be read ({type(error).__name__}: {error}).",
            fix="Check the network (SSM_FORGE_MIRRORS=FROM=TO sets a mirror) and run the same command again.",
        ) from error
    return sorted(files, key=lambda release: (release.version, release.artifact.name))


def _files(data: bytes) -> list[dict[str, Any]]:
    """What an answer lists.

    Raises:
        ValueError: when it is none of an index.
    """
    content = foreign.json_from(data)
    foreign.require(content, {"files": lambda value: isinstance(value, list)})
    for file in content["files"]:
        foreign.require(file, _FILE)
        foreign.require(file, {"size": foreign.is_number}, all_of_them=False)
    files: list[dict[str, Any]] = content["files"]
    return files


def _release(file: dict[str, Any], page: str) -> Release | None:
    """One file, where it is of a final release that counts; ``page`` is where relative addresses start."""
    name = file["filename"]
    try:
        is_sdist = name.endswith(".tar.gz")
        version = parse_sdist_filename(name)[1] if is_sdist else parse_wheel_filename(name)[1]
    except (InvalidSdistFilename, InvalidWheelFilename):
        return None
    sha256 = file["hashes"].get("sha256")
    if file.get("yanked") or version.is_prerelease or version.is_devrelease:
        return None
    if not foreign.is_hex(64)(sha256):
        raise ValueError(f"{name} has the sha256 {sha256!r:.80}")
    return Release(version, Artifact(urljoin(page, file["url"]), sha256, file.get("size") or 0, name), is_sdist)
