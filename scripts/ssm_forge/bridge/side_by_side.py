"""Assembles packages in several processes: of one package, nearly everything is done on one core."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path

from ssm_forge.base.errors import MachineError
from ssm_forge.base.machine import cores
from ssm_forge.bridge.package import BridgePackage, write

# Gives all packages of a channel; a process calls it again, because how a package is made can't be sent to one.
Packages = Callable[[], Sequence[BridgePackage]]

# Below this many bytes of wheels, processes are not worth their start.
_WORTH_IT_BYTES = 100_000_000
# More would wait for the largest package, or for the disk.
_MOST_PROCESSES = 4
_PR_SET_PDEATHSIG = 1

# In a process that assembles: place below the channel -> package.
_own_work: dict[str, BridgePackage] = {}


def write_all(todo: Sequence[BridgePackage], packages: Packages, channel: Path) -> Iterator[BridgePackage]:
    """Assemble packages into ``channel``, the largest first.

    Args:
        todo: some of ``packages``.
        packages: a function that another process can be sent: one of a module, or a ``partial`` of such a one.

    Yields:
        Each one when it is there.

    Raises:
        MachineError: when a process was killed from outside.
        ForgeError: whatever making a package raises.
    """
    ordered = sorted(todo, key=lambda package: -package.size)
    count = min(cores(), len(ordered), _MOST_PROCESSES)
    if count < 2 or sum(package.size for package in ordered) < _WORTH_IT_BYTES:
        for package in ordered:
            write(package, channel, threads=cores())
            yield package
        return
    with _processes(count, packages) as pool:
        made = {pool.submit(_write, package.place, channel): package for package in ordered}
        for future in as_completed(made):
            future.result()
            yield made[future]


@contextmanager
def _processes(count: int, packages: Packages) -> Iterator[ProcessPoolExecutor]:
    """The processes; none of them goes on after an error, or without this one."""
    # Not forked: the engine's threads would be missing in them.
    pool = ProcessPoolExecutor(count, get_context("spawn"), _become_assembler, (packages,))
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise MachineError(
                "a process that assembled the bridge's packages was killed.",
                fix="If memory was short, free some (each takes up to 1.5 GB); then run the same command again.",
            ) from error
        raise
    finally:
        pool.shutdown()


def _become_assembler(packages: Packages) -> None:
    """What such a process does first."""
    # Ctrl-C is for the process that waits for this one; and where that is killed, nobody waits any more.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _own_work.update({package.place: package for package in packages()})


def _write(place: str, channel: Path) -> None:
    write(_own_work[place], channel, threads=1)
