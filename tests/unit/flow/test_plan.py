"""Plans: where packages come from, what counts as installed, what is refused before anything is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from front_door import assert_one_line_error, run, run_here
from ssm_forge.base import machine, platforms
from ssm_forge.base.arch import ArchList, Capability
from ssm_forge.base.errors import NetworkError, UsageError, VerifyError
from ssm_forge.base.machine import Gpu
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.build import offline, origin
from ssm_forge.commands import env
from ssm_forge.flow import needs, plan, planning
from ssm_forge.install.prefix import Installed, write_marker
from ssm_forge.manifest import variants
from ssm_forge.manifest.variants import Matrix, Variant

FILENAME = "mamba-ssm-2.3-cuda130_0.conda"


def matrix(*rows: tuple[str, variants.Source]) -> Matrix:
    pythons = {"python_min": "3.12", "python_max": "3.12"}
    return Matrix(tuple(Variant(name, source, pythons, {}, {"3.12": "3.12.* *_cpython"}) for name, source in rows))


BOTH = matrix(("cu130", "conda"), ("cu130", "bridge"), ("cu129", "conda"), ("cu124", "bridge"))


@pytest.mark.parametrize(
    ("variant", "asked", "reachable", "source"),
    [
        ("cu130", "auto", True, "conda"),
        ("cu130", "auto", False, "bridge"),
        ("cu130", "bridge", True, "bridge"),
        ("cu130", "conda", False, "conda"),
        ("cu124", "auto", True, "bridge"),
    ],
)
def test_conda_channels_where_they_answer_else_the_bridge(
    variant: str, asked: str, reachable: bool, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "conda_reachable", lambda: reachable)
    monkeypatch.setattr(offline, "has_all", lambda *_: False)
    chosen = origin.choose_source(variant, asked, BOTH, None, workspace())  # type: ignore[arg-type]
    assert chosen == source


def test_without_a_channel_the_caches_do_where_they_have_what_the_locks_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(origin, "conda_reachable", lambda: False)
    asked: list[str] = []
    monkeypatch.setattr(offline, "has_all", lambda row, python, place: not asked.append(python))
    matrix = variants.load(workspace().variants)
    assert origin.choose_source("cu118", "auto", matrix, None, workspace()) == "conda"
    assert asked == ["3.10"]
    assert "the caches have everything that the locks name" in " ".join(capsys.readouterr().err.split())


def test_falling_back_to_the_bridge_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(origin, "conda_reachable", lambda: False)
    monkeypatch.setattr(offline, "has_all", lambda *_: False)
    origin.choose_source("cu130", "auto", BOTH, None, workspace())
    said = capsys.readouterr().err
    assert said.startswith("No conda channel can be reached: using the bridge")
    assert said.count("\n") == 1


def test_a_variant_that_only_conda_has_needs_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "conda_reachable", lambda: False)
    monkeypatch.setattr(offline, "has_all", lambda *_: False)
    with pytest.raises(NetworkError, match="cu129 comes from conda channels, and none can be reached"):
        origin.choose_source("cu129", "auto", BOTH, None, workspace())


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    root = tmp_path / "prefix"
    (root / "conda-meta").mkdir(parents=True)
    (root / "file.txt").touch()
    told = {"name": "mamba-ssm", "version": "2.3", "build": "cuda130_0", "sha256": "a" * 64}
    record = {**told, "paths_data": {"paths": [{"_path": "file.txt"}]}}
    (root / "conda-meta/mamba-ssm-2.3-cuda130_0.json").write_text(json.dumps(record))
    write_marker(root, Installed("cu130", "3.12", "bridge", (FILENAME,), created=True))
    return root


def test_a_package_is_installed_when_its_files_are_there(prefix: Path) -> None:
    assert planning._is_installed(FILENAME, "a" * 64, prefix)
    (prefix / "file.txt").unlink()
    assert not planning._is_installed(FILENAME, "a" * 64, prefix)


def test_a_package_built_anew_under_its_name_is_not_installed(prefix: Path) -> None:
    assert not planning._is_installed(FILENAME, "b" * 64, prefix)


def test_without_marker_or_record_nothing_is_installed(prefix: Path, tmp_path: Path) -> None:
    assert not planning._is_installed("mamba-ssm-2.3-other_0.conda", "a" * 64, prefix)
    assert not planning._is_installed(FILENAME, "a" * 64, tmp_path)
    (prefix / "conda-meta/mamba-ssm-2.3-cuda130_0.json").unlink()
    assert not planning._is_installed(FILENAME, "a" * 64, prefix)


def test_a_cache_with_a_space_in_its_path_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    arguments = ("install-mamba", "--dry-run", "--source", "conda", "--prefix", str(tmp_path / "prefix"))
    cache = tmp_path / "a cache"
    done = run(*arguments, SSM_FORGE_CACHE_DIR=str(cache), SSM_FORGE_CHANNEL=str(tmp_path / "channel"))
    assert_one_line_error(done, 3, f"'{cache}' has a space", "Set SSM_FORGE_CACHE_DIR")


def test_the_default_prefix_is_the_variants_and_other_pythons_do_not_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIXI_EXE", raising=False)
    place = workspace()
    found = {v: planning.default_prefix(v, "3.10", place).name for v in ("cu118", "cu124", "cu130")}
    assert found == {"cu118": "cu118", "cu124": "cu124-py310", "cu130": "cu130-py310"}
    assert planning.default_prefix("cu118", "3.11", place) == place.envs / "cu118-py311"
    assert planning.default_prefix("cu130", "3.12", place) == place.envs / "cu130"


def test_upstreams_kernels_are_installed_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIXI_EXE", raising=False)
    place = workspace()
    assert planning.default_prefix("cu130", "3.12", place, "upstream") == place.envs / "cu130-upstream"
    assert planning.default_prefix("cu130", "3.11", place, "upstream") == place.envs / "cu130-py311-upstream"


def test_beside_pixis_environments_and_never_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(workspace().manifest, tmp_path)
    place = Workspace(tmp_path, tmp_path)
    monkeypatch.setenv("PIXI_EXE", "/somewhere/pixi")
    assert planning.default_prefix("cu130", "3.12", place) == place.envs / "cu130-kernels"
    # So where another lock than the root's is made an environment of.
    assert env._usual("cu130", None, place) == place.envs / "cu130"
    assert env._usual("cu130", place.source_lock, place) == place.envs / "cu130-kernels"
    # Those that pixi.toml does not have are ours.
    assert planning.default_prefix("cu130", "3.13", place) == place.envs / "cu130-py313"
    assert planning.default_prefix("cu124", "3.12", place) == place.envs / "cu124"
    # One that pixi made is left alone without pixi, too.
    monkeypatch.delenv("PIXI_EXE")
    (place.envs / "cu118/conda-meta").mkdir(parents=True)
    (place.envs / "cu118/conda-meta/pixi").touch()
    assert planning.default_prefix("cu118", "3.10", place) == place.envs / "cu118-kernels"
    assert planning.default_prefix("cu130", "3.12", place) == place.envs / "cu130"


def conda_row(variant: str) -> Variant:
    return variants.load(workspace().variants).get(variant, "conda")


def test_the_lock_is_used_for_the_python_that_it_was_solved_for() -> None:
    for variant, python in (("cu118", "3.10"), ("cu130", "3.12")):
        found = planning.locked_environment(conda_row(variant), python, workspace())
        assert found is not None
        assert found.name == variant
    assert planning.locked_environment(conda_row("cu130"), "3.13", workspace()) is None
    bridge = variants.load(workspace().variants).get("cu130", "bridge")
    assert planning.locked_environment(bridge, "3.12", workspace()) is None


def test_a_lock_that_does_not_fit_names_the_environment_and_the_command(tmp_path: Path) -> None:
    place = workspace()
    shutil.copy(place.lock, tmp_path)
    text = place.manifest.read_text()
    (tmp_path / "pixi.toml").write_text(text.replace('cuda-nvcc = "13.0.*"', 'cuda-nvcc = "13.1.*"'))
    with pytest.raises(VerifyError) as error:
        planning.locked_environment(conda_row("cu130"), "3.12", Workspace(tmp_path, tmp_path))
    assert "pixi.lock does not fit pixi.toml: environment cu130: cuda-nvcc: " in error.value.what
    assert "run lock'" in error.value.fix


def test_the_name_in_a_file_name() -> None:
    assert planning.read_name(Path(FILENAME)) == "mamba-ssm"


def dry_run(tmp_path: Path, *args: str) -> dict[str, object]:
    done = run_here(
        "install-mamba",
        "--dry-run",
        "--json",
        "--source",
        "bridge",
        "--prefix",
        str(tmp_path / "prefix"),
        *args,
        SSM_FORGE_CACHE_DIR=str(tmp_path / "cache"),
        SSM_FORGE_CHANNEL=str(tmp_path / "channel"),
    )
    if done.returncode == 3:
        pytest.skip(f"this machine can't plan a build: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_dry_run_prints_the_plan_and_does_nothing(tmp_path: Path) -> None:
    if machine.gpus():
        pytest.skip("this machine's GPU decides the default")
    found = dry_run(tmp_path)
    assert found["cuda_arch"] == "8.0;9.0+PTX"
    assert [package["state"] for package in found["packages"]] == ["to build", "to build"]  # type: ignore[attr-defined]
    assert found["download_bytes"] > 500_000_000  # type: ignore[operator]
    assert found["disk_bytes"] > found["download_bytes"]  # type: ignore[operator]
    assert found["memory_bytes"] > 1_000_000_000  # type: ignore[operator]
    assert not list(tmp_path.rglob("*.conda"))
    assert not (tmp_path / "prefix").exists()


def test_architectures_and_jobs_reach_the_plan(tmp_path: Path) -> None:
    if machine.gpus():
        pytest.skip("this machine's GPU may refuse these architectures")
    found = dry_run(tmp_path, "--cuda-arch", "families", "--jobs", "1")
    assert found["cuda_arch"] == "7.5;8.0;9.0;10.0;11.0;12.0"
    assert found["jobs"] == 1
    assert found["kernels"] == "forge"


def test_upstreams_kernels_are_planned_under_their_name(tmp_path: Path) -> None:
    found = dry_run(tmp_path, "--cuda-arch", "9.0", "--kernels", "upstream", "--jobs", "1")
    assert found["kernels"] == "upstream"
    packages: list[dict[str, str]] = found["packages"]  # type: ignore[assignment]
    assert all(package["build"].startswith("upstream_cuda") for package in packages)
    # The backward is one file of theirs, which takes more than any of ours.
    assert found["memory_bytes"] > 4_000_000_000  # type: ignore[operator]


def test_kernels_that_there_are_not_and_those_of_a_source_tree_are_refused(tmp_path: Path) -> None:
    wrong = run_here("build", "--kernels", "theirs")
    assert_one_line_error(wrong, 2, "'theirs' is not one of 'forge', 'upstream'", "build --help")
    for task in ("build", "install-mamba"):
        done = run_here(task, "--kernels", "upstream", "--source-tree", str(tmp_path))
        assert_one_line_error(done, 2, "--kernels upstream is about the patches", "Leave --kernels out")


def planned(archs: str) -> plan.Plan:
    row = matrix(("cu130", "bridge")).variants[0]
    return plan.Plan(row, "3.12", ArchList.parse(archs), Path("/p"), (), (), None, 1, 0, 0, 0)


def test_waiting_for_the_jit_is_told_before_it_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (Gpu("RTX 6000", Capability(12, 0), "580"),))
    assert "RTX 6000 (12.0) has no machine code in 8.0;9.0+PTX" in needs.jit_note(planned("8.0;9.0+PTX"))
    assert needs.jit_note(planned("12.0")) == ""
    monkeypatch.setattr(machine, "gpus", lambda: ())
    assert "native on 8.x, 9.x" in needs.jit_note(planned("8.0;9.0+PTX"))
    assert needs.jit_note(planned("9.0")) == ""


def chosen(requested: str | None, gpus: tuple[Gpu, ...], instead: str | None) -> str:
    row = variants.load(workspace().variants).get("cu130", "bridge")
    return str(needs.choose_archs(row, requested, gpus, require=lambda archs: None, instead=instead))


def test_a_gpu_that_can_not_run_the_kernels_is_refused_unless_they_are_for_another_machine() -> None:
    hopper = Gpu("H100", Capability(9, 0), "580")
    assert chosen("9.0", (hopper,), "x") == "9.0"
    assert chosen("8.0+PTX", (hopper,), "x") == "8.0+PTX", "its driver compiles the PTX"
    assert chosen("8.0", (hopper,), None) == "8.0", "it is not for this machine"
    with pytest.raises(UsageError, match=r"H100 \(9\.0\) can't run kernels made for 8\.0\.") as error:
        chosen("8.0", (hopper,), "Use --cuda-arch native.")
    assert error.value.fix == "Use --cuda-arch native."


def test_what_the_toolkit_lacks_is_said_before_what_the_gpu_lacks() -> None:
    def lacks(archs: ArchList) -> None:
        raise UsageError(f"no nvcc makes {archs}.")

    row = variants.load(workspace().variants).get("cu130", "bridge")
    gpu = Gpu("H100", Capability(9, 0), "580")
    with pytest.raises(UsageError, match=r"no nvcc makes 8\.0"):
        needs.choose_archs(row, "8.0", (gpu,), require=lacks, instead="x")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--platform", "linux-arm64"), "no platform 'linux-arm64' here; there are linux-64 and linux-aarch64"),
        (("--variant", "cu118"), "is made for linux-64, not for linux-aarch64"),
        (("--source", "conda"), "variant cu130 (conda) is made for linux-64, not for linux-aarch64"),
        (("--solve-only",), "variant cu130 (conda) is made for linux-64, not for linux-aarch64"),
        (("--source-tree", "."), "what --source-tree names is built for this machine's platform, linux-64"),
    ],
)
def test_what_there_is_not_for_a_platform_is_refused_at_once(words: tuple[str, ...], told: str) -> None:
    if platforms.known_here() != platforms.LINUX_64:
        pytest.skip("this machine is not x86-64, and there is nothing to refuse")
    asked = words if words[0] == "--platform" else ("--platform", "linux-aarch64", *words)
    assert_one_line_error(run_here("build", *asked), UsageError.exit_code, told)


@pytest.mark.parametrize(("machine", "asked"), [(62, "linux-aarch64"), (183, "linux-64")])
def test_an_environment_of_another_platform_is_refused_with_both(tmp_path: Path, machine: int, asked: str) -> None:
    (tmp_path / "bin").mkdir()
    header = b"\x7fELF\x02\x01" + bytes(12) + machine.to_bytes(2, "little") + bytes(44)
    (tmp_path / "bin/python").write_bytes(header)
    found = {62: "linux-64", 183: "linux-aarch64"}[machine]
    with pytest.raises(UsageError, match=rf"is an environment for {found}, and the packages are for {asked}\."):
        planning.check_platform_of(tmp_path, platforms.of(asked))
    planning.check_platform_of(tmp_path, platforms.of(found))
    planning.check_platform_of(tmp_path / "new", platforms.of(asked))
