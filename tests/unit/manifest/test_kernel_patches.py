"""What the patches of the kernels promise, read in their text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssm_forge.base.arch import ArchList
from ssm_forge.base.paths import workspace
from ssm_forge.manifest import recipe, variants
from ssm_forge.manifest.variants import Variant
from ssm_forge.package.kernels import Kernels

ROOT = Path(__file__).resolve().parents[3]
TRITON = sorted((ROOT / "patches" / "mamba-ssm").glob("*/*-64-bit-states-and-triton.patch"))


def _added(patch: Path) -> str:
    """The lines that a patch adds."""
    return "".join(line[1:] for line in patch.read_text(encoding="utf-8").splitlines(True) if line.startswith("+"))


def test_both_releases_have_the_patch() -> None:
    assert [patch.parent.name for patch in TRITON] == ["2.3.1", "2.3.2.post1"]


@pytest.mark.parametrize("patch", TRITON, ids=lambda patch: patch.parent.name)
def test_a_triton_kernel_that_is_told_of_wide_offsets_uses_them(patch: Path) -> None:
    added = _added(patch)
    told = added.count('@triton.heuristics({"WIDE": needs_64_bits})')
    assert told == added.count("    WIDE: tl.constexpr,")
    heads = added.count("        wide = tl.program_id(0).to(tl.int64) * 0 + 1\n")
    # One kernel has its strides in tuples, and widens its indices.
    assert told - heads == added.count("The strides come in tuples")
    assert told >= 28


@pytest.mark.parametrize("patch", TRITON, ids=lambda patch: patch.parent.name)
def test_every_stride_is_widened_as_itself(patch: Path) -> None:
    lines = re.findall(r"^        (stride_.*?) = (stride_.*)$", _added(patch), re.MULTILINE)
    assert lines
    for names, values in lines:
        assert values == ", ".join(f"{name} * wide" for name in names.split(", "))


# --- upstream's kernels as they are

ROWS = variants.load(workspace().variants).variants
_ROW_IDS = [f"{row.name}-{row.source}" for row in ROWS]
_HOW_IT_IS_BUILT = {"setup.py", "pyproject.toml"}
_MARK = "\nWith upstream's kernels too: without it the package does not import.\n"


def applied(project: str, row: Variant, kernels: Kernels) -> set[Path]:
    """The patches that a recipe takes."""
    key = row.key(row.pythons[0], ArchList.parse("8.0"), kernels=kernels)
    sources = recipe.sources(recipe.render(project, key, workspace()))
    return {(ROOT / "recipes" / project / patch).resolve() for source in sources for patch in source["patches"]}


def changed(patch: Path) -> set[str]:
    """The files that a patch changes or adds."""
    return set(re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("row", ROWS, ids=_ROW_IDS)
@pytest.mark.parametrize("project", recipe.PROJECTS)
def test_upstreams_kernels_get_no_patch_of_what_runs_and_ours_get_all(project: str, row: Variant) -> None:
    every = {path.resolve() for path in (ROOT / "patches" / project / row.projects[project]).glob("*.patch")}
    assert applied(project, row, "forge") == every
    kept = applied(project, row, "upstream")
    by_rule = {
        patch for patch in every if changed(patch) <= _HOW_IT_IS_BUILT or _MARK in patch.read_text(encoding="utf-8")
    }
    assert kept == by_rule
    assert len(kept) < len(every)


@pytest.mark.parametrize("patch", sorted((ROOT / "patches").glob("*/*/*.patch")), ids=lambda patch: patch.name)
def test_what_is_needed_to_import_is_python_and_no_kernel(patch: Path) -> None:
    if _MARK in patch.read_text(encoding="utf-8"):
        assert all(name.endswith(".py") for name in changed(patch))
        assert "tl." not in _added(patch)


@pytest.mark.parametrize("row", ROWS, ids=_ROW_IDS)
def test_packages_with_upstreams_kernels_have_names_of_their_own_and_ask_for_each_other(row: Variant) -> None:
    for project in recipe.PROJECTS:
        key = row.key(row.pythons[0], ArchList.parse("8.0;9.0"))
        ours, theirs = (
            recipe.render(project, key.with_kernels(kernels), workspace()) for kernels in ("forge", "upstream")
        )
        assert ours.build.startswith("cuda")
        assert theirs.build.startswith("upstream_cuda")
        assert ours.build.rpartition("_")[2] == theirs.build.rpartition("_")[2]
        assert (ours.build_number > 0, theirs.build_number) == (True, 0)
        asked = theirs.engine.recipe.requirements.to_dict()
        needs = f"causal-conv1d =={row.projects['causal-conv1d']} upstream_*" in asked["run"]
        refuses = "mamba-ssm * upstream_*" in asked.get("run_constraints", ())
        assert (needs, refuses) == (project == "mamba-ssm", project == "causal-conv1d")
        assert "upstream" not in str(ours.engine.recipe.requirements.to_dict())
