"""Builds by the own engine with what recipes/pixi.lock says, whatever else the channels have by now."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rattler.package_streaming import extract
from rattler_build import ToolConfiguration

from conda_channel import index, make_package
from ssm_forge.base import fetch
from ssm_forge.base.arch import ArchList
from ssm_forge.base.fetch import Artifact
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.build import locked as locked_build
from ssm_forge.build import offline
from ssm_forge.flow import planning
from ssm_forge.manifest import recipe, variants
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.solve import lock
from ssm_forge.solve.lock_sources import SourcePackage
from ssm_forge.solve.solver import Request, solve

ROOT = Path(__file__).resolve().parents[3]

RECIPE = """\
schema_version: 1
package: {name: mamba-ssm, version: "1.0"}
build:
  number: 0
  string: ${{ cxx_compiler }}_h${{ hash }}
  script: {file: ../common/build.sh}
requirements:
  build: [tool, "${{ compiler('cxx') }} 1.*"]
  host: [base]
  run: [base]
tests:
  - script: [cat $PREFIX/share/made.txt]
"""


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    for folder in ("recipes/mamba-ssm", "recipes/common", "patches"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "recipes/compile-costs.txt").touch()
    (tmp_path / "recipes/mamba-ssm/recipe.yaml").write_text(RECIPE)
    script = 'cd "$PREFIX/share"\ncat "$BUILD_PREFIX/share/tool.txt" base.txt >made.txt\n'
    (tmp_path / "recipes/common/build.sh").write_text(script)
    return Workspace(tmp_path, tmp_path / "cache")


def test_it_is_built_with_the_locked_packages_where_newer_ones_are_to_be_had(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions of one package are locked too: one for the compilers, one to link to."""
    channel = tmp_path / "channel"
    for version in ("1.0", "2.0", "3.0"):
        for name in ("tool", "base"):
            files = {f"share/{name}.txt": f"{name} {version}\n"}
            make_package(channel, name, files, version=version, depends=("base",) if name == "tool" else ())
    make_package(channel, "gxx_linux-64", {"bin/x": ""}, version="1.0")
    index(channel)

    def locked(*specs: str) -> tuple[object, ...]:
        return tuple(solve(Request(specs=specs, channels=(channel.as_uri(),))))

    build, host = locked("tool ==1.0", "base ==2.0", "gxx_linux-64"), locked("base ==1.0")
    source = SourcePackage("mamba-ssm", "0123abcd", "mamba-ssm", build=build, host=host)  # type: ignore[arg-type]
    # What the channel itself says is not asked any more.
    for path in channel.rglob("repodata*"):
        path.unlink()
    (tmp_path / "staging").mkdir()
    root, urls = locked_build.prepare(source, (), place, tmp_path / "staging")
    assert all(url.startswith("file://") and str(channel) not in url for url in urls)
    values = {"cxx_compiler": ["gxx"], "build_source": ["conda"]}
    copy = recipe.render_file(root / "recipes/mamba-ssm/recipe.yaml", values)
    assert copy.filename == recipe.render_file(place.recipes / "mamba-ssm/recipe.yaml", values).filename
    monkeypatch.setenv("RATTLER_CACHE_DIR", str(tmp_path / "packages"))
    monkeypatch.chdir(tmp_path)
    result = copy.engine.run_build(
        ToolConfiguration(test_strategy="native"), output_dir=tmp_path / "out", channels=list(urls)
    )
    extract(result.packages[0], tmp_path / "seen")
    assert (tmp_path / "seen/share/made.txt").read_text() == "tool 1.0\nbase 1.0\n"
    assert [str(spec) for spec in recipe.requirements(copy)["run"]] == ["base"]
    assert [path.name for path in (place.recipes / "mamba-ssm").iterdir()] == ["recipe.yaml"]


def cached(archive: Artifact, place: Workspace) -> Artifact:
    """The archive with bytes that are in the download cache."""
    made = replace(archive, sha256=hashlib.sha256(b"bytes").hexdigest())
    path = fetch.cached_path(made, place)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"bytes")
    return made


@pytest.mark.parametrize("project", PROJECTS)
def test_the_copied_recipes_give_the_same_packages_from_the_download_cache(project: str, tmp_path: Path) -> None:
    """What the copy asks for beside, and where it takes its source from, is no part of a build's name."""
    row = variants.load(workspace().variants).get("cu118", "conda")
    values = row.key("3.10", ArchList.parse(row.default_archs))
    source = SourcePackage(project, "0123abcd", project)
    (archive,) = offline.sources(recipe.render(project, values, workspace()))
    place = Workspace(workspace().root, tmp_path)
    root, _ = locked_build.prepare(source, (), place, tmp_path, [cached(archive, place)])
    copy = recipe.render(project, values, Workspace(root, tmp_path))
    assert copy.filename == recipe.render(project, values, workspace()).filename
    wanted = recipe.requirements(copy)
    assert wanted["build"][-1] == "ssm-forge-locked-build"
    assert wanted["host"][-1] == "ssm-forge-locked-host"
    (told,) = recipe.sources(copy)
    assert told["url"].startswith(f"{place.downloads.as_uri()}/")
    assert told["url"].endswith(f"/{archive.name}")
    patches = [root / "recipes" / project / patch for told in recipe.sources(copy) for patch in told["patches"]]
    assert patches
    assert all(path.is_file() for path in patches)


class TestPlan:
    def test_the_kernels_of_the_lock_are_built_as_locked(self) -> None:
        place = workspace()
        for name, python in (("cu118", "3.10"), ("cu129", "3.12"), ("cu130", "3.12")):
            row = variants.load(place.variants).get(name, "conda")
            values = row.key(python, ArchList.parse(row.default_archs))
            found = planning.locked_sources(row, values, place)
            assert list(found) == list(PROJECTS)
            assert found["mamba-ssm"] == lock.environment(place.source_lock, name).sources[1]

    def test_the_compilers_are_the_same_for_other_gpus_and_not_for_other_pythons(self) -> None:
        place = workspace()
        row = variants.load(place.variants).get("cu130", "conda")
        mine = planning.locked_sources(row, row.key("3.12", ArchList.parse("9.0")), place)
        assert mine == planning.locked_sources(row, row.key("3.12", ArchList.parse(row.default_archs)), place)
        assert list(mine) == list(PROJECTS)
        assert planning.locked_sources(row, row.key("3.13", ArchList.parse(row.default_archs)), place) == {}

    def test_a_recipe_that_changed_after_the_lock_is_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("recipes", "patches"):
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".pixi", "bridge"))
        path = tmp_path / "recipes/mamba-ssm/recipe.yaml"
        path.write_text(path.read_text().replace("    - einops\n", "    - einops\n    - nano\n"))
        place = Workspace(tmp_path, tmp_path / "cache")
        row = variants.load(workspace().variants).get("cu130", "conda")
        values = row.key("3.12", ArchList.parse(row.default_archs))
        assert planning.locked_sources(row, values, place) == {}
        said = " ".join(capsys.readouterr().err.split())
        assert "recipes/pixi.lock is out of step (cu130: mamba-ssm: its recipe needs 'nano', the lock does not)" in said
