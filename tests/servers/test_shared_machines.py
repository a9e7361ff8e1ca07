"""Two machines with one cache, one channel and one folder of environments: killed at work, again and again.

Each is a process in a network and a process space of its own, so that neither sees the other's processes; the files
are the same, as on a file server. What one leaves when it is killed, the next run of that machine removes; what a
machine leaves that is never seen again, the others remove after a week.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab import ROOT, check_folder, environment, make_package
from shared_host import require_right

from ssm_forge.channel import prune

pytest.importorskip("cryptography", reason="cryptography is not in this environment; the tools of ./run have it")

from ssm_forge.base import owners
from ssm_forge.channel import check as channel_check
from ssm_forge.channel.source import open_source

HERE = Path(__file__).parent
_ISOLATE = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "--map-root-user"]

# Takes the place of the real worker: a package that was made before, and a compiler that goes on for long.
_WORKER = """
import json, os, shutil, subprocess, sys, time
from pathlib import Path
spec = json.loads(Path(sys.argv[1]).read_text())
compiler = subprocess.Popen(["sleep", "3000"])
print("[1/1] demo.cu", flush=True)
if os.environ.get("SHARED_HOST_HANG"):
    (Path(sys.argv[1]).parent / "hanging").touch()
    time.sleep(3000)
staging = Path(spec["output_dir"])
target = staging / spec["values"]["package"][0]
shutil.copy(Path(os.environ["SHARED_HOST_MADE"]) / target.name, target)
compiler.kill()
compiler.wait()
os.write(int(sys.argv[2]), json.dumps({"package": str(target)}).encode())
"""


class Host:
    """One of the machines."""

    def __init__(self, folder: Path, name: str, rounds: int, seed: int) -> None:
        variables = environment(
            folder / f"home-{name}",
            SSM_FORGE_CACHE_DIR=str(folder / "cache"),
            SSM_FORGE_CCACHE="off",
            SHARED_HOST_MADE=str(folder / "made"),
            PYTHONPATH=f"{ROOT / 'scripts'}:{HERE}:{HERE.parent}",
        )
        command = [*_ISOLATE, sys.executable, str(HERE / "shared_host.py"), str(folder), name, str(rounds), str(seed)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def heard(self, until: str) -> list[dict[str, Any]]:
        """What it says until it says this."""
        assert self._process.stdout is not None
        found = []
        for line in self._process.stdout:
            found.append(json.loads(line))
            if until in found[-1]:
                return found
        raise AssertionError(f"the machine ended: {found[-3:]}")

    def die(self) -> None:
        """The power goes off: everything on it ends at once."""
        self._process.kill()
        self._process.wait()


@contextmanager
def host(folder: Path, name: str, rounds: int, seed: int) -> Iterator[Host]:
    machine = Host(folder, name, rounds, seed)
    try:
        yield machine
    finally:
        machine.die()


def leftovers(folder: Path) -> list[str]:
    """What killed runs left behind; what others go on with, unfinished uploads and downloads, has a week."""
    channel = folder / "channel"
    found = [
        *(folder / "cache" / "build").glob("*"),
        *channel.glob("*/.*.part"),
        *channel.glob(".tmp/*"),
        *channel.glob(".prune-*"),
        *channel.glob(".pending"),
        *(folder / "envs").glob(".*.new-*"),
        *(folder / "envs").glob(".*.old-*"),
    ]
    return sorted(str(path.relative_to(folder)) for path in found)


@pytest.mark.parametrize(
    "rounds", [pytest.param(5, id="small"), pytest.param(30, id="full", marks=pytest.mark.nightly)]
)
def test_two_machines_with_one_cache_do_each_other_no_harm(tmp_path: Path, rounds: int) -> None:
    if subprocess.run([*_ISOLATE, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow a network namespace")
    for name in "ab":
        for number in range(rounds + 2):
            for kind in ("built", "sent"):
                package = f"{kind}{name}"
                make_package(tmp_path / "made", package, version=f"{number}.0", text=f"{package} {number}.0\n")
    fake = tmp_path / "fake" / "ssm_forge" / "build"
    fake.mkdir(parents=True)
    (fake.parent / "__init__.py").touch()
    (fake / "__init__.py").touch()
    (fake / "worker.py").write_text(_WORKER)
    with host(tmp_path, "a", rounds, 15) as a, host(tmp_path, "b", rounds, 15) as b:
        ends = [told for machine in (a, b) for told in machine.heard("rounds")]
        # Whoever was not killed did what it was to do, whatever the other machine swept meanwhile.
        assert not [told for told in ends if str(told.get("end", "")).startswith("failed")]
        counted = Counter(str(told["end"]) for told in ends if "end" in told)
        assert counted["killed"] >= rounds // 3
        assert counted["ended"] >= 2 * 4
        for machine in (a, b):
            machine.tell("finish")
            done = machine.heard("finished")
            assert {told["end"] for told in done if "end" in told} == {"ended"}
            assert not [command for command in done[-1]["finished"] if "sleep" in command or "worker" in command]
        assert leftovers(tmp_path) == []
        assert channel_check.check(open_source(str(tmp_path / "channel")))[0] == []
        assert check_folder(tmp_path / "channel")
        for prefix in (tmp_path / "envs").glob("[!.]*"):
            require_right(prefix)
        print(f"2 machines, {rounds} rounds each: {dict(counted)}")

        # A machine that is never seen again.
        a.tell("hang")
        a.heard("hangs")
        (staging,) = (tmp_path / "cache" / "build").iterdir()
        b.tell("finish")
        b.heard("finished")
        assert staging.exists()
        a.die()
        b.tell("finish")
        b.heard("finished")
        assert staging.exists()
        assert owners.gone(staging.name) is None
        download = tmp_path / "cache" / "downloads" / ("0" * 64) / f"x.{staging.name.removeprefix('demo-')}.part"
        download.parent.mkdir()
        download.write_bytes(b"half")
        week_ago = time.time() - 8 * 86_400
        for path in (staging, download):
            os.utime(path, (week_ago, week_ago))
        b.tell("finish")
        b.heard("finished")
        assert not staging.exists()
        assert not download.exists()
    # No server has the channel open any more.
    prune.prune(tmp_path / "channel", keep=2, dry_run=False)
    assert not list((tmp_path / "channel" / ".uploads").glob("*.part"))
