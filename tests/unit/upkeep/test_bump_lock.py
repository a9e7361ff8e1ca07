"""A newer release carries the workspace of recipes/ along: its manifest, and its lock with the same compilers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest import source_workspace
from ssm_forge.solve import lock
from ssm_forge.upkeep import bump_lock
from ssm_forge.upkeep.projects import Update

ROOT = Path(__file__).resolve().parents[3]
OLD, NEW = "2.3.2.post1", "2.3.99"


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    for name in ("recipes", "patches"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".pixi", "__pycache__", "bridge"))
    for name in ("pixi.toml", "pixi.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return Workspace(tmp_path, tmp_path / "cache")


def newer(place: Workspace, **also: str) -> Update:
    """The newest mamba-ssm, as the recipe and the matrix say it, moved on; and other words of its recipe."""
    recipe = place.recipes / "mamba-ssm/recipe.yaml"
    text = recipe.read_text().replace(f'"{OLD}"', f'"{NEW}"').replace(f"/{OLD}/", f"/{NEW}/")
    for old, new in also.items():
        assert old in text
        text = text.replace(old, new)
    return Update(("newer",), {recipe: text, place.variants: place.variants.read_text().replace(OLD, NEW)})


def test_the_lock_has_the_new_release_and_the_compilers_of_before(place: Workspace) -> None:
    before = lock.read(place.source_lock)
    update = bump_lock.carried(newer(place), place)
    # Nothing is written before all of it is known.
    assert lock.read(place.source_lock) == before
    assert update.summary == ("newer", "recipes/pixi.toml and pixi.lock go with it, with the same compilers.")
    update.write()
    assert source_workspace.check(place) == ""
    found = lock.check(manifest.load(place.source_manifest), place.source_lock)
    assert {name: problems for name, problems in found.items() if problems} == {}
    for old, new in zip(before, lock.read(place.source_lock), strict=True):
        assert new.records == old.records
        for was, now in zip(old.sources, new.sources, strict=True):
            assert (now.build, now.host, now.depends) == (was.build, was.host, was.depends)
            moved = was.name == "mamba-ssm" and old.name != "cu118"
            assert (now.variants != was.variants) is moved
            assert (now.identity != was.identity) is moved
            assert (now.variants.get("mamba_ssm") == NEW) is moved


def test_what_does_not_change_is_written_as_it_was(place: Workspace) -> None:
    text = place.source_lock.read_bytes(), place.source_manifest.read_bytes()
    same = {place.variants: place.variants.read_text()}
    bump_lock.carried(Update((), same), place).write()
    assert (place.source_lock.read_bytes(), place.source_manifest.read_bytes()) == text


def test_a_release_that_needs_something_else_is_said_to_need_a_new_lock(place: Workspace) -> None:
    update = bump_lock.carried(newer(place, **{"    - einops\n": "    - einops\n    - nano\n"}), place)
    assert "recipes/pixi.lock does not fit any more (" in update.summary[-1]
    assert "mamba-ssm: its recipe needs 'nano', the lock does not): write it anew with" in update.summary[-1]


def test_what_changes_no_recipe_changes_no_lock() -> None:
    update = Update(("x",), {workspace().patches / "torch/bounds.toml": "x"})
    assert bump_lock.carried(update, workspace()) is update
