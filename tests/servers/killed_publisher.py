"""Publishes in forked children and kills each at a random moment: ``killed_publisher.py URL FOLDER TIMES SEED``.

The first child ends by itself and counts its steps: calls that our own modules make. Of the others, every second one
is killed at a random step, and every second one by the clock, which also hits the engine's own work.
A process of its own that never calls the engine itself, so that forking it is safe and starting a child is quick.
Prints one line a child: whether it ended or was killed.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

# Imported here, once, not in each child.
import rattler.index  # noqa: F401

from ssm_forge.publish.send import publish


class Steps:
    """Counts the calls that our own modules make, across fork."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    @property
    def count(self) -> int:
        return int.from_bytes(self._shared[:], "little")

    def follow(self, last: int | None) -> None:
        """Count from here, in this process and all its threads; kill it at the step ``last``."""
        self._shared[:] = bytes(8)

        def step(frame: FrameType, event: str, arg: object) -> None:
            if event in ("call", "c_call") and "ssm_forge" in frame.f_code.co_filename:
                number = self.count + 1
                self._shared[:] = number.to_bytes(8, "little")
                if number == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        threading.setprofile(step)
        sys.setprofile(step)


def end_after(child: int, seconds: float) -> int:
    """Kill the child, unless it ends before; returns its status."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(url: str, folder: Path, times: int, seed: int) -> None:
    packages = sorted(folder.glob("*.conda"))
    chance = random.Random(seed)
    steps, whole, longest = Steps(), 0, 0.5
    for number in range(times):
        by_step = number % 2 == 1
        last = chance.randint(1, whole) if by_step else None
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            if by_step or number == 0:
                steps.follow(last)
            publish(packages[: number + 1], url)
            os._exit(0)
        # Some live to the end, so that the last steps are hit too.
        if by_step or number == 0:
            status = os.waitpid(child, 0)[1]
        else:
            status = end_after(child, chance.uniform(0, longest * 1.3))
        if number == 0:
            whole = steps.count
        if os.WIFEXITED(status):
            longest = max(0.2, 0.7 * longest + 0.3 * (time.monotonic() - started))
        print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
