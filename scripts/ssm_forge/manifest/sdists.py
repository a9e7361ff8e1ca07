"""Upstream's source distributions: where the recipes take them from, and unpacking them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import UsageError
from ssm_forge.base.fetch import Artifact, checked, fetch_all
from ssm_forge.base.paths import Workspace
from ssm_forge.base.unpacking import unpack_tar
from ssm_forge.manifest import recipe, variants


def find(project: str, version: str, workspace: Workspace) -> Artifact:
    """Where the recipe takes a release of a project from.

    Raises:
        UsageError: when the recipe has no source of that release.
    """
    versions = recipe.releases(project, workspace)
    if version not in versions:
        raise UsageError(f"no recipe here builds {project} {version}; they build {', '.join(versions)}.")
    # Any row does: where a source is does not depend on what it is built for.
    row = variants.load(workspace.variants).variants[0]
    row = replace(row, row={**row.row, project.replace("-", "_"): version})
    key = row.key(row.pythons[-1], ArchList.parse(row.default_archs))
    (source,) = recipe.sources(recipe.render(project, key, workspace))
    url = str(source["url"])
    return Artifact(url, str(source["sha256"]), 0, url.rpartition("/")[2])


def unpack(artifact: Artifact, folder: Path, workspace: Workspace) -> Path:
    """Fetch an sdist and unpack it into ``folder``; returns its top folder there.

    Raises:
        NetworkError, IntegrityError: from the download.
    """
    fetch_all([artifact], workspace)
    unpack_tar(checked(artifact, workspace), folder)
    return next(path for path in folder.iterdir() if path.is_dir())
