"""Runs the real command line, as a user without pixi does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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


def assert_one_line_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The run failed with ``code`` and said why in one line that holds ``words``."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Preparing the tools")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr
    for word in words:
        assert word in lines[0]
