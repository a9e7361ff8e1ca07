"""The whole job in a real venv, from packages that were built before: what is put there, and what stays as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from rattler_build import assemble_package

from fake_environment import add, add_needs, add_torch
from ssm_forge.base import platforms
from ssm_forge.base.errors import InstallError, MachineError, VerifyError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.build import finalize
from ssm_forge.existing import check, in_use, job, plan, reader
from ssm_forge.flow.plan import Options, PlannedPackage
from ssm_forge.manifest import recipe
from ssm_forge.manifest.recipe import EXTENSIONS
from ssm_forge.package.write import dump_json, rewrite_info
from ssm_forge.verify.installed import Check, Report

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"lib/python{PYTHON}/site-packages"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace of its own, whose checks all pass."""
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SSM_FORGE_CHANNEL", str(tmp_path / "channel"))
    monkeypatch.setenv("SSM_FORGE_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setattr(check, "run", lambda there: Report(there.prefix, (Check("all", "pass", ""),)))
    return workspace()


@pytest.fixture
def env(tmp_path: Path) -> Path:
    """A venv with a torch and what the kernels import beside it."""
    folder = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    add_torch(folder / SITE)
    add_needs(folder / SITE)
    add(folder / SITE, "other", "1.0", files={"other.py": "x = 1\n"})
    return folder


def options(env: Path) -> Options:
    return Options(prefix=env, cuda_arch="9.0")


def planned(env: Path, place: Workspace, target: Path | None = None) -> plan.Work:
    try:
        return plan.make(reader.read(env, target=target), options(env), plan.Wishes({}), place)
    except MachineError as error:
        pytest.skip(f"this machine can't plan a build: {error}")


def build(package: PlannedPackage, place: Workspace, folder: Path) -> None:
    """Put into the channel what a build would have made."""
    module, extension = package.name.replace("-", "_"), EXTENSIONS[package.name]
    info = f"{SITE}/{module}-{package.version}.dist-info"
    contents = {
        f"{SITE}/{module}/__init__.py": f"__version__ = {package.version!r}\n",
        f"{SITE}/{extension}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {module}\nVersion: {package.version}\n\n",
    }
    for name, text in contents.items():
        path = folder / package.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    tag = PYTHON.replace(".", "")
    made = assemble_package(
        name=package.name,
        version=package.version,
        target_platform="linux-64",
        build_string=package.build,
        output_dir=str(folder / "raw"),
        files_dir=str(folder / package.name),
        depends=[f"python_abi {PYTHON}.* *_cp{tag}", "pytorch 2.7.* x_*", "__glibc >=2.17,<3.0.a0"],
        detect_prefix=False,
    )
    told = {"format": finalize.FORMAT, "recipe_sha256": recipe.digest(package.name, place)}
    target = place.channel / platforms.here().subdir / package.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    rewrite_info(Path(made.path), target, lambda files: {**files, finalize.PROVENANCE: dump_json(told)})


def hashes(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file() or path.is_symlink())
    return {str(path.relative_to(root)): _hash(path) for path in files}


def _hash(path: Path) -> str:
    return str(path.readlink()) if path.is_symlink() else sha256(path.read_bytes()).hexdigest()


def install(env: Path, target: Path | None = None) -> None:
    existing = reader.read(env, target=target)
    job.install_mamba(existing, options(env), plan.Wishes({}), dry_run=False, as_json=False)


def imported(env: Path, **variables: str) -> str:
    code = "import torch, selective_scan_cuda, causal_conv1d_cuda, mamba_ssm; print(mamba_ssm.__file__)"
    done = subprocess.run(
        [env / "bin/python", "-B", "-c", code], capture_output=True, text=True, check=True, env=variables
    )
    return done.stdout.strip()


def test_both_packages_are_put_there_nothing_else_changes_and_again_there_is_nothing_to_do(
    env: Path, place: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in planned(env, place).plan.packages:
        build(package, place, tmp_path / "built")
    before = hashes(env)
    install(env)
    after = hashes(env)
    assert {path: after.get(path) for path in before} == before
    added = {Path(path).relative_to(SITE).parts[0] for path in set(after) - set(before)}
    assert {name.split("-")[0] for name in added} == {
        *("causal_conv1d", "mamba_ssm", "causal_conv1d_cuda.py", "selective_scan_cuda.py")
    }
    assert imported(env) == str(env / SITE / "mamba_ssm/__init__.py")
    assert "Done in" in capsys.readouterr().err
    logs = sorted(path.name for path in place.logs.iterdir())
    install(env)
    assert "Nothing to do" in capsys.readouterr().err
    assert hashes(env) == after
    assert sorted(path.name for path in place.logs.iterdir()) == logs


def test_beside_an_environment_nothing_of_it_changes(env: Path, place: Workspace, tmp_path: Path) -> None:
    target = tmp_path / "a folder/beside"
    for package in planned(env, place, target).plan.packages:
        build(package, place, tmp_path / "built")
    before = hashes(env)
    install(env, target)
    assert hashes(env) == before
    assert imported(env, PYTHONPATH=str(target)) == str(target / "mamba_ssm/__init__.py")


def test_an_environment_that_somebody_began_to_use_meanwhile_is_left_alone(
    env: Path, place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in planned(env, place).plan.packages:
        build(package, place, tmp_path / "built")
    before = hashes(env)
    asked = []

    def begins(*told: object) -> None:
        asked.append(told)
        if len(asked) == 2:
            raise InstallError("in use")

    monkeypatch.setattr(in_use, "require_idle", begins)
    with pytest.raises(InstallError, match="in use"):
        install(env)
    assert hashes(env) == before


def test_a_check_that_fails_is_an_error_that_names_the_environment(
    env: Path, place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in planned(env, place).plan.packages:
        build(package, place, tmp_path / "built")
    monkeypatch.setattr(check, "run", lambda there: Report(there.prefix, (Check("all", "fail", "broken"),)))
    with pytest.raises(VerifyError, match="has the kernels now, but 1 check failed") as refused:
        install(env)
    assert f"verify --prefix {env}" in refused.value.fix


def test_a_dry_run_says_what_and_why_and_does_nothing(
    env: Path, place: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(env, place)
    before = hashes(env)
    wishes = plan.Wishes({"mamba-ssm": "2.3.1"})
    job.install_mamba(reader.read(env), options(env), wishes, dry_run=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["torch"], told["kind"], told["target"]) == ("2.7.1+cu126", "venv", None)
    assert [package["state"] for package in told["packages"]] == ["to build", "to build"]
    assert hashes(env) == before
    assert not place.logs.exists()
