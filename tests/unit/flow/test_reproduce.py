"""A rebuild from a package's own metadata: refused where it would prove nothing, else compared byte by byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rattler_build import assemble_package

from conda_channel import make_package
from ssm_forge import cli
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import IntegrityError, MachineError, UsageError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.base.platforms import LINUX_AARCH64
from ssm_forge.build import finalize
from ssm_forge.build import jobs as build_jobs
from ssm_forge.build import provenance as materials
from ssm_forge.build import run as builds
from ssm_forge.build.request import BuildRequest
from ssm_forge.commands import reproduce as command
from ssm_forge.flow import pipeline, plan, planning, recorded, reproduce
from ssm_forge.manifest import recipe, variants
from ssm_forge.package import read as inspection
from ssm_forge.package import write as archive

ROW = variants.load(workspace().variants).get("cu130", "bridge")
ARCHS = ArchList.parse("9.0")
KEY = ROW.key("3.12", ARCHS)
PATCH = "patches/mamba-ssm/2.3.2.post1/0001-always-build.patch"
LOCK = "recipes/bridge/pylock.cu130-py312.toml"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A checkout of its own, with this one's recipes and patches."""
    monkeypatch.delenv("SSM_FORGE_CHANNEL", raising=False)
    monkeypatch.delenv("SSM_FORGE_CCACHE", raising=False)
    root = tmp_path / "checkout"
    for folder in ("recipes", "patches"):
        shutil.copytree(workspace().root / folder, root / folder)
    yield Workspace(root, tmp_path / "cache")
    forget()


def forget() -> None:
    """Files changed: what was read from them is read again."""
    recipe.digest.cache_clear()
    variants.load.cache_clear()


def provenance(project: str, place: Workspace) -> dict[str, Any]:
    return {
        "format": finalize.FORMAT,
        "name": project,
        "recipe_sha256": recipe.digest(project, place),
        "variant": KEY.to_provenance(),
        "materials": materials.collect(recipe.render(project, KEY, place), KEY, place),
        "cuda_arch_list": "9.0",
        "glibc": "2.32",
    }


def packed(
    folder: Path, place: Workspace, *, code: str = "x = 1\n", build: str = "", project: str = "mamba-ssm", **said: Any
) -> Path:
    """A package as ours are, of one file; ``said`` replaces parts of what it says of itself."""
    rendered = recipe.render(project, KEY, place)
    content = folder / "content"
    content.mkdir(parents=True)
    (content / "code.py").write_text(code)
    made = assemble_package(
        name=project,
        version=rendered.version,
        target_platform="linux-64",
        build_string=build or rendered.build,
        output_dir=str(folder / "raw"),
        files_dir=str(content),
        depends=["python", "causal-conv1d ==1.7.0"] if project == "mamba-ssm" else ["python"],
    )
    target = folder / Path(made.path).name

    def edit(files: archive.InfoFiles) -> archive.InfoFiles:
        index = {**json.loads(files["info/index.json"]), "timestamp": 0}
        told = archive.dump_json({**provenance(project, place), **said})
        return {**files, "info/index.json": archive.dump_json(index), inspection.PROVENANCE: told}

    archive.repack(Path(made.path), target, edit)
    return target


@pytest.fixture
def package(tmp_path: Path, place: Workspace) -> Path:
    return packed(tmp_path / "given", place)


@dataclass
class Builds:
    """Stands for planning and building: gives ``result`` as the rebuilt package, and remembers what was asked."""

    place: Workspace
    result: Path
    options: list[plan.Options] = field(default_factory=list)
    made: list[tuple[str, ...]] = field(default_factory=list)
    requests: list[BuildRequest] = field(default_factory=list)
    channels: list[Path] = field(default_factory=list)
    jobs: list[int] = field(default_factory=list)
    ccache: list[str | None] = field(default_factory=list)

    def make(self, options: plan.Options, place: Workspace) -> plan.Plan:
        self.options.append(options)
        packages = []
        for name in recipe.PROJECTS:
            found = recipe.render(name, KEY, place)
            request = BuildRequest(found, KEY, ("file:///bridge",))
            packages.append(plan.PlannedPackage("in channel", request))
        return plan.Plan(ROW, "3.12", ARCHS, Path("/nowhere"), ("file:///bridge",), tuple(packages), None, 0, 0, 0, 0)

    def make_packages(self, work: plan.Plan, place: Workspace, log: object) -> None:
        self.made.append(tuple(package.name for package in work.packages))

    def build(self, request: BuildRequest, *, channel: Path, jobs: int, workspace: Workspace, log: object) -> Path:
        self.requests.append(request)
        self.channels.append(channel)
        self.jobs.append(jobs)
        self.ccache.append(os.environ.get("SSM_FORGE_CCACHE"))
        target = channel / "linux-64" / self.result.name
        target.parent.mkdir(parents=True)
        return Path(shutil.copy(self.result, target))


def compilers(**majors: int | None) -> Callable[..., SimpleNamespace]:
    """What each ``--host-compiler`` gives; None where there is none. ``gxx14`` is g++-14, ``gxx`` is g++."""

    def origin(options: plan.Options, place: Workspace) -> SimpleNamespace:
        major = majors.get(options.host_compiler.replace("g++-", "gxx").replace("g++", "gxx"))
        if major is None:
            raise MachineError(f"no {options.host_compiler}.")
        compiler = SimpleNamespace(major=major, origin=options.host_compiler, version=f"{major}.1")
        return SimpleNamespace(parts=SimpleNamespace(compiler=compiler))

    return origin


@pytest.fixture
def rebuild(place: Workspace, package: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    """The rebuilt package is the very same, until a test says otherwise."""
    fake = Builds(place, package)
    monkeypatch.setattr(planning, "make", fake.make)
    monkeypatch.setattr(planning, "origin", compilers(auto=12))
    monkeypatch.setattr(pipeline, "make_packages", fake.make_packages)
    monkeypatch.setattr(builds, "build", fake.build)
    monkeypatch.setattr(build_jobs, "choose_jobs", lambda requested, costs: requested or 2)
    monkeypatch.setattr(command, "workspace", lambda: place)
    return fake


def task(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["run", "reproduce", *map(str, arguments)])
    return cli.run()


def test_the_same_bytes_are_reproduced(
    rebuild: Builds, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert task(monkeypatch, package) == 0
    said = capsys.readouterr()
    digest = subprocess.run(["sha256sum", package], capture_output=True, text=True, check=True).stdout.split()[0]
    assert said.out == f"reproduced: sha256 {digest}\n"
    assert "--no-cache compiles every one anew" in said.err


def test_the_plan_comes_from_what_the_package_says(rebuild: Builds, package: Path, place: Workspace) -> None:
    reproduce.reproduce(package, place, jobs=3)
    options = rebuild.options[0]
    assert (options.variant, options.python, options.cuda_arch) == ("cu130", "3.12", "9.0")
    assert (options.source, options.host_compiler, options.for_this_machine) == ("bridge", "auto", False)
    assert options.prefix is not None
    assert not options.prefix.exists()
    assert rebuild.requests[0].project == "mamba-ssm"
    assert rebuild.requests[0].filename == package.name
    assert rebuild.jobs == [3]


def test_it_is_built_though_the_channel_has_it_and_reaches_no_channel(
    rebuild: Builds, package: Path, place: Workspace
) -> None:
    """The plan says "in channel" of it; what it needs for its tests is made first, and nothing else."""
    reproduce.reproduce(package, place)
    assert rebuild.made == [("causal-conv1d",)]
    assert len(rebuild.requests) == 1
    assert not rebuild.channels[0].is_relative_to(place.channel)
    assert not rebuild.channels[0].exists()
    assert not place.channel.exists()


def test_causal_conv1d_needs_none_of_the_others(rebuild: Builds, place: Workspace, tmp_path: Path) -> None:
    package = packed(tmp_path / "causal", place, project="causal-conv1d")
    rebuild.result = package
    assert reproduce.reproduce(package, place).comparison.same
    assert rebuild.made == [()]


@pytest.mark.parametrize(
    ("before", "cache", "during"), [(None, False, "off"), ("/x", False, "off"), ("/x", True, "/x")]
)
def test_without_the_compile_cache_only_the_rebuild_is_without(
    rebuild: Builds,
    package: Path,
    place: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    before: str | None,
    cache: bool,
    during: str,
) -> None:
    if before is not None:
        monkeypatch.setenv("SSM_FORGE_CCACHE", before)
    reproduce.reproduce(package, place, cache=cache)
    assert rebuild.ccache == [during]
    assert os.environ.get("SSM_FORGE_CCACHE") == before


def test_a_difference_is_shown_and_is_a_failure(
    rebuild: Builds,
    package: Path,
    place: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rebuild.result = packed(tmp_path / "other", place, code="x = 2\n")
    assert task(monkeypatch, package, "--no-cache") == 9
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("not reproduced: sha256 ")
    assert lines[1].startswith("first difference: code.py: 6 bytes")
    assert lines.index("  -x = 1") + 1 == lines.index("  +x = 2")
    assert "  info/paths.json: " in said.out
    assert "its rebuild differs, first in code.py." in said.err
    log = next(place.logs.glob("reproduce-*.log"))
    assert str(log) in said.err
    assert "+x = 2" in log.read_text()


def test_json_says_the_same(
    rebuild: Builds,
    package: Path,
    place: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert task(monkeypatch, package, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reproduced"] is True
    assert told["differences"] == []
    rebuild.result = packed(tmp_path / "other", place, code="x = 2\n")
    assert task(monkeypatch, package, "--json") == 9
    told = json.loads(capsys.readouterr().out)
    assert told["reproduced"] is False
    assert told["sha256"] != told["rebuilt_sha256"]
    assert told["differences"][0]["where"] == "code.py"
    assert "-x = 1" in told["differences"][0]["detail"]


def test_the_rebuilt_package_can_be_kept_and_replaces_nothing(
    rebuild: Builds, package: Path, place: Workspace, tmp_path: Path
) -> None:
    outcome = reproduce.reproduce(package, place, keep=tmp_path / "new/kept")
    assert outcome.kept == tmp_path / "new/kept" / package.name
    assert outcome.kept.read_bytes() == package.read_bytes()
    with pytest.raises(UsageError, match=r"has a file mamba-ssm-.* already"):
        reproduce.reproduce(package, place, keep=package.parent)
    assert len(rebuild.requests) == 1


def test_another_build_string_is_the_first_difference(
    rebuild: Builds, place: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = packed(tmp_path / "older", place, build="cuda130_py312_sm90_h0000000_1")
    outcome = reproduce.reproduce(package, place)
    first = outcome.comparison.differences[0]
    assert first.where == "build string"
    assert package.name in first.what
    assert rebuild.result.name in first.what
    assert "the packages can't be the same" in capsys.readouterr().err


def test_a_renamed_package_is_still_reproduced(rebuild: Builds, package: Path, place: Workspace) -> None:
    renamed = package.rename(package.with_name("mine.conda"))
    rebuild.result = Path(shutil.copy(renamed, package))
    assert reproduce.reproduce(renamed, place).comparison.same


def test_a_foreign_package_is_refused(place: Workspace, tmp_path: Path) -> None:
    foreign = make_package(tmp_path / "channel", "demo", {"a": "b"})
    with pytest.raises(UsageError) as error:
        reproduce.reproduce(foreign, place)
    assert "is not a package that ssm-forge made: it has no info/ssm-forge.json, and it is demo-1.0-h1_0" in str(
        error.value
    )
    assert "causal-conv1d or mamba-ssm" in error.value.fix


@pytest.mark.parametrize(
    "said",
    [
        {"name": "torch"},
        {"variant": None},
        {"variant": {"python": "3.12"}},
        {"variant": {**KEY.to_provenance(), "pytorch": 2}},
        {"materials": "all"},
        {"materials": [{"uri": "x"}]},
    ],
)
def test_metadata_of_another_shape_is_refused(place: Workspace, tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"its info/ssm-forge\.json is for something else"):
        recorded.read(packed(tmp_path / "odd", place, **said))


def test_a_package_of_a_source_tree_is_refused_by_its_tree(place: Workspace, tmp_path: Path) -> None:
    tree = {"origin": "Vim", "commit": "", "sha256": "ab" * 32, "patches": []}
    with pytest.raises(UsageError, match=r"was made from a source tree \(Vim\), which is not kept here"):
        recorded.read(packed(tmp_path, place, tree=tree))


def test_a_damaged_package_is_refused(place: Workspace, package: Path) -> None:
    package.write_bytes(package.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="is not a whole"):
        reproduce.reproduce(package, place)


def refusal(package: Path, place: Workspace) -> IntegrityError:
    forget()
    with pytest.raises(IntegrityError) as error:
        reproduce.reproduce(package, place)
    return error.value


def append(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(("file", "role"), [(PATCH, "patch"), (LOCK, "toolchain lock")])
def test_a_changed_patch_or_lock_is_named_and_nothing_is_built(
    rebuild: Builds, package: Path, place: Workspace, file: str, role: str
) -> None:
    append(place.root / file)
    error = refusal(package, place)
    assert f"{package.name} was not made from what this checkout has" in error.what
    assert f"{file} ({role}) differs (sha256 " in error.what
    assert "recipes/mamba-ssm" not in error.what
    assert "No commit of this checkout has them" in error.fix
    (place.root / file).unlink()
    # A patch that is gone makes the digest another one, too; the recipe itself is not to blame.
    assert f"{file} ({role}) is not here" in refusal(package, place).what
    assert rebuild.requests == []


@pytest.mark.parametrize("file", ["recipes/mamba-ssm/recipe.yaml", "recipes/common/build.sh", "patches/torch/new"])
def test_a_changed_recipe_is_named(rebuild: Builds, package: Path, place: Workspace, file: str) -> None:
    path = place.root / file
    path.write_text((path.read_text() if path.exists() else "") + "\n")
    assert "recipes/mamba-ssm, recipes/common or patches differ (sha256 over them" in refusal(package, place).what


def test_other_projects_may_change(rebuild: Builds, package: Path, place: Workspace) -> None:
    append(place.recipes / "causal-conv1d/recipe.yaml")
    forget()
    assert reproduce.reproduce(package, place).comparison.same


def test_a_changed_row_of_the_matrix_is_named(rebuild: Builds, package: Path, place: Workspace) -> None:
    text = place.variants.read_text()
    place.variants.write_text(
        text.replace(
            'triton: ["2.3", "2.0", "3.1", "3.7", "3.7", "3.6"]', 'triton: ["2.3", "2.0", "3.1", "3.7", "3.7", "3.9"]'
        )
    )
    assert place.variants.read_text() != text
    assert "recipes/variants.yaml: triton is 3.9 here, 3.6 in the package" in refusal(package, place).what
    place.variants.write_text(text.replace("3.10.* *_cpython", "3.10.* *_cpython2").replace('"cu130"]', '"cu131"]'))
    assert "recipes/variants.yaml has no cu130 (bridge) for Python 3.12" in refusal(package, place).what


def test_a_compiler_of_the_machine_is_no_change_of_the_matrix(
    rebuild: Builds, place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "origin", compilers(auto=14))
    key = ROW.key("3.12", ARCHS, compiler="14")
    package = packed(tmp_path / "fourteen", place, variant=key.to_provenance())
    rebuild.result = package
    assert reproduce.reproduce(package, place).comparison.same


def test_an_input_that_only_one_side_lists_is_named(rebuild: Builds, place: Workspace, tmp_path: Path) -> None:
    listed = provenance("mamba-ssm", place)["materials"]
    fewer = packed(tmp_path / "fewer", place, materials=[item for item in listed if item["uri"] != LOCK])
    assert f"{LOCK} is an input here, and none of the package's" in refusal(fewer, place).what
    source = {"uri": "https://example.org/x.tar.gz", "sha256": "0" * 64, "role": "source"}
    more = packed(tmp_path / "more", place, materials=[*listed, source])
    assert "https://example.org/x.tar.gz is an input of the package, and none here" in refusal(more, place).what
    other = [{**item, "sha256": "0" * 64} if item["role"] == "source" else item for item in listed]
    assert " in the package" in refusal(packed(tmp_path / "other", place, materials=other), place).what


def test_files_outside_of_the_checkout_are_no_inputs(rebuild: Builds, place: Workspace, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    item = {"uri": "../secret", "sha256": "0" * 64, "role": "patch"}
    package = packed(tmp_path / "odd", place, materials=[item])
    assert "../secret (patch) is not here" in refusal(package, place).what


def test_another_format_is_refused(rebuild: Builds, place: Workspace, tmp_path: Path) -> None:
    error = refusal(packed(tmp_path / "old", place, format=1), place)
    assert f"is finished in format 1, and this checkout writes format {finalize.FORMAT}" in error.what
    assert "scripts/ssm_forge/build/finalize.py" in error.fix


def git(place: Workspace, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", place.root, *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git on this machine")
def test_the_commit_that_has_the_inputs_is_named_and_restoring_it_helps(
    rebuild: Builds, package: Path, place: Workspace
) -> None:
    (place.root / "pixi.lock").touch()
    git(place, "init", "-q")
    wanted = ""
    for number in range(3):
        if number:
            append(place.root / PATCH)
        git(place, "add", "-A")
        git(place, "commit", "-qm", f"{number}")
        wanted = wanted or git(place, "log", "-1", "--format=%h")
    append(place.root / LOCK)
    fix = refusal(package, place).fix
    assert fix.startswith(f"Commit {wanted} has them: ")
    git(place, "restore", f"--source={wanted}", "recipes", "patches", "pixi.lock")
    assert f"git restore --source={wanted} recipes patches pixi.lock'" in fix
    forget()
    assert reproduce.reproduce(package, place).comparison.same


@pytest.mark.parametrize(
    ("majors", "choice"),
    [
        ({"auto": 14}, "auto"),
        ({"auto": 12, "gxx14": 14, "bridge": 14}, "g++-14"),
        ({"auto": 12, "gxx": 14}, "g++"),
        ({"auto": 12, "gxx": 13, "bridge": 14}, "bridge"),
    ],
)
def test_a_compiler_of_the_recorded_major_is_chosen(
    majors: dict[str, int], choice: str, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "origin", compilers(**majors))
    assert reproduce._with_compiler(plan.Options(), "14", place).host_compiler == choice


def test_without_that_compiler_it_is_refused(
    rebuild: Builds, package: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "origin", compilers(auto=14, bridge=11))
    with pytest.raises(MachineError) as error:
        reproduce.reproduce(package, place)
    assert "compiled with g++ 12, and this machine has none (found: auto 14.1, bridge 11.1)" in error.value.what
    monkeypatch.setattr(planning, "origin", compilers())
    with pytest.raises(MachineError, match="no auto"):
        reproduce.reproduce(package, place)
    assert rebuild.requests == []


def test_packages_from_conda_bring_their_compiler(
    place: Workspace, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "origin", compilers())
    told = recorded.read(package)
    row = variants.load(place.variants).get("cu130", "conda")
    conda = replace(told, key=row.key("3.12", ARCHS))
    assert reproduce._options(conda, Path("/nowhere"), None, place).host_compiler == "auto"


def test_a_package_for_another_platform_is_built_again_for_that(
    tmp_path: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ROW.key("3.12", ARCHS, compiler=KEY.compiler, platform=LINUX_AARCH64)
    told = recorded.read(packed(tmp_path / "given", place, variant=key.to_provenance()))
    assert told.key == key
    assert recorded._other_values(told, place) == []
    monkeypatch.setattr(planning, "origin", compilers(auto=int(key.compiler)))
    assert reproduce._options(told, tmp_path / "prefix", None, place).platform == "linux-aarch64"
