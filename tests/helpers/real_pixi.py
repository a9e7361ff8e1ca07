"""The real pixi, where one is on PATH."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest


def _version(program: str) -> tuple[int, ...]:
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return tuple(int(part) for part in re.findall(r"\d+", answer))


PIXI = shutil.which("pixi")
needs_pixi = pytest.mark.skipif(PIXI is None or _version(PIXI) < (0, 76), reason="needs pixi >= 0.76 on PATH")


def backend() -> Path | None:
    """pixi's program that builds recipes, on PATH or beside pixi."""
    name = "pixi-build-rattler-build"
    beside = Path(PIXI).resolve().with_name(name) if PIXI else Path(name)
    found = shutil.which(name)
    return Path(found) if found else beside if beside.exists() else None
