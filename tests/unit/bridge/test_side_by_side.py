"""Packages assembled in several processes: all of them, the first error as it is, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from front_door import own_environment
from ssm_forge.base.errors import BuildError, MachineError
from ssm_forge.bridge import side_by_side
from ssm_forge.bridge.package import BridgePackage
from ssm_forge.bridge.side_by_side import write_all

# As if each were a large wheel, so that processes are worth it.
LARGE = 60_000_000


def packages(marks: Path, count: int = 4, what: str = "") -> list[BridgePackage]:
    """Packages that each hold the number of the process that staged it; the last one does ``what``."""

    def stage(number: int, folder: Path) -> None:
        (marks / f"{number}.begun").write_text(str(os.getpid()))
        if number == count - 1 and what == "fails":
            raise BuildError("it has no modules.", fix="Fetch it again.", log="the.log")
        if number == count - 1 and what == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "waits":
            time.sleep(60)
        (folder / "process").write_text(str(os.getpid()))
        time.sleep(0.2)

    return [
        BridgePackage(name=f"p{number}", version="1", inputs=(), stage=partial(stage, number), size=LARGE)
        for number in range(count)
    ]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "cores", lambda: 2)


def test_all_are_made_in_processes_that_end(tmp_path: Path) -> None:
    every = partial(packages, tmp_path)
    made = list(write_all(every()[1:], every, tmp_path / "channel"))
    assert {package.name for package in made} == {"p1", "p2", "p3"}
    assert all((tmp_path / "channel" / package.place).is_file() for package in made)
    assert not (tmp_path / "0.begun").exists()
    used = {int((tmp_path / f"{number}.begun").read_text()) for number in (1, 2, 3)}
    assert os.getpid() not in used
    assert not any(map(psutil.pid_exists, used))


def test_small_ones_are_not_worth_a_process(tmp_path: Path) -> None:
    (small,) = packages(tmp_path, 1)
    assert list(write_all([small], partial(packages, tmp_path, 1), tmp_path / "channel")) == [small]
    assert (tmp_path / "0.begun").read_text() == str(os.getpid())


def test_an_error_comes_out_as_it_is_and_nothing_more_is_made(tmp_path: Path) -> None:
    every = partial(packages, tmp_path, 12, "fails")
    failing_first = every()[::-1]
    with pytest.raises(BuildError, match=r"it has no modules\.") as raised:
        list(write_all(failing_first, every, tmp_path / "channel"))
    assert (raised.value.fix, raised.value.log) == ("Fetch it again.", "the.log")
    assert len(list((tmp_path / "channel").rglob("*.conda"))) < 6


def test_a_process_that_was_killed_is_an_error_of_the_machine(tmp_path: Path) -> None:
    every = partial(packages, tmp_path, 2, "is killed")
    with pytest.raises(MachineError, match="was killed"):
        list(write_all(every(), every, tmp_path / "channel"))


def test_they_do_not_outlive_a_killed_run(tmp_path: Path) -> None:
    script = (
        "import sys; from functools import partial; from pathlib import Path; import test_side_by_side as t\n"
        "from ssm_forge.bridge import side_by_side\n"
        "side_by_side.cores = lambda: 2\n"
        f"every = partial(t.packages, Path({str(tmp_path)!r}), 4, 'waits')\n"
        f"list(side_by_side.write_all(every(), every, Path({str(tmp_path)!r}) / 'channel'))"
    )
    environment = own_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        begun = [tmp_path / f"{number}.begun" for number in (0, 1)]
        _wait(lambda: all(mark.exists() and mark.read_text() for mark in begun))
        workers = [int(mark.read_text()) for mark in begun]
        assert all(map(psutil.pid_exists, workers))
    finally:
        run.kill()
        run.wait()
    _wait(lambda: not any(map(psutil.pid_exists, workers)))


def _wait(for_what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not for_what():
        assert time.monotonic() < end
        time.sleep(0.05)
