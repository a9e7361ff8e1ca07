"""A lock whose kernels are recipes, used by tools that install and do not build: they take the channel's packages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conda_channel import index, make_package
from ssm_forge.base.errors import SolveError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.build import provenance as materials
from ssm_forge.install import from_lock, integrity, marker, pack
from ssm_forge.manifest import recipe
from ssm_forge.manifest.environments import Platform
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.package import read as inspection
from ssm_forge.solve import export, source_packages
from ssm_forge.solve import lock as locks
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.lock_sources import SourcePackage
from ssm_forge.solve.solver import Request, solve

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A checkout with one recipe, whose package is in the channel."""
    folder = tmp_path / "recipes/mamba-ssm"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        "schema_version: 1\npackage: {name: mamba-ssm, version: '1.0'}\nbuild: {string: h1_0, number: 0}\n"
    )
    made = Workspace(tmp_path, tmp_path / "cache")
    make_package(made.channel, "mamba-ssm", {"share/kernels.txt": "kernels\n"}, depends=("base",))
    index(made.channel)
    return made


@pytest.fixture
def locked(place: Workspace, tmp_path: Path) -> LockedEnvironment:
    """Written to and read from the lock beside the recipe; a compiler builds it, and is not installed with it."""
    others = tmp_path / "others"
    make_package(others, "base", {"share/base.txt": "base\n"})
    make_package(others, "compiler", {"bin/cc": "#!/bin/sh\n"})
    index(others)
    base, compiler = solve(Request(specs=("base", "compiler"), channels=(others.as_uri(),)))
    source = SourcePackage("mamba-ssm", "0123abcd", "mamba-ssm", depends=("base",), build=(compiler,), host=(base,))
    platform = Platform("linux-64", "linux-64", virtual_packages())
    written = LockedEnvironment("cu130", (f"{others.as_uri()}/",), platform, (base,), (source,))
    locks.write_locked((written,), place.source_lock)
    return locks.environment(place.source_lock, "cu130")


def test_conda_lock_and_explicit_name_the_finished_package_where_others_have_it(
    locked: LockedEnvironment, place: Workspace
) -> None:
    here = source_packages.finished(locked, place.source_lock, place)
    name = "linux-64/mamba-ssm-1.0-h1_0.conda#sha256:"
    assert f"{place.channel.as_uri()}/{name}" in export.explicit(here)
    there = source_packages.finished(locked, place.source_lock, place, published="https://example.org/lab")
    assert f"https://example.org/lab/{name}" in export.explicit(there)
    assert "https://example.org/lab/linux-64/mamba-ssm-1.0-h1_0.conda" in export.conda_lock(there)
    assert "compiler" not in export.explicit(here) + export.conda_lock(here)


def test_the_bill_of_materials_has_the_compiler_as_not_installed(locked: LockedEnvironment, place: Workspace) -> None:
    pytest.importorskip("cyclonedx", reason="cyclonedx is not in this environment; the tools of ./run have it")
    bill = json.loads(export.cyclonedx(source_packages.finished(locked, place.source_lock, place)))
    components = {component["name"]: component for component in bill["components"]}
    assert components["compiler"]["scope"] == "excluded"
    assert "scope" not in components["base"]
    built_with = {entry["value"] for entry in components["mamba-ssm"]["properties"]}
    assert built_with == {components[name]["purl"] for name in ("compiler", "base")}


def test_an_environment_is_made_verified_and_packed_with_it(
    locked: LockedEnvironment, place: Workspace, tmp_path: Path
) -> None:
    finished = source_packages.finished(locked, place.source_lock, place)
    report = from_lock.create(finished, tmp_path / "env", mirrors=(), workspace=place)
    assert report.packages == 2
    assert (tmp_path / "env/share/kernels.txt").exists()
    assert not (tmp_path / "env/bin/cc").exists()
    (tmp_path / "env/share/kernels.txt").unlink()
    assert [d.kind for d in integrity.verify(tmp_path / "env", finished.records).deviations] == ["missing file"]
    made = pack.pack(finished, tmp_path / "pack.tar", mirrors=(), workspace=place)
    assert made.kernels == ("mamba-ssm-1.0-h1_0.conda",)
    target, _ = pack.unpack(tmp_path / "pack.tar", tmp_path / "unpacked", workspace=place)
    assert (target / "share/kernels.txt").exists()
    assert not marker.is_foreign(target / "nowhere")


def test_what_the_channel_lacks_is_named_with_what_builds_it(locked: LockedEnvironment, place: Workspace) -> None:
    shutil.rmtree(place.channel)
    with pytest.raises(SolveError, match=r"mamba-ssm-1\.0-h1_0\.conda") as caught:
        source_packages.finished(locked, place.source_lock, place)
    assert "install-mamba --variant cu130" in caught.value.fix


def test_a_lock_away_from_its_recipes_is_named(locked: LockedEnvironment, place: Workspace, tmp_path: Path) -> None:
    away = tmp_path / "away/pixi.lock"
    away.parent.mkdir()
    shutil.copy(place.source_lock, away)
    with pytest.raises(UsageError, match=r"there is no recipe\.yaml in that folder"):
        source_packages.finished(locks.environment(away, "cu130"), away, place)


def test_a_lock_without_recipes_stays_as_it_is(place: Workspace) -> None:
    plain = locks.environment(ROOT / "pixi.lock", "cu130")
    assert source_packages.finished(plain, ROOT / "pixi.lock", place) is plain


def test_materials_are_the_compilers_that_the_lock_pins() -> None:
    cu118, cu130 = (locks.environment(ROOT / "recipes/pixi.lock", name) for name in ("cu118", "cu130"))
    found = {item["uri"].rpartition("/")[2]: item for item in materials.locked(cu130.sources[1])}
    compiler = next(name for name in found if name.startswith("gxx_linux-64-14"))
    assert len(found[compiler]["sha256"]) == 64
    assert found[compiler]["role"] == materials.SOLVED
    # NVIDIA's channel for 11.8 publishes no sha256.
    nvcc = next(item for item in materials.locked(cu118.sources[0]) if "cuda-nvcc-11.8" in item["uri"])
    assert inspection.material_digest(nvcc)[0] == "md5"
    assert len(inspection.material_digest(nvcc)[1]) == 32


@pytest.mark.parametrize("name", ["cu118", "cu129", "cu130"])
def test_every_locked_recipe_tells_the_file_name_of_its_package(name: str) -> None:
    path = ROOT / "recipes/pixi.lock"
    for source in locks.environment(path, name).sources:
        filename = source_packages.rendered(source, path).filename
        assert filename.startswith(f"{source.name}-")
        assert f"-cuda{source.variants['cuda_compiler_version'].replace('.', '')}_py" in filename
        assert source.name in recipe.PROJECTS
