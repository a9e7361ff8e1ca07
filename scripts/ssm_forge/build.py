"""Builds a package that the channel lacks: jobs that fit the machine, a log, a clean stop, one atomic addition."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ssm_forge import channel as channels
from ssm_forge import compile_cache
from ssm_forge.arch import ArchList
from ssm_forge.errors import BuildError, MachineError
from ssm_forge.finalize import finalize
from ssm_forge.machine import cores, free_memory
from ssm_forge.paths import Workspace
from ssm_forge.ui import Log, console, human_bytes, human_seconds, say

# Peak resident memory of the compiler's processes for the largest source file, measured with nvcc 13.0
# (causal_conv1d_bwd.cu, 2.1 GB), rounded up; and what the rest of a build takes.
MEMORY_PER_JOB = 2_600_000_000
MEMORY_BASE = 800_000_000

_NINJA_STEP = re.compile(r"\[(\d+)/(\d+)\]")
_SOURCE = re.compile(r"([\w./-]+\.(?:cu|cpp))\b(?! *:)")


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        project: recipe name.
        values: variant values, one a key.
        filename: the package it gives.
        channels: URLs to take build and host packages from, first wins.
    """

    project: str
    values: dict[str, list[str]]
    filename: str
    channels: tuple[str, ...]


def choose_jobs(requested: int | None) -> int:
    """Parallel compilers: as many as there are cores and memory for.

    Raises:
        MachineError: when the memory is too small for the jobs asked for, or for a single one.
    """
    have = free_memory()
    fitting = (have - MEMORY_BASE) // MEMORY_PER_JOB
    wanted = requested or max(1, min(cores(), fitting))
    needed = MEMORY_BASE + wanted * MEMORY_PER_JOB
    if needed > have:
        fix = f"Use --jobs {fitting}." if fitting >= 1 else "Free memory, or build on a larger machine."
        raise MachineError(
            f"{wanted} compile job{'s' if wanted > 1 else ''} need {human_bytes(MEMORY_BASE)} + {wanted} x "
            f"{human_bytes(MEMORY_PER_JOB)} = {human_bytes(needed)} of memory, and {human_bytes(have)} are free.",
            fix=fix,
        )
    return wanted


def build(request: BuildRequest, *, channel: Path, jobs: int, workspace: Workspace, log: Log) -> Path:
    """Build, test and add one package to ``channel``; returns its path there.

    Nothing reaches the channel before the recipe's own tests have passed.

    Raises:
        BuildError: when compiling, packaging or a test of the recipe fails.
    """
    sweep(workspace)
    staging = _staging(workspace) / f"{request.project}-{os.getpid()}"
    staging.mkdir(parents=True)
    try:
        started = time.monotonic()
        package = _run_worker(request, staging, jobs, workspace, log)
        if package.name != request.filename:
            raise BuildError(
                f"the recipe gave {package.name}, but {request.filename} was planned: it changed during the build.",
                fix="Run the same command again.",
                log=log.path,
            )
        finished = finalize(package, request.project, request.values, workspace)
        target = channels.add(channel, finished)
        seconds = human_seconds(time.monotonic() - started)
        size = human_bytes(target.stat().st_size)
        say(f"Built [bold]{target.name}[/] in {seconds} ({size})")
        return target
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sweep(workspace: Workspace) -> None:
    """Stop and remove what builds of killed runs left behind."""
    folder = _staging(workspace)
    if not folder.exists():
        return
    for staging in folder.iterdir():
        if _owner_lives(staging):
            continue
        group = staging / "worker.pgid"
        if group.exists() and group.read_text().isdigit():
            _kill_leftover(int(group.read_text()), staging)
        shutil.rmtree(staging, ignore_errors=True)


def _owner_lives(staging: Path) -> bool:
    """Whether the run that made this folder is still there: numbers of processes are used again."""
    owner = staging.name.rpartition("-")[2]
    try:
        started = psutil.Process(int(owner)).create_time()
        return int(owner) != os.getpid() and started <= staging.stat().st_mtime
    except (ValueError, OSError, psutil.Error):
        return False


def _kill_leftover(group: int, staging: Path) -> None:
    """Stop a worker's processes, unless the number belongs to someone else by now."""
    try:
        ours = str(staging / "spec.json") in psutil.Process(group).cmdline()
    except psutil.NoSuchProcess:
        ours = True  # As long as one of its processes is left, a session's number is not used again.
    except psutil.Error:
        ours = False
    if ours:
        _kill_session(group)


def _staging(workspace: Workspace) -> Path:
    return workspace.cache / "build"


def _share_sources(staging: Path, workspace: Workspace) -> None:
    """Let the engine keep upstream's archives between builds (it checks their hashes each time)."""
    sources = workspace.cache / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    (staging / "out").mkdir()
    (staging / "out" / "src_cache").symlink_to(sources)


def _run_worker(request: BuildRequest, staging: Path, jobs: int, workspace: Workspace, log: Log) -> Path:
    _share_sources(staging, workspace)
    spec = staging / "spec.json"
    spec.write_text(
        json.dumps(
            {
                "project": request.project,
                "values": request.values,
                "output_dir": str(staging / "out"),
                "channels": list(request.channels),
            }
        )
    )
    environment = {
        **os.environ,
        "CPU_COUNT": str(jobs),
        "RATTLER_CACHE_DIR": str(workspace.rattler_cache),
        **compile_cache.environment(workspace),
        # Nothing here runs on a GPU, but conda-forge's torch asks for a driver, and our packages for their GPU.
        "CONDA_OVERRIDE_CUDA": request.values["cuda_compiler_version"][0],
        "CONDA_OVERRIDE_CUDA_ARCH": str(ArchList.parse(request.values["cuda_arch_list"][0]).sass[0]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "ssm_forge.build_worker", spec],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    (staging / "worker.pgid").write_text(str(process.pid))
    try:
        outcome = _follow(process, request.project, log)
        process.wait()
    except BaseException:
        _kill_session(process.pid)
        raise
    if "package" not in outcome:
        _kill_session(process.pid)
        # The engine's errors have one line for each cause.
        reason = " ".join(outcome.get("error", f"exit code {process.returncode}").split())
        raise BuildError(
            f"building {request.project} failed: {reason}",
            fix=_hint(outcome.get("tail", "")),
            log=log.path,
        )
    return Path(outcome["package"])


def _follow(process: subprocess.Popen[str], project: str, log: Log) -> dict[str, str]:
    """Read the worker's events: everything into the log, compile steps into the progress bar."""
    outcome: dict[str, str] = {}
    tail: list[str] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"building {project}", total=None)
        assert process.stdout is not None
        for line in process.stdout:
            try:
                event = json.loads(line)
                if not isinstance(event, dict):
                    raise ValueError
            except ValueError:
                event = {"log": line.rstrip("\n")}
            if "log" not in event:
                outcome.update(event)
                continue
            log(event["log"])
            tail = [*tail[-200:], event["log"]]
            step = _NINJA_STEP.search(event["log"])
            if step:
                source = _SOURCE.findall(event["log"])
                name = Path(source[-1]).name if source else ""
                progress.update(
                    task,
                    description=f"building {project}: {name}",
                    completed=int(step.group(1)),
                    total=int(step.group(2)),
                )
    outcome["tail"] = "\n".join(tail)
    return outcome


def _hint(tail: str) -> str:
    if re.search(r"Killed|signal 9|out of memory|Cannot allocate", tail):
        return "The compiler ran out of memory: use --jobs 1."
    if "No space left on device" in tail:
        return "The disk is full: free space, or set SSM_FORGE_CACHE_DIR to a folder on a larger disk."
    return ""


def _kill_session(leader: int) -> None:
    """Stop every process of the session that a worker leads: ninja puts each compiler in a group of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        members = [pid for pid in psutil.pids() if _session(pid) == leader]
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not members:
            return
        time.sleep(0.2)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def channel_urls(folders: Sequence[Path]) -> tuple[str, ...]:
    return tuple(folder.resolve().as_uri() for folder in folders)
