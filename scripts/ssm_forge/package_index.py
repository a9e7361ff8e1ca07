"""What a Python package index has: releases and their files (PEP 691), for the refresh command only."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import httpx
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

from ssm_forge import web
from ssm_forge.errors import NetworkError
from ssm_forge.fetch import Artifact, mirrored
from ssm_forge.paths import Workspace

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ACCEPT = "application/vnd.pypi.simple.v1+json"


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
    text = (workspace.bridge_locks / "sources.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(text)["python_index"])


def releases(project: str, workspace: Workspace) -> list[Release]:
    """All files of final releases that were not withdrawn, oldest release first.

    Raises:
        NetworkError: when the index does not answer.
    """
    url = f"{index_url(workspace)}/{project}/"
    try:
        answer = web.get(mirrored(url), headers={"Accept": _ACCEPT})
        answer.raise_for_status()
        files = answer.json()["files"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise NetworkError(
            f"the releases of {project} could not be read ({type(error).__name__}: {error}).",
            fix="Check the network (SSM_FORGE_MIRRORS=FROM=TO sets a mirror) and run the same command again.",
        ) from error
    found = []
    for file in files:
        name = file["filename"]
        try:
            is_sdist = name.endswith(".tar.gz")
            version = parse_sdist_filename(name)[1] if is_sdist else parse_wheel_filename(name)[1]
        except (InvalidSdistFilename, InvalidWheelFilename):
            continue
        if file.get("yanked") or version.is_prerelease or version.is_devrelease:
            continue
        artifact = Artifact(file["url"], file["hashes"]["sha256"], int(file.get("size") or 0), name)
        found.append(Release(version, artifact, is_sdist))
    return sorted(found, key=lambda release: (release.version, release.artifact.name))
