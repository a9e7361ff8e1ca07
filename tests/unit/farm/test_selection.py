"""Which packages an expression means, and what is said where it means none."""

from __future__ import annotations

import pytest

from ssm_forge.base import platforms
from ssm_forge.base.errors import UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.farm.cells import Cell, every, from_one_source, select, with_needed
from ssm_forge.manifest import recipe, variants

MATRIX = variants.load(workspace().variants)


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return every(MATRIX, recipe.PROJECTS)


def test_without_an_expression_it_is_the_whole_matrix(cells: list[Cell]) -> None:
    found = select(cells, "")
    assert len(found) == 2 * sum(len(variant.pythons) for variant in MATRIX.variants)
    assert len({cell.name for cell in cells}) == len(cells)


def test_upstreams_kernels_are_selected_by_name_only(cells: list[Cell]) -> None:
    assert {cell.kernels for cell in select(cells, "variant=cu130")} == {"forge"}
    assert {cell.kernels for cell in select(cells, "variant=cu130 kernels=upstream")} == {"upstream"}
    both = select(cells, "variant=cu130 source=bridge python=3.12 project=mamba-ssm kernels=*")
    assert [cell.name.rpartition("-")[2] for cell in both] == ["sm80_sm90ptx", "upstream"]
    assert len({cell.objects for cell in both}) == 2


def test_what_a_package_with_upstreams_kernels_needs_has_them_too(cells: list[Cell]) -> None:
    picked = select(cells, "variant=cu130 source=bridge python=3.12 project=mamba-ssm kernels=upstream")
    found = with_needed(picked, recipe.PROJECTS)
    assert [(cell.project, cell.kernels) for cell in found] == [(name, "upstream") for name in recipe.PROJECTS]


def test_terms_hold_together_and_values_are_alternatives(cells: list[Cell]) -> None:
    found = select(cells, "variant=cu118,cu124 python!=3.10 project=mamba* source=bridge")
    assert {cell.variant.name for cell in found} == {"cu118", "cu124"}
    assert {cell.project for cell in found} == {"mamba-ssm"}
    assert "3.10" not in {cell.python for cell in found}


def test_each_list_of_capabilities_is_a_package_where_the_toolkit_has_it() -> None:
    found = select(every(MATRIX, recipe.PROJECTS, ("9.0", "12.0")), "python=3.10 source=bridge project=mamba-ssm")
    tags = {(cell.variant.name, cell.archs.tag) for cell in found}
    assert tags == {("cu118", "sm90"), ("cu124", "sm90"), ("cu130", "sm90"), ("cu130", "sm120")}


@pytest.mark.parametrize(
    ("expression", "what", "listed"),
    [
        ("variant=cu119", "no variant is 'cu119'", "cu118, cu124, cu129, cu130"),
        ("variants=cu118", "'variants=cu118' is no term", "variant=cu118,cu124,cu129,cu130"),
        ("cu118", "'cu118' is no term", "KEY=VALUE"),
        ("kernels=theirs", "no kernels is 'theirs'", "There is forge, upstream."),
        ("variant=cu118 python=3.14", "selects nothing", "variant=cu118 source=conda python=3.10;"),
    ],
)
def test_what_does_not_exist_lists_what_there_is(cells: list[Cell], expression: str, what: str, listed: str) -> None:
    with pytest.raises(UsageError) as error:
        select(cells, expression)
    assert what in error.value.what
    assert listed in error.value.fix


def test_a_variant_comes_from_conda_where_that_is_reached_and_from_the_bridge_else(cells: list[Cell]) -> None:
    def sources(conda: bool) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for cell in from_one_source(select(cells, ""), conda=conda):
            found.setdefault(cell.variant.name, set()).add(cell.variant.source)
        return found

    assert sources(True) == {"cu118": {"conda"}, "cu124": {"bridge"}, "cu129": {"conda"}, "cu130": {"conda"}}
    assert sources(False) == {"cu118": {"bridge"}, "cu124": {"bridge"}, "cu130": {"bridge"}}


def test_another_platform_is_selected_by_name_and_shares_nothing_with_this_one(cells: list[Cell]) -> None:
    assert {cell.platform for cell in select(cells, "variant=cu130")} == {platforms.here()}
    found = select(cells, "platform=linux-aarch64 python=3.11 project=mamba-ssm")
    assert [cell.name for cell in found] == ["mamba-ssm.cu130-bridge-linux-aarch64-py311-sm80_sm90ptx"]
    both = select(cells, "variant=cu130 source=bridge python=3.11 platform=* project=mamba-ssm")
    assert {cell.platform for cell in both} == set(platforms.PLATFORMS)
    for shared in ("row", "environment", "objects", "name"):
        assert len({getattr(cell, shared) for cell in both}) == 2
    # Conda's channels have it for one of the two only.
    anywhere = from_one_source(select(cells, "variant=cu130 platform=*"), conda=True)
    assert {cell.row for cell in anywhere} == {"cu130-conda", "cu130-bridge-linux-aarch64"}


def test_what_a_package_needs_comes_with_it_and_before_it(cells: list[Cell]) -> None:
    picked = select(cells, "variant=cu118 source=bridge project=mamba-ssm")
    names = [cell.name.split("-bridge-")[0] for cell in with_needed(picked, recipe.PROJECTS)]
    assert names == ["causal-conv1d.cu118", "mamba-ssm.cu118"] * 2
