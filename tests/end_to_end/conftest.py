"""The real thing, in order: each file installs with the command line a user types.

The caches of this machine are used where they are warm; nothing else is shared with the checkout: channel and
environments are the test run's own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from forge_run import Forge
from ssm_forge.paths import workspace


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    """A channel and a folder for environments; each file's own, for what is in the channel is part of its tests."""
    # Beside the caches, so that environments are hard links and not copies.
    folder = workspace().cache / "test-runs" / f"{os.getpid()}"
    folder.mkdir(parents=True)
    yield Forge(folder)
    shutil.rmtree(folder, ignore_errors=True)
