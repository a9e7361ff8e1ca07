"""Building a source tree: what it is planned to take, and that nothing untrusted gets into what it is built with."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_trees import MODULES, SETUP, make_tree

from front_door import assert_one_line_error, run_here
from ssm_forge.base.errors import IntegrityError, MachineError, UsageError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.build import run as building
from ssm_forge.build.jobs import MEMORY_BASE_BYTES
from ssm_forge.build.request import BuildRequest
from ssm_forge.channel import policy, statement
from ssm_forge.commands.build import build as build_command
from ssm_forge.commands.install_mamba import install_mamba
from ssm_forge.flow import planning
from ssm_forge.flow.plan import Options, Plan
from ssm_forge.manifest import recipe
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.solve import prefix as solve_prefix
from ssm_forge.trees import build, target


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """This checkout, with a channel and a cache of the test's own, on a machine without a GPU."""
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SSM_FORGE_CHANNEL", str(tmp_path / "channel"))
    monkeypatch.setenv("SSM_FORGE_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setattr(solve_prefix, "machine_virtual_packages", lambda: virtual_packages(glibc="2.36"))
    monkeypatch.setattr("ssm_forge.base.machine.gpus", lambda: ())
    # Nothing is downloaded here.
    monkeypatch.setattr("ssm_forge.flow.disks.free_disk", lambda path: 10**12)
    monkeypatch.setattr("ssm_forge.build.jobs.free_memory", lambda: 10**11)
    return workspace()


@pytest.fixture
def compiled(checkout: Workspace, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The projects that a compiler would have been started for."""
    projects: list[str] = []

    def compiler(request: BuildRequest, **_: object) -> Path:
        projects.append(request.project)
        return checkout.channel / "linux-64" / request.filename

    monkeypatch.setattr(building, "build", compiler)
    return projects


def stub_channel(folder: Path, plan: Plan) -> str:
    """A channel with one empty package for each requirement of a build for ``plan``; its URL."""
    key = plan.variant.key(plan.python, plan.archs)
    requirements = recipe.requirements(recipe.render("mamba-ssm", key, workspace()))
    packages = {}
    # A tree's build also has the headers of CUDA's libraries.
    asked = {spec for specs in requirements.values() for spec in specs}
    asked |= {"libcublas-dev", "libcusolver-dev", "libcusparse-dev"}
    for spec in sorted(asked, key=len):
        name, version, build_string = [*spec.split(), "", ""][:3]
        number = re.sub(r"^[>=]*", "", version).split(",")[0].replace(".*", ".0") or "1.0"
        entry = {"name": name, "version": number, "build": build_string.replace("*", "x") or "0", "build_number": 0}
        packages[name] = {**entry, "depends": [], "subdir": "linux-64", "sha256": "ab" * 32, "size": 1}
    named = {f"{p['name']}-{p['version']}-{p['build']}.conda": p for p in packages.values()}
    for subdir, content in (("linux-64", named), ("noarch", {})):
        (folder / subdir).mkdir(parents=True)
        (folder / subdir / "repodata.json").write_text(json.dumps({"packages": {}, "packages.conda": content}))
    return folder.as_uri()


def planned(checkout: Workspace, folder: Path) -> Plan:
    """A plan for a tree whose channels hold what its build needs."""
    plan = target.of_variant(Options(source="conda", cuda_arch="9.0", prefix=folder / "prefix"), checkout)
    return replace(plan, channels=(stub_channel(folder / "conda", plan),), locked=None)


def test_the_plan_counts_the_tree_and_neither_of_the_two_projects(
    checkout: Workspace, compiled: list[str], tmp_path: Path
) -> None:
    usual = planning.make(Options(source="conda", cuda_arch="9.0", prefix=tmp_path / "prefix", jobs=1), checkout)
    plan = planned(checkout, tmp_path)
    assert (plan.packages, plan.memory_bytes, plan.disk_bytes, plan.jobs) == ((), 0, 0, 0)
    built = build.build(str(make_tree(tmp_path / "Vim")), plan, None, checkout)
    assert compiled == ["mamba-ssm"]
    assert [package.version for package in built.plan.packages] == ["1.1.1"]
    # One file, whatever the number of cores.
    assert (built.plan.jobs, built.plan.memory_bytes) == (1, MEMORY_BASE_BYTES + 2_500_000_000)
    assert usual.disk_bytes - built.plan.disk_bytes == 400_000_000


def test_a_tree_that_the_memory_is_too_small_for_is_refused_before_anything_is_made(
    checkout: Workspace, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(checkout, tmp_path)
    monkeypatch.setattr("ssm_forge.build.jobs.free_memory", lambda: 3 * 10**9)
    with pytest.raises(MachineError, match=r"1 compile job need .* of memory, and 3"):
        build.build(str(make_tree(tmp_path / "Vim")), plan, None, checkout)
    assert not compiled
    assert not list((tmp_path / "cache" / "build").iterdir())


def test_the_trust_policy_is_about_what_a_tree_is_built_with(
    checkout: Workspace, compiled: list[str], tmp_path: Path
) -> None:
    statement.make_key(tmp_path, "lab")
    plan = planned(checkout, tmp_path)
    (tmp_path / "trust.toml").write_text(f'[[channel]]\nurl = "{plan.channels[0]}"\nkeys = ["lab.pub"]\n')
    tree = str(make_tree(tmp_path / "Vim"))
    with pytest.raises(IntegrityError, match="comes without a signed statement"):
        build.build(tree, replace(plan, trust=policy.load(tmp_path / "trust.toml")), None, checkout)
    assert not compiled
    (tmp_path / "trust.toml").write_text('[[channel]]\nurl = "https://elsewhere.example"\nkeys = ["lab.pub"]\n')
    build.build(tree, replace(plan, trust=policy.load(tmp_path / "trust.toml")), None, checkout)
    assert compiled == ["mamba-ssm"]


def test_a_rule_about_no_channel_in_use_stops_an_installation(
    checkout: Workspace, compiled: list[str], tmp_path: Path
) -> None:
    statement.make_key(tmp_path, "lab")
    (tmp_path / "trust.toml").write_text('[[channel]]\nurl = "https://mispelled.example"\nkeys = ["lab.pub"]\n')
    where = ["--prefix", str(tmp_path / "prefix"), "--trust", str(tmp_path / "trust.toml"), "--source", "conda"]
    tree = str(make_tree(tmp_path / "Vim"))
    done = CliRunner().invoke(install_mamba, ["--source-tree", tree, "--variant", "cu130", *where])
    assert isinstance(done.exception, UsageError)
    assert done.exception.what.startswith("the trust policy has a rule for https://mispelled.example")
    assert not compiled


def test_the_json_of_a_build_names_the_trees_packages_only(
    checkout: Workspace, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(checkout, tmp_path)
    monkeypatch.setattr(target, "of_variant", lambda options, workspace: plan)
    trees = [make_tree(tmp_path / "Vim"), make_tree(tmp_path / "other", **other_setup())]
    named = [word for tree in trees for word in ("--source-tree", str(tree))]
    done = CliRunner().invoke(build_command, [*named, "--source", "conda", "--json"])
    assert done.exit_code == 0, done.exception
    printed = json.loads(done.stdout)
    assert [(p["name"], p["state"]) for p in printed["packages"]] == [
        ("mamba-ssm", "to build"),
        ("other-scan", "to build"),
    ]
    assert printed["memory_bytes"] == MEMORY_BASE_BYTES + 2_500_000_000
    assert [Path(name).name.split("-cuda130")[0] for name in printed["files"]] == ["mamba-ssm-1.1.1", "other-scan-3.1"]


def other_setup() -> dict[str, str]:
    """A second tree, of another name."""
    setup = 'from torch.utils.cpp_extension import CUDAExtension\nsetup(ext_modules=[CUDAExtension("a", ["a.cu"])])\n'
    return {"setup_dot_py": setup, "pyproject_dot_toml": '[project]\nname = "other_scan"\nversion = "3.1"\n'}


def test_the_json_of_a_dry_run_says_what_each_tree_is(checkout: Workspace, tmp_path: Path) -> None:
    tree = str(make_tree(tmp_path / "Vim"))
    done = CliRunner().invoke(install_mamba, ["--source-tree", tree, "--variant", "cu130", "--dry-run", "--json"])
    assert done.exit_code == 0, done.exception
    (seen,) = json.loads(done.stdout)["trees"]
    assert (seen["name"], seen["version"], seen["origin"], seen["patches"]) == ("mamba-ssm", "1.1.1", "Vim", [])
    assert len(seen["sha256"]) == 64


def test_what_the_two_projects_import_is_not_installed_with_a_tree(tmp_path: Path) -> None:
    tree = str(make_tree(tmp_path / "Vim"))
    done = CliRunner().invoke(install_mamba, ["--source-tree", tree, "--with-deps", "--dry-run"])
    assert isinstance(done.exception, UsageError)
    assert done.exception.what.startswith("--with-deps installs what causal-conv1d and mamba-ssm import")


@pytest.mark.parametrize("task", ["build", "install-mamba"])
@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"setup_dot_py": "", "kernels__setup_dot_py": SETUP}, ["has no setup.py", "It has one in kernels"]),
        ({"csrc__scan_kernel_dot_cu": ""}, ["has no CUDA sources"]),
        ({"setup_dot_py": "from setuptools import setup\nsetup(name='x')\n"}, ["builds no CUDAExtension"]),
        (
            {"_dot_gitmodules": MODULES, "setup_dot_py": SETUP + "'3rdparty/cutlass/include'\n"},
            ["needs the git submodule 3rdparty/cutlass", "git submodule update --init --recursive"],
        ),
    ],
)
def test_a_tree_that_cant_be_built_is_one_error_of_the_command_and_leaves_nothing(
    checkout: Workspace, compiled: list[str], tmp_path: Path, task: str, files: dict[str, str], words: list[str]
) -> None:
    tree = str(make_tree(tmp_path / "Vim", **files))
    where = ["--prefix", str(tmp_path / "prefix")] if task == "install-mamba" else []
    done = run_here(task, "--source-tree", tree, "--source", "conda", "--variant", "cu130", *where)
    assert_one_line_error(done, 2, *words)
    assert not compiled
    assert not list((tmp_path / "cache" / "build").iterdir())
    assert not (tmp_path / "channel").exists()
    assert not (tmp_path / "prefix").exists()


def test_an_archive_without_its_submodules_says_what_they_are_left_out_of(
    checkout: Workspace, compiled: list[str], tmp_path: Path
) -> None:
    files = {"_dot_gitmodules": MODULES, "setup_dot_py": SETUP + "'3rdparty/cutlass/include'\n"}
    folder = make_tree(tmp_path / "Vim", **files)
    with zipfile.ZipFile(tmp_path / "Vim.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, f"Vim-main/{path.relative_to(folder)}")
    done = run_here("build", "--source-tree", str(tmp_path / "Vim.zip"), "--source", "conda", "--variant", "cu130")
    assert_one_line_error(done, 2, "archives of a repository leave submodules out")
