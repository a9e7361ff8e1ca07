"""Programs run inside an environment: activated, isolated from the tools, with honest errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from front_door import assert_one_line_error, run, run_here
from ssm_forge.base.activation import activated_environment


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """An environment with a fake python, and an activation script that sets a variable and prints."""
    root = tmp_path / "an env"
    (root / "conda-meta").mkdir(parents=True)
    (root / "bin").mkdir()
    python = root / "bin/python"
    python.write_text('#!/bin/sh\nprintf "%s|" "$0" "$@"\nexit 7\n')
    python.chmod(0o755)
    script = root / "etc/conda/activate.d/x.sh"
    script.parent.mkdir(parents=True)
    script.write_text("echo noise=1\nexport FORGE_X='a\nb'\n")
    return root


def test_the_environment_comes_first_and_scripts_have_run(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/leak")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/leak")
    monkeypatch.setenv("FORGE_KEEP", "kept")
    found = activated_environment(prefix)
    assert found["PATH"].split(":")[0] == str(prefix / "bin")
    assert found["CONDA_PREFIX"] == str(prefix)
    assert found["FORGE_X"] == "a\nb"
    assert found["FORGE_KEEP"] == "kept"
    assert not {"PYTHONPATH", "LD_LIBRARY_PATH"} & set(found)
    assert str(Path(sys.prefix) / "bin") not in found["PATH"].split(":")


def test_what_a_script_prints_is_not_taken_for_a_variable(prefix: Path) -> None:
    assert not [name for name in activated_environment(prefix) if "noise" in name]


def test_python_gets_its_own_options(prefix: Path) -> None:
    done = run("python", "--prefix", str(prefix), "-c", "print(1)", "--prefix", "x")
    assert done.stdout == f"{prefix}/bin/python|-c|print(1)|--prefix|x|"
    assert done.returncode == 7


def test_shell_runs_a_command_and_passes_its_exit_code(prefix: Path) -> None:
    done = run("shell", "--prefix", str(prefix), "sh", "-c", 'echo "$CONDA_PREFIX"; exit 5')
    assert (done.stdout, done.returncode) == (f"{prefix}\n", 5)


def test_a_command_or_python_that_is_not_there_is_one_line(prefix: Path) -> None:
    done = run("shell", "--prefix", str(prefix), "no-such-program")
    assert_one_line_error(done, 2, "no-such-program could not be started")
    (prefix / "bin/python").unlink()
    assert_one_line_error(run("python", "--prefix", str(prefix)), 2, "bin/python could not be started")


def test_a_folder_that_is_no_environment_is_one_line(tmp_path: Path) -> None:
    assert_one_line_error(run_here("python", "--prefix", str(tmp_path)), 8, "is not a conda environment")
    assert_one_line_error(run_here("shell", "--variant", "cu999"), 8, "envs/cu999", "install-mamba")
