"""A workspace of the user's own with the kernels in it: manifest, lock, and the lines for those who have one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conda_channel import index
from ssm_forge.base.errors import SolveError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.manifest import environments as manifest
from ssm_forge.solve import lock, pixi_export, source_packages

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared"


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A checkout that has what a workspace is written from, and both packages of cu130 in its channel."""
    root = tmp_path / "checkout"
    for name in ("recipes", "patches"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".pixi", "__pycache__", "bridge"))
    made = Workspace(root, tmp_path / "cache")
    fill(made)
    return made


def fill(place: Workspace) -> None:
    """Put packages into the channel that are called and need what the locked recipes make."""
    from rattler_build import assemble_package

    (place.root / "empty").mkdir()
    for source in lock.environment(place.source_lock, "cu130").sources:
        _, version, build = (
            source_packages.rendered(source, place.source_lock).filename.removesuffix(".conda").rsplit("-", 2)
        )
        assemble_package(
            name=source.name,
            version=version,
            target_platform="linux-64",
            build_string=build,
            output_dir=str(place.channel / "linux-64"),
            files_dir=str(place.root / "empty"),
            depends=list(dict.fromkeys(source.depends)),
        )
    index(place.channel)


def written(folder: Path) -> tuple[manifest.Manifest, lock.LockedEnvironment]:
    """What was written, which agrees with itself."""
    found = manifest.load(folder / "pixi.toml")
    assert [str(p) for problems in lock.check(found, folder / "pixi.lock").values() for p in problems] == []
    return found, lock.environment(folder / "pixi.lock", "default")


def test_with_packages_it_needs_no_preview_and_is_locked_whole(place: Workspace, tmp_path: Path) -> None:
    made = pixi_export.write(tmp_path / "mine", "cu130", "channel", place)
    text = made.manifest.read_text()
    assert "preview" not in text
    assert "build-variants" not in text
    _, locked = written(tmp_path / "mine")
    urls = {r.name.normalized: r.url for r in locked.records}
    assert urls["mamba-ssm"].startswith(f"{place.channel.as_uri()}/linux-64/mamba-ssm-")
    assert not locked.sources
    assert any(line.startswith("mamba-ssm = { version = ") for line in made.lines)


def test_the_packages_may_be_where_others_have_them(place: Workspace, tmp_path: Path) -> None:
    made = pixi_export.write(tmp_path / "mine", "cu130", "channel", place, channel="https://example.org/lab")
    assert 'channels = ["https://example.org/lab", "conda-forge"]' in made.manifest.read_text()
    _, locked = written(tmp_path / "mine")
    assert locked.channels[0] == "https://example.org/lab/"
    assert place.root.as_posix() not in (tmp_path / "mine/pixi.lock").read_text()


def test_from_recipes_the_lock_pins_the_compilers_too(place: Workspace, tmp_path: Path) -> None:
    made = pixi_export.write(tmp_path / "mine", "cu130", "path", place)
    assert made.lines[1] == 'mamba-ssm = { path = "../checkout/recipes/mamba-ssm" }'
    found, locked = written(tmp_path / "mine")
    assert found.environments[0].sources[1].path == "../checkout/recipes/mamba-ssm"
    theirs = lock.environment(place.source_lock, "cu130").sources[1]
    mine = locked.sources[1]
    assert [r.url for r in mine.build] == [r.url for r in theirs.build]
    assert mine.identity != theirs.identity


def test_from_git_pixi_locks_it_to_a_commit(place: Workspace, tmp_path: Path) -> None:
    made = pixi_export.write(tmp_path / "mine", "cu118", "git", place, git="https://example.org/ssm-forge.git")
    assert not made.locked
    data = manifest.read_toml(made.manifest)
    assert data["dependencies"]["mamba-ssm"] == {
        "git": "https://example.org/ssm-forge.git",
        "subdirectory": "recipes/mamba-ssm",
    }
    assert data["workspace"]["preview"] == ["pixi-build"]
    assert data["workspace"]["channels"] == ["nvidia/label/cuda-11.8.0", "pytorch", "conda-forge"]
    (variants,) = data["workspace"]["target"].values()
    assert variants["build-variants"]["cuda_compiler_version"] == ["11.8"]


def test_where_the_checkout_was_cloned_from_is_where_others_clone_from(place: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing is known to have") as caught:
        pixi_export.write(tmp_path / "mine", "cu130", "git", place)
    assert "--git URL" in caught.value.fix
    for words in (["init", "-q"], ["remote", "add", "origin", "https://example.org/x.git"]):
        subprocess.run(["git", "-C", str(place.root), *words], check=True)
    made = pixi_export.write(tmp_path / "mine", "cu130", "git", place)
    assert "https://example.org/x.git" in made.manifest.read_text()


def test_an_own_manifest_is_never_replaced(place: Workspace, tmp_path: Path) -> None:
    (tmp_path / "pixi.toml").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        pixi_export.write(tmp_path, "cu130", "path", place)
    assert (tmp_path / "pixi.toml").read_text() == "mine"


def test_without_the_packages_nothing_is_written(place: Workspace, tmp_path: Path) -> None:
    shutil.rmtree(place.channel)
    with pytest.raises(SolveError, match="does not hold it"):
        pixi_export.write(tmp_path / "mine", "cu130", "channel", place)
    assert not (tmp_path / "mine").exists()


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="needs the recorded pixi schema beside the checkout")
@pytest.mark.parametrize("origin", ["channel", "path", "git"])
def test_the_manifest_is_valid_for_pixi(place: Workspace, tmp_path: Path, origin: pixi_export.Origin) -> None:
    import jsonschema

    made = pixi_export.write(tmp_path / "mine", "cu130", origin, place, git="https://example.org/x.git")
    schema = json.loads((SHARED / "schemas/pixi-manifest.schema.json").read_text())
    jsonschema.validate(manifest.read_toml(made.manifest), schema)
