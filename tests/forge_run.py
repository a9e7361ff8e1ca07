"""Runs ``./run`` as a user types it, with a channel and environments of the test run's own."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# One capability keeps a full build of each CUDA major within CI's time.
ARCH = "9.0"

# Each package from the compile cache in another order, and the one that takes less time without it.
REBUILDS = (
    ("causal-conv1d", ("--jobs", "1")),
    ("mamba-ssm", ("--jobs", "1")),
    ("causal-conv1d", ("--no-cache",)),
)


@dataclass(frozen=True)
class Outcome:
    """One finished command."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@dataclass(frozen=True)
class Forge:
    """Runs ``./run`` with a channel and environments of its own."""

    folder: Path

    @property
    def channel(self) -> Path:
        return self.folder / "channel"

    @property
    def environment(self) -> dict[str, str]:
        own = {"SSM_FORGE_NO_PIXI": "1", "SSM_FORGE_CHANNEL": str(self.channel), "COLUMNS": "200"}
        return {**os.environ, **own}

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [ROOT / "run", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            start_new_session=True,
        )

    def __call__(self, *args: str, timeout: float = 3000) -> Outcome:
        started = time.monotonic()
        done = subprocess.run(
            [ROOT / "run", *args],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=timeout,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    def reproduces(self, project: str, *options: str) -> None:
        """The channel's one package of the project comes out again byte for byte."""
        (package,) = self.channel.glob(f"linux-64/{project}-*.conda")
        done = self("reproduce", str(package), *options, "--json")
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert done.json["reproduced"]


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in report["checks"]}
