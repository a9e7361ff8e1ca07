"""What is found when the kernels in an environment of wheels are not what was put there, or for another torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fake_environment import add, add_torch, make_venv, site_of, tree
from finished_package import DEPENDS, INFO, conda_package
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import workspace
from ssm_forge.existing import check, install, reader, torch
from ssm_forge.package import wheel
from ssm_forge.verify import gpu
from ssm_forge.verify import installed as verify
from ssm_forge.verify.report import Check


@pytest.fixture
def there(tmp_path: Path) -> reader.Existing:
    """A venv with a torch, and mamba-ssm made for it."""
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    existing = reader.read(env)
    spec = f"pytorch 2.7.* there_cuda126_{torch.read(existing).identity[:8]}_*"
    package = conda_package(tmp_path, depends=[DEPENDS[0], spec, DEPENDS[2]])
    install.put(existing, "mamba-ssm", wheel.from_conda(package, tmp_path))
    return existing


def packages(existing: reader.Existing, *projects: str) -> Check:
    return check._packages(existing, {project: install.installed(existing, project) for project in projects})


def test_what_was_put_there_is_intact(there: reader.Existing) -> None:
    assert packages(there, "mamba-ssm") == Check("packages intact", "pass", "mamba-ssm 2.3.1 cuda124_py311_sm90_h0_2")


def test_a_changed_and_a_missing_file_are_named(there: reader.Existing) -> None:
    (there.site / "mamba_ssm/__init__.py").write_text("changed")
    (there.site / f"{INFO}/WHEEL").unlink()
    found = packages(there, "mamba-ssm")
    assert found.status == "fail"
    assert found.detail == f"changed or missing: {INFO}/WHEEL, mamba_ssm/__init__.py"


def test_a_release_that_somebody_else_has_put_there_is_none_of_ours(there: reader.Existing) -> None:
    add(there.site, "causal-conv1d", "1.5.0")
    found = packages(there, "causal-conv1d", "mamba-ssm")
    assert found.status == "fail"
    assert "causal-conv1d of ours not in" in found.detail
    assert f"install-mamba --prefix {there.prefix}" in found.detail


def test_a_torch_that_was_replaced_since_is_found(there: reader.Existing) -> None:
    found = install.installed(there, "mamba-ssm")
    assert found is not None
    record = wheel.read_origin(found.info)
    assert check._made_for(record, torch.read(there))[0]
    listed = there.site / "torch-2.7.1.dist-info/RECORD"
    listed.write_text(listed.read_text().replace("sha256=x", "sha256=z"))
    good, detail = check._made_for(record, torch.read(there))
    assert not good
    assert "there is torch 2.7.1+cu126" in detail


def test_packages_in_another_folder_are_removed_and_replaced_there_alone(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    add_torch(site_of(env))
    package = conda_package(tmp_path)
    (tmp_path / "wheels").mkdir()
    file = wheel.from_conda(package, tmp_path / "wheels")
    before = tree(env)
    beside = reader.read(env, target=tmp_path / "a new/folder")
    assert install.put(beside, "mamba-ssm", file) == ""
    assert install.put(beside, "mamba-ssm", file) == "2.3.1"
    assert install.is_installed(beside, "mamba-ssm", package.name, sha256_of(package))
    assert packages(beside, "mamba-ssm").status == "pass"
    assert check.activated(beside)["PYTHONPATH"] == str(beside.target)
    assert "PYTHONPATH" not in check.activated(reader.read(env))
    assert check.place(beside).versions == {"mamba-ssm": "2.3.1"}
    found = install.installed(beside, "mamba-ssm")
    assert found is not None
    install.remove(beside, found)
    assert not list((tmp_path / "a new/folder").iterdir())
    assert tree(env) == before


def test_the_proofs_on_a_gpu_run_in_the_environment_and_leave_no_bytecode_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_venv(tmp_path)
    (env / "bin/python").unlink()
    (env / "bin/python").write_text(
        '#!/bin/sh\nwhile [ "$1" != --output ]; do shift; done\n'
        'printf \'{"checks": [], "device": null, "path": "%s", "bytecode": "%s", "environment": "%s"}\' '
        '"$PYTHONPATH" "$PYTHONDONTWRITEBYTECODE" "$VIRTUAL_ENV" > "$2"\n'
    )
    (env / "bin/python").chmod(0o755)
    monkeypatch.setenv("SSM_FORGE_LOG_DIR", str(tmp_path / "logs"))
    told = gpu.kernels(check.place(reader.read(env, target=tmp_path / "beside")), "check", ["--full"])
    assert told["path"].split(os.pathsep) == [str(workspace().root / "scripts"), str(tmp_path / "beside")]
    assert (told["bytecode"], told["environment"]) == ("1", str(env))


def test_what_is_imported_from_a_folder_of_the_environment_is_inside(tmp_path: Path) -> None:
    """A venv sees the system's torch, and a notebook the folder beside it."""
    (tmp_path / "beside/torch").mkdir(parents=True)
    (tmp_path / "beside/torch/__init__.py").touch()
    variables = {"PYTHONPATH": str(tmp_path / "beside")}
    python = Path(sys.executable)
    for folders, status in (([tmp_path / "beside"], "pass"), ([], "fail")):
        found = {check.name: check for check in verify.imports(python, tmp_path, variables, folders)}
        assert (found["import torch"].status, "imported from outside" in found["import torch"].detail) == (
            status,
            status == "fail",
        )


def test_a_check_runs_in_the_environment_and_leaves_no_bytecode_there(
    there: reader.Existing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    variables = check.activated(there)
    assert variables["PATH"].split(os.pathsep)[0] == str(there.prefix / "bin")
    assert (variables["VIRTUAL_ENV"], variables["PYTHONDONTWRITEBYTECODE"]) == (str(there.prefix), "1")
    assert not {"PYTHONPATH", "LD_LIBRARY_PATH"} & set(variables)
