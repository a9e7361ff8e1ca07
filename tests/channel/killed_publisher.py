"""Publishes in forked children and kills each at a random moment: ``killed_publisher.py URL FOLDER TIMES SEED``.

A process of its own that never calls the engine itself, so that forking it is safe and starting a child is quick.
Prints one line a child: how long it ran, and whether it was killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

# Imported here, once, not in each child.
import rattler.index  # noqa: F401

from ssm_forge.publish import publish


def main(url: str, folder: Path, times: int, seed: int) -> None:
    packages = sorted(folder.glob("*.conda"))
    chance = random.Random(seed)
    longest = 0.5
    for number in range(times):
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            publish(packages[: number + 1], url)
            os._exit(0)
        # Some live to the end, so that the last steps are hit too.
        deadline = started + chance.uniform(0, longest * 1.3)
        ended = 0
        while time.monotonic() < deadline and not ended:
            ended, _ = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        took = time.monotonic() - started
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        else:
            longest = max(0.2, 0.7 * longest + 0.3 * took)
        print(f"{took:.3f} {'ended' if ended else 'killed'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
