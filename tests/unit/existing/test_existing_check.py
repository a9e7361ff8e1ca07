"""What is found when the kernels in an environment of wheels are not what was put there, or for another torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fake_environment import add, add_torch, make_venv, site_of
from finished_package import DEPENDS, INFO, conda_package
from ssm_forge.existing import check, install, reader, torch
from ssm_forge.package import wheel
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


def test_a_check_runs_in_the_environment_and_leaves_no_bytecode_there(
    there: reader.Existing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    variables = check.activated(there)
    assert variables["PATH"].split(os.pathsep)[0] == str(there.prefix / "bin")
    assert (variables["VIRTUAL_ENV"], variables["PYTHONDONTWRITEBYTECODE"]) == (str(there.prefix), "1")
    assert not {"PYTHONPATH", "LD_LIBRARY_PATH"} & set(variables)
