"""Upstream's sources of a release, with the patches that its recipe lists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ssm_forge.base.arch import ArchList
from ssm_forge.base.paths import workspace
from ssm_forge.manifest import recipe, sdists, variants
from ssm_forge.manifest.patching import patched
from ssm_forge.manifest.recipe import PROJECTS

RELEASES = [(project, release) for project in PROJECTS for release in recipe.releases(project, workspace())]


def unpacked(project: str, release: str, folder: Path) -> Path:
    """The sdist's top folder, in ``folder``."""
    return sdists.unpack(sdists.find(project, release, workspace()), folder, workspace())


def listed_patches(project: str, release: str) -> list[Path]:
    """As the recipe has them, rendered for a row with that release."""
    place = workspace()
    row = variants.load(place.variants).variants[0]
    row = replace(row, row={**row.row, project.replace("-", "_"): release})
    rendered = recipe.render(project, row.key(row.pythons[-1], ArchList.parse(row.default_archs)), place)
    (source,) = recipe.sources(rendered)
    return [(recipe.recipe_dir(project, place) / path).resolve() for path in source["patches"]]


def fits(patch: Path, tree: Path) -> bool:
    """Whether a patch fits the tree whole; then it is applied."""
    changed, hunks = patched([patch], tree)
    if any(hunk.found is None for hunk in hunks):
        return False
    for name, text in changed.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    return True
