"""The real thing, in order: each file installs with the command line a user types.

The caches of this machine are used where they are warm; nothing else is shared with the checkout: channel,
environments and logs are the test run's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# One capability keeps a full build of each CUDA major within CI's time.
ARCH = "9.0"


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


@pytest.fixture(scope="session")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    # Beside the caches, so that environments are hard links and not copies.
    cache = Path(os.environ.get("SSM_FORGE_CACHE_DIR", Path.home() / ".cache/ssm-forge"))
    folder = cache / "test-runs" / f"{os.getpid()}"
    folder.mkdir(parents=True)
    return Forge(folder)


@pytest.fixture(scope="session", autouse=True)
def _clean(forge: Forge) -> Any:
    yield
    import shutil

    shutil.rmtree(forge.folder, ignore_errors=True)


Install = Callable[..., Outcome]


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in report["checks"]}
