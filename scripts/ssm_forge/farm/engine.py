"""Snakemake: made from its own lock, started with the jobs that are left, followed until it ends."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base import locks
from ssm_forge.base.errors import MachineError, NetworkError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import Log, say

SNAKEFILE = Path(__file__).with_name("farm.smk")
_LOCK_FILE = Path("scripts/farm.lock")
# Snakemake 9 runs on it and newer ones.
_OLDEST_PYTHON = (3, 11)
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Executor:
    """Who runs the jobs.

    Attributes:
        name: of a Snakemake executor: ``local``, ``slurm``, ``kubernetes``, ``cluster-generic``.
        jobs: that may run side by side; None for as many as fit.
        cores: of this machine, for ``local``.
        memory: bytes of it, for ``local``.
        retries: times that a failed job is tried again.
        arguments: for Snakemake, as they are.
    """

    name: str
    jobs: int | None
    cores: int
    memory: int
    retries: int
    arguments: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The executor as arguments for Snakemake."""
        if self.name == "local":
            # Jobs get the cores that they were given, so that fewer at a time need no other limit than this one.
            limit = ["--cores", str(self.cores), "--resources", f"mem_mb={self.memory // 1_000_000}"]
            limit += [f"slots={self.jobs}", "--default-resources", "slots=1"] if self.jobs else []
        else:
            limit = [
                "--executor",
                self.name,
                "--jobs",
                str(self.jobs or 100),
                *(_slurm() if self.name == "slurm" else ()),
            ]
        return [*limit, "--retries", str(self.retries), *self.arguments]


def _slurm() -> list[str]:
    """Where a cluster keeps no accounts, sacct knows of no job: squeue is asked then."""
    try:
        configuration = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineError(
            f"Slurm can't be asked for its configuration ({error}).",
            fix="Start this on a machine from which 'scontrol show config' and 'sbatch' work.",
        ) from error
    kept = next((line for line in configuration.stdout.splitlines() if line.startswith("AccountingStorageType")), "")
    return ["--slurm-status-command", "squeue", "--slurm-no-account"] if kept.endswith("/none") else []


def program(workspace: Workspace) -> Path:
    """The Python that has Snakemake; made once from ``scripts/farm.lock``, in a place that all nodes see.

    Raises:
        MachineError: when the tools run on a Python that it does not support.
        NetworkError: when it can't be installed.
    """
    if sys.version_info < _OLDEST_PYTHON:
        raise MachineError(
            f"Snakemake needs Python 3.11 or newer, and the tools run on {sys.version.split()[0]}.",
            fix="Set SSM_FORGE_PYTHON to a newer one, and run the same command again.",
        )
    lock = workspace.root / _LOCK_FILE
    made_from = [lock.read_bytes(), os.fsencode(os.path.realpath(sys.executable)), sys.version.encode()]
    tag = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:12]
    target = workspace.state / "tools" / f"snakemake-{tag}"
    python = target / "bin" / "python"
    if (target / "complete").exists():
        return python
    target.parent.mkdir(parents=True, exist_ok=True)
    with locks.held(target.parent / ".snakemake.lock", "run it once before others do", what=target.name):
        if not (target / "complete").exists():
            say(f"Preparing Snakemake in {target} (once) ...")
            shutil.rmtree(target, ignore_errors=True)
            _make(target, lock)
    return python


def _make(target: Path, lock: Path) -> None:
    # The lock has every dependency; see farm.in.
    requirements: list[str | Path] = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", lock]
    python = target / "bin/python"
    uv = shutil.which("uv")
    pip: list[str | Path] = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
    venv: list[str | Path] = [sys.executable, "-m", "venv", *(["--without-pip"] if uv else []), target]
    commands: list[list[str | Path]] = [venv, [*pip, *requirements]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(target, ignore_errors=True)
            last = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise NetworkError(
                f"Snakemake could not be installed ({last}).",
                fix="Check that the Python package index can be reached, and run the same command again.",
            )
    (target / "complete").touch()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the farm's lock for as long as the context lasts: one controller at a time.

    Raises:
        MachineError: when another farm is run here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        if locks.acquire(stream, "run one farm at a time", wait=False) is False:
            raise MachineError(
                f"another farm is at work in {folder}.", fix="Wait for it, or stop it with Ctrl-C, and run this again."
            )
        yield


def run(python: Path, folder: Path, farm: Path, executor: Executor, log: Log, progress: Callable[[], None]) -> int:
    """Run what is left, past failed jobs; returns Snakemake's exit code.

    Args:
        folder: the farm's; receipts, logs and Snakemake's own notes go there.
        farm: the file of jobs.
        progress: called now and then.
    """
    command: Sequence[str | Path] = [
        *(python, "-m", "snakemake", "--snakefile", SNAKEFILE, "--directory", folder, "--config", f"farm={farm}"),
        # A farm has a lock of its own, that a killed controller does not leave behind.
        *("--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime", "--keep-going", "--scheduler", "greedy"),
        # Another machine's files may take a while to be seen here.
        *("--latency-wait", "60" if executor.name != "local" else "5"),
        *executor.words,
    ]
    log(f"command: {' '.join(map(str, command))}")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with log.path.with_suffix(".snakemake.log").open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        try:
            while process.poll() is None:
                progress()
                time.sleep(_POLL_SECONDS)
        except BaseException:
            # It stops what it started, on other machines too.
            process.terminate()
            process.wait()
            raise
    progress()
    return process.returncode
