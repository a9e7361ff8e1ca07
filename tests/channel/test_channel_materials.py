"""What a package says it was made from, and its bill of materials."""

from __future__ import annotations

import json

import pytest

from ssm_forge import materials, variants
from ssm_forge.arch import ArchList
from ssm_forge.fetch import sha256_of
from ssm_forge.paths import workspace

INDEX = {
    "name": "mamba-ssm",
    "version": "1.0",
    "build": "cuda130_py312_sm90_h1234567_0",
    "subdir": "linux-64",
    "depends": ["pytorch 2.11.*", "__glibc >=2.28,<3.0.a0", "causal-conv1d ==1.7.0"],
}


@pytest.fixture(scope="module")
def found() -> list[materials.Material]:
    variant = variants.load(workspace().variants).get("cu130", "bridge")
    return materials.collect("mamba-ssm", variant.render_values("3.12", ArchList.parse("9.0")), workspace())


def test_sources_patches_and_locks_are_named_with_their_hashes(found: list[materials.Material]) -> None:
    roles = {item["role"] for item in found}
    assert roles == {"source", "patch", "toolchain lock"}
    assert all(len(item["sha256"]) == 64 for item in found)
    for item in found:
        if item["role"] != "source":
            assert item["sha256"] == sha256_of(workspace().root / item["uri"])
    assert any(item["uri"].endswith("pylock.cu130-py312.toml") for item in found)


def test_the_bill_of_materials_is_valid_and_the_same_every_time(found: list[materials.Material]) -> None:
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
