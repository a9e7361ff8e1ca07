"""How a process ends that may have used the engine."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

_ENGINES = frozenset({"rattler", "rattler_build"})


def end(code: int) -> NoReturn:
    """Say what is left to be said, and end the process with ``code``.

    Where the engine was loaded, at once, without the interpreter taking itself down: the engine's threads now and then
    crash that (139, after a success).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not _ENGINES.isdisjoint(sys.modules):
        os._exit(code)
    sys.exit(code)
