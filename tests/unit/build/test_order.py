"""The order in which ninja starts the compilers: longest first, and nothing else in its file changes."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from ssm_forge.base.errors import BuildError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.build import costs as compile_costs
from ssm_forge.build.schedule import Job
from ssm_forge.manifest.recipe import EXTENSIONS, PROJECTS

ROOT = Path(__file__).parents[3]
ORDER = ROOT / "recipes/common/order.py"

NINJA = """\
ninja_required_version = 1.3
cxx = g++

rule compile
  command = $cxx -c $in -o $out

rule cuda_compile
  command = $nvcc -c $in -o $out

build /w/a.o: compile /w/csrc/a.cpp
build /w/b.o: cuda_compile /w/csrc/b.cu
build /w/c.o: cuda_compile /w/csrc/c.cu
build /w/new.o: cuda_compile /w/csrc/new.cu

build /w/all: link /w/a.o /w/b.o
"""


@pytest.fixture
def reordered() -> Callable[[str, dict[str, float]], str]:
    return cast("Callable[[str, dict[str, float]], str]", runpy.run_path(str(ORDER))["reordered"])


def test_the_longest_go_first_and_the_unknown_before_them(
    reordered: Callable[[str, dict[str, float]], str],
) -> None:
    text = reordered(NINJA, {"a.cpp": 2.0, "b.cu": 3.0, "c.cu": 7.5})
    statements = [line.split()[-1] for line in text.splitlines() if line.startswith("build") and "compile" in line]
    assert statements == ["/w/csrc/new.cu", "/w/csrc/c.cu", "/w/csrc/b.cu", "/w/csrc/a.cpp"]
    assert sorted(text.splitlines()) == sorted(NINJA.splitlines())
    assert text.index("build /w/all") > text.index("a.cpp")


def test_files_of_equal_cost_keep_their_order(reordered: Callable[[str, dict[str, float]], str]) -> None:
    assert reordered(NINJA, dict.fromkeys(("a.cpp", "b.cu", "c.cu", "new.cu"), 1.0)) == NINJA


def test_it_is_told_the_costs_by_the_file_that_the_bench_writes(tmp_path: Path) -> None:
    place = Workspace(root=tmp_path, cache=tmp_path)
    place.recipes.mkdir()
    costs = {"selective_scan_cuda": [Job("a.cpp", 1, 5), Job("c.cu", 9, 7)], "other": [Job("b.cu", 99, 5)]}
    file = compile_costs.write(place, costs)
    ninja = tmp_path / "build.ninja"
    ninja.write_text(NINJA)
    subprocess.run([sys.executable, ORDER, file, "selective_scan_cuda", ninja], check=True)
    found = [line.split("/")[-1] for line in ninja.read_text().splitlines() if "compile /w" in line]
    assert found == ["b.cu", "new.cu", "c.cu", "a.cpp"]
    assert compile_costs.load(place, ["mamba-ssm"]) == [Job("c.cu", 9, 1_000_000), Job("a.cpp", 1, 1_000_000)]


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    place = Workspace(root=tmp_path, cache=tmp_path)
    place.recipes.mkdir()
    with pytest.raises(BuildError, match=r"compile-costs\.txt can't be read"):
        compile_costs.load(place)
    compile_costs.path(place).write_text("selective_scan_cuda a.cu\n")
    with pytest.raises(BuildError, match=r"compile-costs\.txt can't be read"):
        compile_costs.load(place)
    compile_costs.path(place).write_text("selective_scan_cuda a.cu 1.0 600\n")
    with pytest.raises(BuildError, match="no costs of causal_conv1d_cuda"):
        compile_costs.load(place)


@pytest.mark.parametrize("project", PROJECTS)
def test_every_file_that_a_recipe_compiles_has_its_costs(project: str) -> None:
    """Those that patches add can be read off the patches; a file that is not known would only come first."""
    known = {job.name for job in compile_costs.load(workspace(), [project])}
    assert len(known) >= 10
    assert all(job.seconds > 1 and job.memory_bytes > 100_000_000 for job in compile_costs.load(workspace(), [project]))
    added = {
        line.rpartition("/")[2]
        for patch in (ROOT / "patches" / project).rglob("*.patch")
        for line in patch.read_text(encoding="utf-8").splitlines()
        if line.startswith("+++ b/csrc/") and line.endswith(".cu") and "_bwd_" in line
    }
    assert added
    assert added <= known, EXTENSIONS[project]
