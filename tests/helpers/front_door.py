"""Runs the real command line, as a user without pixi does."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from ssm_forge import cli

ROOT = Path(__file__).resolve().parents[2]


def own_environment() -> dict[str, str]:
    """For a Python that imports ``ssm_forge``, however these tests were started."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}


def run(*args: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """``./run ARGS`` with extra environment variables."""
    return subprocess.run(
        [str(ROOT / "run"), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "SSM_FORGE_NO_PIXI": "1", **environment},
        check=False,
    )


def run_here(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same command line without the door, in this process: for what is not about processes, ten times as fast."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["run", *args])
        code = cli.run()
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def assert_one_line_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The run failed with ``code`` and said why in one line that holds ``words``."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Preparing the tools")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr
    for word in words:
        assert word in lines[0]
