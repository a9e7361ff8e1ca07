"""The patches that a recipe lists for a release are those that fit its sdist: all of them, and no other would."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from patched_sources import RELEASES, fits, listed_patches, unpacked

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


@pytest.mark.parametrize(("project", "release"), RELEASES)
def test_the_patches_of_a_release_are_those_that_fit(project: str, release: str, tmp_path: Path) -> None:
    tree = unpacked(project, release, tmp_path)
    listed = listed_patches(project, release)
    assert [patch.name for patch in listed if not fits(patch, tree)] == []
    others = {path for patch in listed for path in patch.parent.glob("*.patch")} - set(listed)
    others = {path for path in others if path.name not in {patch.name for patch in listed}}
    for number, patch in enumerate(sorted(others)):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(tree, copy)
        assert not fits(patch, copy), f"{patch.parent.name}/{patch.name} fits {release} too: list it"
