"""The farm with Snakemake and the real engine: what fails, what is killed, and what is not done again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from ssm_forge.channel import check as channel_check
from ssm_forge.channel.source import FolderSource
from toy_farm import Toy, toy

# One farm: each test goes on with what the ones before have made.
pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.in_order, pytest.mark.timeout(3600)]

_TWO = ("--select", "variant=cu130 source=conda python=3.12,3.13", "--retries", "0", "--json")
_ONE = ("--select", "variant=cu130 source=conda python=3.14", "--retries", "0", "--json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """A checkout with nothing built."""
    with toy(tmp_path_factory.mktemp("farm")) as made:
        yield made


def results(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Package -> what came of it."""
    assert done.returncode == 0, done.stderr
    jobs: list[dict[str, Any]] = json.loads(done.stdout)["jobs"]
    return {job["name"].removesuffix("-sm90"): job["result"] for job in jobs if job["kind"] == "package"}


def require_sound(made: Toy, count: int) -> None:
    assert channel_check.check(FolderSource(made.channel)) == ([], count)


def test_past_a_failed_package_everything_else_is_made_and_the_next_run_makes_what_is_missing(made: Toy) -> None:
    # The Python that the other one waits for, with the objects that they share.
    (made.recipes / "broken").write_text("causal-conv1d 3.12\n")
    failed = made.run(*_TWO)
    assert failed.returncode == 7
    assert "first causal-conv1d.cu130-conda-py312-sm90: building causal-conv1d failed" in failed.stderr
    assert sorted(made.begun()) == [
        "building causal-conv1d for 3.12",
        "building causal-conv1d for 3.13",
        "building mamba-ssm for 3.13",
    ]
    require_sound(made, 2)
    page = (made.farm / "report.html").read_text()
    assert "causal-conv1d.cu130-conda-py312-sm90" in page
    assert "this one is broken" in page or "failed" in page
    assert (made.farm / "coverage.html").exists()

    (made.recipes / "broken").unlink()
    assert results(made.run(*_TWO)) == {
        "causal-conv1d.cu130-conda-py312": "built",
        "causal-conv1d.cu130-conda-py313": "found",
        "mamba-ssm.cu130-conda-py312": "built",
        "mamba-ssm.cu130-conda-py313": "found",
    }
    require_sound(made, 4)

    before, begun = made.packages(), made.begun()
    assert set(results(made.run(*_TWO)).values()) == {"found"}
    assert made.packages() == before
    assert made.begun() == begun, "identical inputs are not built again"


def test_what_is_made_from_something_else_by_now_or_is_gone_is_built_again(made: Toy) -> None:
    results(made.run(*_TWO))
    recipe = made.recipes / "mamba-ssm/recipe.yaml"
    recipe.write_text(f"{recipe.read_text()}# Another recipe.\n")
    next(made.channel.glob("linux-64/causal-conv1d-*_py312_*.conda")).unlink()
    assert results(made.run(*_TWO)) == {
        "causal-conv1d.cu130-conda-py312": "built",
        "causal-conv1d.cu130-conda-py313": "found",
        "mamba-ssm.cu130-conda-py312": "built",
        "mamba-ssm.cu130-conda-py313": "built",
    }
    require_sound(made, 4)


def test_a_killed_controller_leaves_nothing_half_made_and_the_next_one_goes_on(made: Toy) -> None:
    done = results(made.run(*_TWO))
    (made.recipes / "seconds").write_text("600")
    begun = len(made.begun())
    farm = subprocess.Popen(
        made.command(*_ONE), env=made.environment, cwd=made.folder, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(made.begun()) == begun:
        assert farm.poll() is None
        time.sleep(0.1)
    left = psutil.Process(farm.pid).children(recursive=True)
    for process in (psutil.Process(farm.pid), *left[:1]):
        process.kill()
    farm.wait()
    require_sound(made, len(done))
    (made.recipes / "seconds").unlink()
    for process in left:
        # A job goes on without its controller, and that of the next one waits for it: here until it fails.
        if process.is_running() and process.name() in ("sleep", "bash"):
            os.kill(process.pid, signal.SIGKILL)
    assert set(results(made.run(*_ONE)).values()) == {"built"}
    require_sound(made, len(done) + 2)


def processes_of(made: Toy) -> list[psutil.Process]:
    """All that run for the toy: they have its channel among their variables."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SSM_FORGE_CHANNEL") == str(made.channel):
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("stop", "ignored", "code"),
    [
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGTERM, True, 143),
        (signal.SIGHUP, False, 129),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM in the background of a script", "lost terminal"],
)
def test_a_stopped_farm_leaves_no_job_and_nothing_half_made_and_the_next_one_completes(
    made: Toy, stop: signal.Signals, ignored: bool, code: int
) -> None:
    for package in made.channel.glob("linux-64/*_py314_*.conda"):
        package.unlink()
    before, begun = made.packages(), len(made.begun())
    (made.recipes / "seconds").write_text("600")

    def dispositions() -> None:
        # Whatever the tests were started with.
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    environment = made.environment
    farm = subprocess.Popen(
        made.command(*_ONE), env=environment, cwd=made.folder, stderr=subprocess.DEVNULL, preexec_fn=dispositions
    )
    while len(made.begun()) == begun:
        assert farm.poll() is None
        time.sleep(0.1)
    # The controller alone: as a scheduler, or whoever knows only its number, does it.
    farm.send_signal(stop)
    assert farm.wait(300) == code
    assert processes_of(made) == []
    assert made.packages() == before
    assert not list((made.folder / "cache/build").glob("*/")), "a build's folder is left"
    assert [path for path in made.channel.rglob("*") if path.name.endswith(".part")] == []
    (made.recipes / "seconds").unlink()
    assert set(results(made.run(*_ONE)).values()) == {"built"}
    assert len(made.begun()) == begun + 3, "the one that was stopped is begun again, and each other one once"
    require_sound(made, len(before) + 2)


def test_a_package_that_a_shared_channel_has_is_copied(made: Toy, tmp_path: Path) -> None:
    results(made.run(*_ONE))
    with toy(tmp_path / "elsewhere") as other:
        for name in ("causal-conv1d", "mamba-ssm"):
            recipe = f"{name}/recipe.yaml"
            (other.recipes / recipe).write_text((made.recipes / recipe).read_text())
        copied = results(other.run(*_ONE, "--channel", str(made.channel)))
        assert set(copied.values()) == {"copied"}
        assert other.begun() == []
        assert {name: data for name, data in made.packages().items() if "_py314_" in name} == other.packages()
        require_sound(other, 2)
        # One that was made from something else is not.
        (other.recipes / "common/build.sh").write_text(f"{(other.recipes / 'common/build.sh').read_text()}# New.\n")
        assert set(results(other.run(*_ONE, "--channel", str(made.channel))).values()) == {"built"}


def test_wheels_are_made_beside_the_packages_once(made: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    results(made.run(*_ONE, "--wheels", str(folder)))
    wheels = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.whl")}
    assert sorted(name.split("-")[0] for name in wheels) == ["causal_conv1d", "mamba_ssm"]
    results(made.run(*_ONE, "--wheels", str(folder)))
    assert {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.whl")} == wheels


def test_a_full_disk_stops_jobs_and_the_next_run_completes(tmp_path: Path) -> None:
    with toy(tmp_path / "toy") as full, small_disk(full.channel, 150_000_000):
        filler = full.channel / "filler"
        filler.write_bytes(bytes(100_000_000))
        failed = full.run(*_ONE)
        assert failed.returncode == 7
        assert "No space left on device" in failed.stderr
        assert full.packages() == {}
        assert full.begun() == [], "it is known before anything is compiled"
        filler.unlink()
        assert set(results(full.run(*_ONE)).values()) == {"built"}
        require_sound(full, 2)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of ``size`` bytes; the test is not run where none can be mounted."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"not run: no small disk can be mounted ({done.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
