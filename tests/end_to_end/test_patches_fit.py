"""The patches that a recipe lists for a release are those that fit its sdist: all of them, and no other would."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ssm_forge.base.arch import ArchList
from ssm_forge.base.paths import workspace
from ssm_forge.manifest import recipe, sdists, variants
from ssm_forge.manifest.patching import patched
from ssm_forge.manifest.recipe import PROJECTS

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

RELEASES = [(project, release) for project in PROJECTS for release in recipe.releases(project, workspace())]


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


@pytest.mark.parametrize(("project", "release"), RELEASES)
def test_the_patches_of_a_release_are_those_that_fit(project: str, release: str, tmp_path: Path) -> None:
    tree = sdists.unpack(sdists.find(project, release, workspace()), tmp_path, workspace())
    listed = listed_patches(project, release)
    assert [patch.name for patch in listed if not fits(patch, tree)] == []
    others = {path for patch in listed for path in patch.parent.glob("*.patch")} - set(listed)
    others = {path for path in others if path.name not in {patch.name for patch in listed}}
    for number, patch in enumerate(sorted(others)):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(tree, copy)
        assert not fits(patch, copy), f"{patch.parent.name}/{patch.name} fits {release} too: list it"
