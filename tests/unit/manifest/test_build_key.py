"""What a build is made for: read once, and the same whatever it was read from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ssm_forge.base.arch import ArchList
from ssm_forge.base.paths import workspace
from ssm_forge.manifest import variants
from ssm_forge.manifest.build_key import BuildKey

ROW = variants.load(workspace().variants).get("cu130", "bridge")
KEY = ROW.key("3.12", ArchList.parse("8.0;9.0+PTX"))


def test_it_says_what_the_build_is_for() -> None:
    assert (KEY.variant, KEY.source, KEY.python, KEY.cuda) == ("cu130", "bridge", "3.12", "13.0")
    assert str(KEY.archs) == "8.0;9.0+PTX"
    assert KEY.compiler == ROW.row["cxx_compiler_version"]


def test_a_package_and_the_engine_give_it_back() -> None:
    told = json.loads(json.dumps({"variant": KEY.to_provenance()}))
    assert list(told["variant"]) == sorted(KEY.settings)
    assert BuildKey.from_provenance(told) == KEY
    assert hash(BuildKey.from_provenance(told)) == hash(KEY)
    assert BuildKey.from_renderer(json.loads(json.dumps(KEY.to_renderer()))) == KEY


@pytest.mark.parametrize(
    "other",
    [
        ROW.key("3.11", KEY.archs),
        ROW.key("3.12", ArchList.parse("9.0")),
        ROW.key("3.12", KEY.archs, compiler="11"),
        variants.load(workspace().variants).get("cu130", "conda").key("3.12", KEY.archs),
        BuildKey.from_settings({**KEY.settings, "libxyz": "1"}),
        KEY.with_kernels("upstream"),
    ],
    ids=["python", "GPUs", "compiler", "source", "one key more", "kernels"],
)
def test_another_build_has_another_key(other: BuildKey) -> None:
    assert other != KEY


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"forge_variant": None}, "its forge_variant is None"),
        ({"cuda_arch_list": "sm"}, "its cuda_arch_list is 'sm'"),
        ({"pytorch": 2}, "its pytorch is 2"),
        ({"forge_kernels": "theirs"}, "its forge_kernels is 'theirs'"),
    ],
)
def test_what_is_no_key_is_refused_with_the_field(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        BuildKey.from_provenance({"variant": {**KEY.to_provenance(), **change}})


def test_what_is_missing_is_named() -> None:
    for name in ("forge_variant", "forge_source", "python", "cuda_arch_list", "cxx_compiler_version"):
        rest = {key: value for key, value in KEY.to_provenance().items() if key != name}
        with pytest.raises(ValueError, match=f"it has no {name}"):
            BuildKey.from_provenance({"variant": rest})
    for provenance in ({}, {"variant": None}, {"variant": [1]}):
        with pytest.raises(ValueError, match="it has no variant"):
            BuildKey.from_provenance(provenance)


def test_two_values_of_a_key_are_two_builds() -> None:
    with pytest.raises(ValueError, match="its python has 2 values"):
        BuildKey.from_renderer({**KEY.to_renderer(), "python": ["3.11.*", "3.12.*"]})


def test_whose_kernels_are_told_by_a_key_that_ours_have_not() -> None:
    theirs = KEY.with_kernels("upstream")
    assert (KEY.kernels, theirs.kernels) == ("forge", "upstream")
    assert theirs == ROW.key("3.12", KEY.archs, kernels="upstream")
    assert theirs.settings == {**KEY.settings, "forge_kernels": "upstream"}
    assert "forge_kernels" not in KEY.settings
    assert theirs.with_kernels("forge") == KEY
    assert theirs.toolchain == KEY.toolchain
    assert BuildKey.from_provenance({"variant": theirs.to_provenance()}) == theirs
