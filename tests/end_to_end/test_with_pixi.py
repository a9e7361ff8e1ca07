"""What most users do: a fresh clone, pixi, no driver, packages from conda's channels (here from their stand-ins)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import real_pixi
from conda_channel import holds
from forge_run import ROWS, Forge, Outcome, all_pass_but_the_gpu, fresh_forge, without_channel
from real_pixi import needs_pixi
from ssm_forge.base.files import sha256_of
from ssm_forge.install import pixi, registry
from ssm_forge.solve import lock

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(3600), needs_pixi]

ROW = ROWS["cu130-conda"]


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """A machine with pixi and the stand-ins, on which nothing was built yet."""
    with fresh_forge(ROW, tmp_path_factory.mktemp("logs"), pixi=True) as made:
        yield made


@pytest.fixture(scope="module")
def first(forge: Forge) -> Outcome:
    """The one command, for a named GPU: the own engine builds for it, with the compilers that recipes/pixi.lock has."""
    done = forge.command("pixi", "run", "install-mamba", "--cuda-arch", ROW.arch, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_for_a_named_gpu_it_ends_in_verified_kernels_beside_pixis_environments(first: Outcome, forge: Forge) -> None:
    assert first.json["source"] == "conda"
    all_pass_but_the_gpu(first.json["verify"])
    prefix = forge.workspace.envs / f"{ROW.variant}-kernels"
    assert first.json["prefix"] == str(prefix)
    assert not pixi.made(prefix)
    assert holds(prefix, lock.environment(forge.workspace.lock, ROW.variant).records)
    # What pixi makes is what its lock says.
    driver = ("env", "CONDA_OVERRIDE_CUDA=13.0")
    made = forge.command(*driver, "pixi", "install", "--locked", "-e", ROW.variant)
    assert made.returncode == 0, made.stderr
    assert pixi.made(forge.workspace.envs / ROW.variant)
    assert registry.installed_prefixes(forge.workspace) == [prefix]
    shutil.rmtree(forge.workspace.envs / ROW.variant)


def test_its_lock_is_ours(first: Outcome, forge: Forge) -> None:
    ours = forge.workspace.lock.read_bytes()
    forge.workspace.lock.unlink()
    locked = forge.command("pixi", "lock")
    assert locked.returncode == 0, locked.stderr
    assert forge.workspace.lock.read_bytes() == ours
    # pixi names platforms that ask for something by their place in the manifest.
    assert b"name: p" in ours
    assert forge("lock", "--check").returncode == 0


def test_tasks_and_the_check_of_the_locks_need_no_build_backend(first: Outcome, forge: Forge) -> None:
    without = ("env", "--unset", "PIXI_BUILD_BACKEND_OVERRIDE")
    shown = forge.command(*without, "pixi", "run", "variants")
    assert shown.returncode == 0, shown.stderr
    assert ROW.variant in shown.stdout
    checked = forge.command(*without, str(forge.root / "run"), "lock", "--check")
    assert checked.returncode == 0, checked.stderr
    assert f"recipes/{ROW.variant}: agrees" in checked.stdout


def test_a_script_with_a_quote_in_its_name_runs_where_the_user_stands(
    first: Outcome, forge: Forge, tmp_path: Path
) -> None:
    (tmp_path / "it's.py").write_text("import torch, selective_scan_cuda, mamba_ssm; print(mamba_ssm.Mamba)\n")
    done = forge.command(str(forge.root / "run"), "python", "it's.py", folder=tmp_path)
    assert done.stdout.strip() == "<class 'mamba_ssm.modules.mamba_simple.Mamba'>", done.stderr


def test_again_there_is_nothing_to_do(first: Outcome, forge: Forge) -> None:
    done = forge.command("pixi", "run", "install-mamba", "--cuda-arch", ROW.arch)
    assert done.returncode == 0, done.stderr
    assert "Nothing to do" in done.stderr


@pytest.mark.skipif(real_pixi.backend() is None, reason="needs pixi's build backend on PATH or beside pixi")
def test_pixi_itself_builds_the_same_packages_and_keeps_them(first: Outcome, forge: Forge) -> None:
    """The one command of the README, with nothing named: the lock in recipes/ has the kernels and their compilers."""
    ours = {path.name: sha256_of(path) for path in forge.channel.glob("linux-64/*.conda")}
    assert len(ours) == 2
    aside = forge.channel.rename(forge.folder / "built-by-us")
    done = forge.command("pixi", "run", "install-mamba", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    all_pass_but_the_gpu(done.json["verify"])
    prefix = forge.workspace.source_envs / ROW.variant
    assert done.json["prefix"] == str(prefix)
    assert {path.name: sha256_of(path) for path in forge.channel.glob("linux-64/*.conda")} == ours
    # Nothing is built again, and what pixi does to its environment takes nothing out.
    before = {path: path.stat().st_mtime_ns for path in prefix.glob("conda-meta/*.json")}
    driver = ("env", "CONDA_OVERRIDE_CUDA=13.0")
    again = forge.command(*driver, "pixi", "install", "--locked", "-e", ROW.variant, folder=forge.root / "recipes")
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in prefix.glob("conda-meta/*.json")} == before
    code = "import torch, selective_scan_cuda, causal_conv1d_cuda"
    shown = forge.command(str(forge.root / "run"), "python", "--prefix", str(prefix), "-c", code)
    assert shown.returncode == 0, shown.stderr
    shutil.rmtree(aside)


@pytest.mark.parametrize("door", ["pixi", "without pixi"])
def test_a_clone_with_the_caches_ends_in_the_same_verified_kernels_without_a_network(
    door: str, first: Outcome, forge: Forge
) -> None:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow a network namespace")
    root = forge.folder / door.replace(" ", "-")
    ignore = without_channel(forge.root, shutil.ignore_patterns("envs", "logs", "bld", "artifacts-v0"))
    shutil.copytree(forge.root, root, ignore=ignore, symlinks=True)
    settings = []
    if door == "without pixi":
        settings = ["SSM_FORGE_NO_PIXI=1"]
        # The packages that pixi has downloaded, where ./run looks for them.
        own = forge.workspace.cache / "ssm-forge/rattler"
        if not own.exists():
            own.symlink_to(next(forge.workspace.cache.glob("*/**/pkgs")).parent)
    words = ["unshare", "-rn", "env", *settings, str(root / "run"), "install-mamba", "--json"]
    done = forge.command(*words, folder=root)
    assert done.returncode == 0, done.stderr[-3000:]
    said = " ".join(done.stderr.split())
    assert "No conda channel can be reached: the caches have everything that the locks name." in said
    all_pass_but_the_gpu(done.json["verify"])
    made = {path.name: sha256_of(path) for path in root.glob("channel/linux-64/*.conda")}
    assert made == {path.name: sha256_of(path) for path in forge.channel.glob("linux-64/*.conda")}
    assert len(made) == 2
    shutil.rmtree(root)
