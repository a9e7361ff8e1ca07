"""Generated workflows: what they build is the matrix, and who knows their format finds nothing wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import yaml
from click.testing import CliRunner

from real_servers import tool
from ssm_forge.base.errors import UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.commands.ci_matrix import ci_matrix
from ssm_forge.farm import cells, ci
from ssm_forge.manifest import recipe, variants

MATRIX = variants.load(workspace().variants)
_CACHE = platformdirs.user_cache_path("ssm-forge") / "test-servers"
_SCHEMAS = ("check-jsonschema==0.39.0",)
_ACTIONLINT = "github.com/rhysd/actionlint/cmd/actionlint@v1.7.12"


def generated(format_: ci.Format, *words: str) -> str:
    done = CliRunner().invoke(ci_matrix, ["--format", format_, *words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def of_conda() -> list[tuple[str, str]]:
    return [(v.name, python) for v in MATRIX.variants if v.source == "conda" for python in v.pythons]


def test_github_builds_every_row_and_python_that_conda_has() -> None:
    text = yaml.safe_load(generated("github"))
    include = text["jobs"]["build"]["strategy"]["matrix"]["include"]
    assert [(entry["variant"], entry["python"]) for entry in include] == of_conda()
    assert [entry["archs"] for entry in include] == ["8.0;9.0+PTX"] * len(include)


def test_gitlab_builds_the_same() -> None:
    text = yaml.safe_load(generated("gitlab"))
    matrix = text["build"]["parallel"]["matrix"]
    assert [(entry["VARIANT"], entry["PYTHON"]) for entry in matrix] == of_conda()


def test_a_selection_and_capabilities_make_another_matrix(tmp_path: Path) -> None:
    words = ("--select", "variant=cu129 python=3.12", "--cuda-arch", "9.0", "--cuda-arch", "12.0")
    file = tmp_path / "new" / "packages.yml"
    assert generated("github", *words, "--output", str(file)) == ""
    include = yaml.safe_load(file.read_text())["jobs"]["build"]["strategy"]["matrix"]["include"]
    assert [(entry["variant"], entry["python"], entry["archs"]) for entry in include] == [
        ("cu129", "3.12", "9.0"),
        ("cu129", "3.12", "12.0"),
    ]
    assert json.loads(generated("github", *words, "--json"))[1]["tag"] == "sm120"


def test_more_jobs_than_the_service_takes_are_refused() -> None:
    archs = [f"{a};{b}" for a in ("7.0", "7.5", "8.0", "8.6", "8.9", "9.0") for b in ("8.7", "9.0", "10.0", "12.0")]
    wanted = cells.every(MATRIX, recipe.PROJECTS, [*archs, *(f"{one}+PTX" for one in archs)])
    with pytest.raises(UsageError, match="a matrix on gitlab has at most 200"):
        ci.entries(wanted, "gitlab")


@pytest.mark.parametrize("format_", ci.FORMATS)
def test_what_is_published_is_signed_on_a_tag_alone(format_: ci.Format) -> None:
    text: dict[str, Any] = yaml.safe_load(generated(format_))
    if format_ == "github":
        publish = text["jobs"]["publish"]
        assert publish["if"] == "startsWith(github.ref, 'refs/tags/')"
        assert publish["permissions"]["id-token"] == "write"
        assert text["permissions"] == {"contents": "read"}, "builds may not sign or write"
        assert "id-token" not in str(text["jobs"]["build"])
    else:
        publish = text["publish"]
        assert publish["rules"] == [{"if": "$CI_COMMIT_TAG"}]
        assert "id_tokens" not in text["build"]
    assert "--attestation" in str(publish)


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "schema"), [("github", "github-workflows"), ("gitlab", "gitlab-ci")])
def test_the_published_schema_holds(format_: ci.Format, schema: str, tmp_path: Path) -> None:
    file = tmp_path / "workflow.yml"
    file.write_text(generated(format_))
    transform = ["--data-transform", "gitlab-ci"] if format_ == "gitlab" else []
    command = [tool("check-jsonschema", *_SCHEMAS), "--builtin-schema", f"vendor.{schema}", *transform, file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    file.write_text(
        file.read_text().replace("timeout-minutes:", "minutes-to-time-out:").replace("parallel:", "paralel:")
    )
    broken = subprocess.run(command, capture_output=True, text=True, check=False)
    assert broken.returncode != 0, "the schema finds what is wrong"


@pytest.mark.slow
@pytest.mark.nightly
def test_actionlint_finds_nothing(tmp_path: Path) -> None:
    file = tmp_path / "workflow.yml"
    file.write_text(generated("github"))
    command = [_actionlint(), file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    file.write_text(file.read_text().replace("matrix.variant", "matrix.variants"))
    broken = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 'property "variants" is not defined' in broken.stdout


def _actionlint() -> Path:
    """The real one, built by Go from its module once; its package on PyPI is a download from elsewhere."""
    folder = _CACHE / f"actionlint-{_ACTIONLINT.rpartition('@')[2]}"
    if not (folder / "actionlint").exists():
        go = shutil.which("go")
        if go is None:
            pytest.skip("not run: actionlint can't be installed, because there is no Go")
        environment = {**os.environ, "GOBIN": str(folder), "GOFLAGS": "-modcacherw"}
        done = subprocess.run(
            [go, "install", _ACTIONLINT], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"not run: actionlint could not be installed ({done.stderr.strip().splitlines()[-1]})")
    return folder / "actionlint"
