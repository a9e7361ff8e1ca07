"""The real pixi, where one is on PATH."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest


def _version(program: str) -> tuple[int, ...]:
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return tuple(int(part) for part in re.findall(r"\d+", answer))


PIXI = shutil.which("pixi")
needs_pixi = pytest.mark.skipif(PIXI is None or _version(PIXI) < (0, 76), reason="needs pixi >= 0.76 on PATH")
