"""Figures of builds: what a measured run says, what upstream's build is made from, and how both are shown."""

from __future__ import annotations

import copy
import io
import os
import random
import re
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from conda_channel import make_package
from ssm_forge.base import machine
from ssm_forge.base.errors import BuildError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import workspace
from ssm_forge.bench import baseline
from ssm_forge.bench import report as build_report
from ssm_forge.bench import run as build_bench
from ssm_forge.bench.baseline import Wheel
from ssm_forge.bench.run import Document, Target
from ssm_forge.bench.usage import Group, ToolUse, Usage
from ssm_forge.build.schedule import Job
from ssm_forge.commands.build import build
from ssm_forge.flow import plan
from ssm_forge.manifest import recipe, variants
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.trees import job

SCAN, CONV = "selective_scan_cuda", "causal_conv1d_cuda"
LIBRARY = f"{SCAN}.cpython-312-x86_64-linux-gnu.so"


def group(source: str, extension: str, first: float, last: float, memory: int = 1, **cpu: float) -> Group:
    """A group whose first tool starts at ``first`` and whose last ends at ``last``."""
    labels = {"source": source, "extension": extension}
    tools = {tool.replace("_", " "): ToolUse(seconds, first, last) for tool, seconds in cpu.items()}
    return Group({key: value for key, value in labels.items() if value}, tools, memory)


GROUPS = (
    Group({}, {"python": ToolUse(4.0, 0.0, 40.0), "ninja": ToolUse(0.5, 1.0, 38.0)}, 500),
    group("conv.cu", CONV, 2.0, 6.0, 300, cicc=2.0, ptxas=1.0),
    group("fwd.cu", SCAN, 10.0, 15.0, 700, cicc=3.0, ptxas=1.5),
    group("bwd.cu", SCAN, 10.0, 30.0, 900, cicc=12.0, ptxas=7.0, nvcc=0.5),
    group("scan.cpp", SCAN, 15.0, 20.0, 800, host_compiler=5.0),
    # The linker's time, and a file of no extension, belong to no compile window.
    group("(link)", SCAN, 30.0, 35.0, 100, host_compiler=1.0),
    group("probe.c", "", 0.0, 50.0, 10, host_compiler=0.25),
)


def usage(groups: tuple[Group, ...] = GROUPS) -> Usage:
    by_tool: dict[str, float] = {}
    for each in groups:
        for tool, use in each.tools.items():
            by_tool[tool] = by_tool.get(tool, 0.0) + use.cpu
    return Usage(
        returncode=0,
        wall=60.0,
        cpu=sum(by_tool.values()) + 0.75,
        cpu_by_tool=by_tool,
        peak_rss=2000,
        largest=900,
        groups=groups,
        timeline=(),
        samples=1,
        others_cpu=1.5,
        own_cpu=0.1,
    )


def test_a_run_is_told_as_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    found = build_bench.told(usage())
    assert (found["wall"], found["cpu"], found["peak_memory"], found["others_cpu"]) == (60.0, 38.5, 2000, 1.5)
    tools = {"cicc": 17.0, "ptxas": 9.5, "host compiler": 6.25, "python": 4.0}
    assert list(found["cpu_by_tool"].items())[:4] == list(tools.items())
    assert found["cpu_by_tool"]["unseen"] == pytest.approx(0.75)
    assert sum(found["cpu_by_tool"].values()) == pytest.approx(found["cpu"])
    # Python, ninja, nvcc itself and what no sample saw.
    assert found["cpu_outside_compilers"] == pytest.approx(4.0 + 0.5 + 0.5 + 0.75)
    files = [file["source"] for file in found["files"]]
    assert files == [
        "bwd.cu",
        "scan.cpp",
        "fwd.cu",
        "conv.cu",
        "(link)",
        "probe.c",
    ]
    assert found["files"][0] == {
        "extension": SCAN,
        "source": "bwd.cu",
        "cpu": 19.5,
        "wall": 20.0,
        "peak_memory": 900,
        "tools": {"cicc": 12.0, "ptxas": 7.0, "nvcc": 0.5},
    }
    assert found["files"][-1]["extension"] == ""
    assert found["compile"] == build_bench.windows(GROUPS, 2)


def test_a_window_lasts_from_an_extensions_first_compiler_to_its_last() -> None:
    conv = {"wall": 4.0, "cpu": 3.0, "busy": 3.0 / 8.0}
    scan = {"wall": 20.0, "cpu": 29.0, "busy": 29.0 / 40.0}
    assert build_bench.windows(GROUPS, 2) == {CONV: conv, SCAN: scan}
    assert build_bench.windows(GROUPS, 1)[CONV]["busy"] == 0.75
    assert build_bench.windows(GROUPS[:1], 2) == {}
    assert build_bench.windows([group("a.cu", SCAN, 1.0, 1.0, cicc=0.1)], 2)[SCAN]["busy"] == 0.0


def cold() -> Document:
    return {"steps": {"cold": build_bench.told(usage())}}


def test_costs_without_a_cuda_file_whose_extension_is_not_known_are_not_recorded() -> None:
    figures = {"steps": {"cold": {"files": [{"source": "a.cu", "extension": "", "cpu": 1.0, "peak_memory": 1}]}}}
    with pytest.raises(BuildError, match=r"which extension a\.cu was compiled for"):
        build_bench.recordable(figures)


def test_costs_are_those_of_the_files_that_are_compiled_longest_first() -> None:
    figures = cold()
    figures["steps"]["cold"]["files"].reverse()
    assert build_bench.costs(figures) == {
        CONV: [Job("conv.cu", 3.0, 300)],
        SCAN: [Job("bwd.cu", 19.5, 900), Job("scan.cpp", 5.0, 800), Job("fwd.cu", 4.5, 700)],
    }


def test_other_machines_are_simulated_project_after_project() -> None:
    found = build_bench.simulated(cold())
    assert list(found) == [str(cores) for cores in build_bench.SIMULATED_CORES]
    # One core does everything; then the longest file of each project is what it waits for.
    assert found == {"1": 32.0, "2": 22.5, "4": 22.5, "8": 22.5, "16": 22.5}


def test_packages_are_told_with_their_hash_and_the_size_of_their_extension(tmp_path: Path) -> None:
    channel = tmp_path / "channel"
    site = "lib/python3.12/site-packages"
    files = {
        f"{site}/{LIBRARY}": "x" * 1234,
        f"{site}/{SCAN}.py": "x" * 10,
        f"{site}/other.so": "x" * 100,
    }
    scan = make_package(channel, "mamba-ssm", files)
    conv = make_package(channel, "causal-conv1d", {f"{site}/{CONV}.so": "y" * 77})
    expected = [(conv, 77), (scan, 1234)]
    assert build_bench.packages(channel) == [
        {"file": path.name, "sha256": sha256_of(path), "size": path.stat().st_size, "extension_size": size}
        for path, size in expected
    ]
    assert build_bench.packages(tmp_path / "nowhere") == []


@pytest.mark.parametrize("jobs", [None, 3])
def test_a_target_is_typed_as_a_user_types_it(jobs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the product makes of the arguments is what the bench itself plans with."""
    typed: list[plan.Options] = []

    def build_it(options: plan.Options, kind: str, env: None, trees: tuple[str, ...]) -> job.Made:
        typed.append(options)
        return job.Made({}, (), ())

    monkeypatch.setattr(job, "build", build_it)
    target = Target("cu118", "3.10", "3.11", "8.0;9.0+PTX", "conda", jobs, "g++-11")
    for python in (target.python, target.second):
        build.main(target.arguments(python), standalone_mode=False)
    assert typed == [target.options("3.10"), target.options("3.11")]
    assert [(options.python, options.jobs, options.for_this_machine) for options in typed] == [
        ("3.10", jobs, False),
        ("3.11", jobs, False),
    ]


def test_the_machine_is_described() -> None:
    found = build_bench.this_machine()
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert found["memory"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert re.fullmatch(r"2\.\d+", found["glibc"])
    assert found["cpu"]


SETUP = "flags = [\n    '-O3',\n    '-lineinfo',\n]\nname = 'scan'\n"
KEPT = """\
--- a/setup.py
+++ b/setup.py
@@ -4,2 +4,2 @@
 ]
-name = 'scan'
+name = 'kept'
--- /dev/null
+++ b/csrc/new/file.cu
@@ -0,0 +1 @@
+// new
"""
DROPPED = """\
--- a/setup.py
+++ b/setup.py
@@ -1,4 +1,3 @@
 flags = [
     '-O3',
-    '-lineinfo',
 ]
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "setup.py").write_text(SETUP)
    return folder


def patch(tree: Path, **patches: str) -> list[Path]:
    paths = []
    for stem, text in patches.items():
        paths.append(tree.parent / f"{stem.replace('_', '-')}.patch")
        paths[-1].write_text(text)
    return paths


def contents(tree: Path) -> dict[str, str]:
    return {str(path.relative_to(tree)): path.read_text() for path in tree.rglob("*") if path.is_file()}


def test_upstreams_flags_and_files_stay_and_every_other_patch_is_applied(tree: Path) -> None:
    split = KEPT.replace("kept", "split").replace("new/file", "new/split")
    patches = patch(tree, a1_nvcc_options=DROPPED, a2_split_backward=split, a3_kept=KEPT)
    baseline._patch(tree, patches)
    assert contents(tree) == {"setup.py": SETUP.replace("scan", "kept"), "csrc/new/file.cu": "// new\n"}


def test_the_same_patches_apply_where_they_are_not_ours(tree: Path) -> None:
    baseline._patch(tree, patch(tree, a1_flags=DROPPED, a3_kept=KEPT))
    assert "-lineinfo" not in contents(tree)["setup.py"]


def test_a_patch_that_does_not_fit_is_named_by_file_and_hunk_and_nothing_is_changed(tree: Path) -> None:
    patches = patch(tree, a1_flags=DROPPED, a2_misfit=KEPT.replace("'scan'", "'other'"))
    with pytest.raises(BuildError, match=r"a2-misfit\.patch: setup\.py, hunk 1 \(line 4\) does not fit: .*'other'"):
        baseline._patch(tree, patches)
    assert contents(tree) == {"setup.py": SETUP}


@pytest.mark.parametrize("project", PROJECTS)
def test_what_is_left_out_is_there_by_these_names_and_the_rest_keeps_upstreams_flags(project: str) -> None:
    place = workspace()
    built = {row.projects[project] for row in variants.load(place.variants).variants}
    folders = {path.name for path in (place.patches / project).iterdir() if path.is_dir()}
    assert built <= folders <= set(recipe.releases(project, place))
    for version in (place.patches / project / release for release in built):
        names = {path.stem.split("-", 1)[1]: path.read_text(encoding="utf-8") for path in version.glob("*.patch")}
        assert {"nvcc-options", "split-backward"} <= names.keys(), version
        for name, text in names.items():
            changed = [line for line in text.splitlines() if re.match(r"[-+](?![-+])", line)]
            touches_flags = any("-lineinfo" in line or "--threads" in line for line in changed)
            assert touches_flags == name.endswith("nvcc-options"), (version, name)
            assert name.endswith(baseline._OURS) == (name in ("nvcc-options", "split-backward"))


def test_the_extension_is_taken_out_of_the_wheel(tmp_path: Path) -> None:
    path = tmp_path / "mamba_ssm-2.3.1-cp312-cp312-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(LIBRARY, b"\x7fELF, more or less")
        wheel.writestr(f"{SCAN}_notes.txt", b"")
        wheel.writestr("mamba_ssm/other.so", b"")
    found = baseline._read("mamba-ssm", tmp_path)
    assert found == Wheel("mamba-ssm", path, tmp_path / LIBRARY)
    assert found.extension.read_bytes() == b"\x7fELF, more or less"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, LIBRARY])


def test_a_wheel_that_came_without_its_extension_is_one_clear_error(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mamba_ssm-2.3.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mamba_ssm/__init__.py", b"")
    with pytest.raises(BuildError, match=r"mamba_ssm-2\.3\.1-py3-none-any\.whl without selective_scan_cuda"):
        baseline._read("mamba-ssm", tmp_path)


def test_a_package_with_another_extension_is_as_large_as_that_makes_it(tmp_path: Path) -> None:
    site, size = "lib/python3.12/site-packages", 100_000
    ours = make_package(tmp_path / "channel", "mamba-ssm", {f"{site}/{LIBRARY}": "x" * size, f"{site}/a.py": "a = 1\n"})
    before = ours.read_bytes()
    extension = tmp_path / LIBRARY
    wheel = Wheel("mamba-ssm", tmp_path / "x.whl", extension)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    extension.write_bytes(b"x" * size)
    same = baseline.size_as_package(ours, wheel, scratch)
    extension.write_bytes(random.Random(7).randbytes(size))
    other = baseline.size_as_package(ours, wheel, scratch)
    assert same < 5_000
    assert size < other - same < size * 1.01
    assert ours.read_bytes() == before


def document() -> Document:
    """Figures that give ratios which can be worked out by hand."""
    run: Document = {
        "wall": 600.0,
        "cpu": 1000.0,
        "cpu_by_tool": {"cicc": 500.0, "ptxas": 250.0, "cudafe++": 50.0, "host compiler": 100.0, "python": 100.0},
        "cpu_outside_compilers": 100.0,
        "peak_memory": 3_400_000_000,
        "others_cpu": 0.0,
        "compile": {
            CONV: {"wall": 200.0, "cpu": 380.0, "busy": 0.95},
            SCAN: {"wall": 300.0, "cpu": 480.0, "busy": 0.8},
        },
        "files": [
            {
                "extension": SCAN,
                "source": "selective_scan_bwd_fp32_complex.cu",
                "cpu": 81.25,
                "wall": 90.0,
                "peak_memory": 801_000_000,
                "tools": {"cicc": 60.5, "ptxas": 20.25, "nvcc": 0.5},
            }
        ],
        "packages": [
            {"file": "causal-conv1d-1.7.0-h1.conda", "sha256": "0", "size": 2_000_000, "extension_size": 1},
            {"file": "mamba-ssm-2.3.1-h1.conda", "sha256": "0", "size": 4_000_000, "extension_size": 1},
        ],
    }
    code = {
        "functions": [900, 901],
        "identical": 890,
        "different": ["a"] * 3,
        "only_ours": ["b"],
        "only_theirs": ["c"] * 2,
    }
    wheels = [
        {"project": project, "wheel_size": size, "extension_size": 1, "size_as_package": size // 2, "sass": code}
        for project, size in (("causal-conv1d", 9_000_000), ("mamba-ssm", 24_000_000))
    ]
    default = [{key: value for key, value in wheel.items() if key != "sass"} for wheel in wheels]
    return {
        "date": "2026-01-02T03:04:05+0000",
        "machine": {"cpu": "Some CPU", "cores": 2, "memory": 8_000_000_000, "glibc": "2.36"},
        "target": {"variant": "cu130", "python": "3.12", "cuda_arch": "9.0"},
        "steps": {
            "cold": run,
            "warm": {**run, "wall": 60.0, "cpu": 90.0},
            "second Python": {**run, "wall": 90.0},
            "from channel": {**run, "wall": 6.0},
        },
        "simulated": {"1": 900.0, "2": 500.0, "16": 100.0},
        "baseline": {
            "same capability": {**run, "wall": 900.0, "wheels": wheels},
            "default": {**run, "wall": 3000.0, "wheels": default},
        },
    }


def test_ratios_are_of_what_was_measured() -> None:
    assert build_report.ratios(document()) == {
        "cold: CPU outside the compilers": 0.1,
        "cold: cores busy while compiling": 0.8,
        "16 cores / 2 cores, simulated": 0.2,
        "warm / cold": 0.1,
        "second Python / cold": 0.15,
        "upstream, same capability / cold": 1.5,
        "upstream, default / cold": 5.0,
        "causal-conv1d: package with upstream's flags / ours": 2.25,
        "causal-conv1d: upstream's wheel / our package": 4.5,
        "mamba-ssm: package with upstream's flags / ours": 3.0,
        "mamba-ssm: upstream's wheel / our package": 6.0,
    }


def test_what_was_not_measured_has_no_ratio_and_no_table() -> None:
    whole = document()
    assert build_report.ratios({**whole, "steps": {}, "baseline": {}}) == {}
    only_cold = {**whole, "steps": {"cold": whole["steps"]["cold"]}}
    del only_cold["baseline"]
    assert list(build_report.ratios(only_cold)) == [
        "cold: CPU outside the compilers",
        "cold: cores busy while compiling",
        "16 cores / 2 cores, simulated",
    ]
    text = printed(only_cold)
    assert "Upstream" not in text
    assert "upstream" not in text
    assert "Cold: what each file took" in text
    without = copy.deepcopy(only_cold)
    without["steps"] = {"warm": without["steps"].pop("cold")}
    assert "Cold: what each file took" not in printed(without)


def printed(figures: Document) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(build_report.tables(figures))
    return stream.getvalue()


def test_tables_have_every_name_and_number() -> None:
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in printed(document()).splitlines()]
    compilers = ["500", "250", "50", "100", "100"]
    assert ["build", "wall", "CPU", "memory", *build_report.COLOURS] in rows
    assert ["cold", "10 min 00 s", "1000 s", "3.4 GB", *compilers] in rows
    assert ["warm", "1 min 00 s", "90 s", "3.4 GB", *compilers] in rows
    assert ["upstream, default", "50 min 00 s", "1000 s", "3.4 GB", *compilers] in rows
    file = f"{SCAN}: selective_scan_bwd_fp32_complex.cu"
    assert [file, "81.2", "801.0 MB", "60.5", "20.2", "0.0", "0.0"] in rows
    assert ["mamba-ssm", "901", "890", "6", "24.0 MB", "12.0 MB"] in rows
    assert ["warm / cold", "0.100"] in rows
    assert ["upstream, default / cold", "5.0"] in rows
    assert ["compiling on 16 cores, simulated from each file's CPU seconds", "1 min 40 s"] in rows
    assert "2 cores, Some CPU" in printed(document())


def test_the_parts_of_each_run_add_up_to_its_cpu_time() -> None:
    for name, run in build_report._rows(document()).items():
        if name != "warm":
            assert sum(build_report._split(run).values()) == run["cpu"]


def test_the_chart_is_a_picture_of_every_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = build_report.draw(document(), tmp_path / "new/folder/chart.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert width > 800
    assert height > 300
    only_cold = document()
    only_cold["steps"] = {"cold": only_cold["steps"]["cold"]}
    del only_cold["baseline"]
    assert build_report.draw(only_cold, tmp_path / "cold.png").read_bytes() != data
