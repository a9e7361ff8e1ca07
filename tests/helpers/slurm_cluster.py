"""A Slurm cluster on this machine: Debian's slurm-wlm and munge, a controller, and a daemon for each node.

It needs root: Debian's packages are installed where they are missing, and slurmd runs as root. Nothing of an existing
configuration is used or changed: every file is in a folder of the test's own, every port is a free one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")

_CONFIGURATION = """\
ClusterName=farm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdTimeout=10
ReturnToService=2
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs.

    Attributes:
        nodes: name -> megabytes of memory that it has for jobs.
    """

    folder: Path
    nodes: Mapping[str, int]

    @property
    def environment(self) -> dict[str, str]:
        """What its commands need."""
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def ask(self, *command: str) -> str:
        """What one of its commands prints."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def start(self, node: str) -> None:
        """Start a node's daemon."""
        self.ask("slurmd", "-N", node)

    def kill(self, node: str) -> None:
        """Lose a node: its daemon and everything that its jobs run are gone at once."""
        daemon = psutil.Process(int((self.folder / f"slurmd-{node}.pid").read_text()))
        for process in [daemon, *self.jobs_of(node)]:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def jobs_of(self, node: str) -> list[psutil.Process]:
        """The processes of a node's jobs, and what watches over them."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if _watches(process, self.folder, node) or process.environ().get("SLURMD_NODENAME") == node:
                    # The engine hides Slurm's variables from what it runs.
                    found.update({each.pid: each for each in (process, *process.children(recursive=True))})
        return list(found.values())

    def states(self) -> dict[str, str]:
        """Node -> its state, ``idle``, ``mixed``, ``down*``."""
        lines = self.ask("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
        found = {}
        for line in lines:
            name, state = line.split()
            found[name] = state
        return found


def _watches(process: psutil.Process, folder: Path, node: str) -> bool:
    if not process.name().startswith("slurmstepd"):
        return False
    return any(str(folder / f"spool-{node}") in file.path for file in process.open_files())


@contextmanager
def cluster(folder: Path, nodes: Mapping[str, int]) -> Iterator[Cluster]:
    """Start one whose nodes have two cores and so many megabytes each; it is gone at the end.

    Skips the test, saying why, where Debian's packages can't be installed.
    """
    _install()
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    made = Cluster(folder, nodes)
    host = socket.gethostname().split(".")[0]
    each = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=2 RealMemory={memory}"
        for name, memory in nodes.items()
    ]
    text = _CONFIGURATION.format(host=host, port=_free_port(), folder=folder, nodes="\n".join(each))
    (folder / "slurm.conf").write_text(text)
    # Snakemake drops Slurm's variables in its jobs, and there is no other way to name a configuration.
    (folder / "bin").mkdir()
    srun = folder / "bin/srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    try:
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        files["seed-file"] = "munge.seed"
        made.ask("munged", "--force", *(f"--{option}={folder / name}" for option, name in files.items()))
        made.ask("slurmctld", "-c")
        for node in nodes:
            made.start(node)
        _wait_until_ready(made)
        yield made
    finally:
        _stop(made)


def _install() -> None:
    if all(shutil.which(program) for program in _PROGRAMS):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("not run: Slurm can't be installed, because this is not Debian, or not root")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-qy", "slurm-wlm", "munge"]):
        done = subprocess.run(
            [command[0], "--no-install-recommends", *command[1:]],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"not run: Slurm could not be installed ({done.stderr.strip().splitlines()[-1]})")


def _wait_until_ready(made: Cluster) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if set(made.states().values()) == {"idle"}:
                return
        assert time.monotonic() < deadline, (made.folder / "slurmctld.log").read_text()
        time.sleep(0.5)


def _stop(made: Cluster) -> None:
    for node in made.nodes:
        for process in made.jobs_of(node):
            with contextlib.suppress(psutil.Error):
                process.kill()
    for file in made.folder.glob("*.pid"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
