"""What a package says it was made from, and its bill of materials."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rattler.package_streaming import extract
from rattler_build import RenderConfig, Stage0Recipe, VariantConfig

from conda_channel import demo_channel
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import BuildError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import workspace
from ssm_forge.bridge.compiler import HostCompiler
from ssm_forge.bridge.gcc import BundledCompiler
from ssm_forge.build import origin
from ssm_forge.build import provenance as materials
from ssm_forge.manifest import variants
from ssm_forge.manifest.recipe import render
from ssm_forge.package import read as inspection

INDEX = {
    "name": "mamba-ssm",
    "version": "1.0",
    "build": "cuda130_py312_sm90_h1234567_0",
    "subdir": "linux-64",
    "depends": ["pytorch 2.11.*", "__glibc >=2.28,<3.0.a0", "causal-conv1d ==1.7.0"],
}


@pytest.fixture(scope="module")
def found() -> list[inspection.Material]:
    variant = variants.load(workspace().variants).get("cu130", "bridge")
    key = variant.key("3.12", ArchList.parse("9.0"))
    return materials.collect(render("mamba-ssm", key, workspace()), key, workspace())


def test_sources_patches_and_locks_are_named_with_their_hashes(found: list[inspection.Material]) -> None:
    roles = {item["role"] for item in found}
    assert roles == {"source", "patch", "toolchain lock"}
    assert all(len(item["sha256"]) == 64 for item in found)
    for item in found:
        if item["role"] != "source":
            assert item["sha256"] == sha256_of(workspace().root / item["uri"])
    assert any(item["uri"].endswith("pylock.cu130-py312.toml") for item in found)


def test_the_bill_of_materials_is_valid_and_the_same_every_time(found: list[inspection.Material]) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    first, second = (json.dumps(materials.sbom(INDEX, found), sort_keys=True) for _ in range(2))
    assert first == second
    try:
        problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(first)
    except Exception as error:
        pytest.skip(f"not run: the validator lacks a part ({error})")
    assert problem is None
    names = {item["name"] for item in json.loads(first)["components"]}
    assert {"pytorch", "causal-conv1d"} <= names
    assert not any(name.startswith("__") for name in names)


def test_a_build_from_channels_names_what_was_solved_and_no_lock(tmp_path: Path) -> None:
    """The engine is really asked: it says in the package that it makes which packages it took."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "package: {name: x, version: '1'}\n"
        "build: {script: ['mkdir -p $PREFIX/share', 'echo a > $PREFIX/share/x']}\n"
        "requirements: {build: [tool], host: [base]}\n"
    )
    channel = demo_channel(tmp_path)
    (rendered,) = Stage0Recipe.from_file(str(recipe)).render(VariantConfig({}), RenderConfig())
    made = rendered.run_build(output_dir=str(tmp_path / "out"), channels=[channel.as_uri()], no_include_recipe=False)
    extract(made.packages[0], tmp_path / "unpacked")
    solved = materials.solved(tmp_path / "unpacked")
    files = {path.name: sha256_of(path) for path in (channel / "linux-64").glob("*-1.0-*.conda")}
    assert {item["uri"]: item["sha256"] for item in solved} == files
    variant = variants.load(workspace().variants).get("cu130", "conda")
    key = variant.key("3.12", ArchList.parse("9.0"))
    found = materials.collect(render("mamba-ssm", key, workspace()), key, workspace(), packages=solved)
    assert {item["role"] for item in found} == {"source", "patch", "toolchain package"}
    assert not any("lock" in item["uri"] for item in found)


def test_what_was_solved_is_named_by_its_url_without_a_token(tmp_path: Path) -> None:
    said = tmp_path / "info/recipe/rendered_recipe.yaml"
    said.parent.mkdir(parents=True)
    url = "https://conda.lab.example/t/ssmf-Secret1234567890/lab/linux-64/gxx-1-0.conda"
    record = {"url": url, "sha256": "ab" * 32}
    said.write_text(json.dumps({"finalized_dependencies": {"build": {"resolved": [record]}, "host": None}}))
    (item,) = materials.solved(tmp_path)
    assert item["uri"].startswith("https://conda.lab.example/t/")
    assert "Secret" not in item["uri"]
    said.write_text("{}")
    with pytest.raises(BuildError, match="does not say which packages"):
        materials.solved(tmp_path)


def test_a_compiler_that_the_bridge_brings_is_named_by_its_lock() -> None:
    place = workspace()
    variant = variants.load(place.variants).get("cu118", "bridge")
    key = variant.key("3.11", ArchList.parse("8.0"))
    lock = place.bridge_locks / "debs.gcc-11.toml"
    found = materials.collect(render("mamba-ssm", key, place), key, place, compiler_lock=lock)
    assert {"uri": "recipes/bridge/debs.gcc-11.toml", "sha256": sha256_of(lock), "role": "toolchain lock"} in found


def test_a_plan_knows_the_lock_or_the_words_of_the_compiler(tmp_path: Path) -> None:
    place = workspace()
    variant = variants.load(place.variants).get("cu118", "bridge")
    bundled: Any = SimpleNamespace(compiler=BundledCompiler(()), cross=None)
    assert origin.compiler_of(variant, bundled, place) == ("", place.bridge_locks / "debs.gcc-11.toml")
    gxx = tmp_path / "g++"
    gxx.write_text("#!/bin/sh\necho 'g++ (Debian 12.2.0-14) 12.2.0'\necho more\n")
    gxx.chmod(0o755)
    machines: Any = SimpleNamespace(compiler=HostCompiler(gxx, gxx, "12.2.0"))
    assert origin.compiler_of(variant, machines, place) == ("g++ (Debian 12.2.0-14) 12.2.0", None)
    assert origin.compiler_of(variant, None, place) == ("", None)
