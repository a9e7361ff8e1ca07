"""Libraries that only some tasks need, and that a pixi environment may lack."""

from __future__ import annotations

import importlib.util
import os
import sys

from ssm_forge.base.credentials import environment_outside
from ssm_forge.base.errors import MachineError
from ssm_forge.base.paths import workspace
from ssm_forge.base.ui import say

_OWN_TOOLS = "SSM_FORGE_NO_PIXI"


def require(*modules: str) -> None:
    """Go on when all modules are there; otherwise run this same command again with the tools of ``./run``.

    Not every library of the channel tasks is in the recorded conda repodata that pixi.lock was solved from;
    scripts/requirements.lock has them all, by hash.

    Raises:
        MachineError: when the tools of ``./run`` lack one too.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return
    if os.environ.get(_OWN_TOOLS):
        raise MachineError(
            f"the Python package '{missing[0]}' is missing from {sys.prefix}.",
            fix="Remove .pixi/tools and run the same command again.",
        )
    say(f"This environment has no {', '.join(missing)}: going on with the tools of ./run.")
    environment = {key: value for key, value in environment_outside().items() if key != "PYTHONPATH"}
    run = workspace().root / "run"
    os.execve(run, [str(run), *sys.argv[1:]], {**environment, _OWN_TOOLS: "1"})
