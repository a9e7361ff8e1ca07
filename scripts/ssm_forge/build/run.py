"""Builds a package that the channel lacks: jobs that fit the machine, a log, a clean stop, one atomic addition."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ssm_forge.base import mirrors, owners
from ssm_forge.base.credentials import for_engine
from ssm_forge.base.errors import BuildError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import Log, console, human_bytes, human_seconds, say
from ssm_forge.build import compile_cache, offline
from ssm_forge.build import locked as locked_build
from ssm_forge.build import provenance as materials
from ssm_forge.build.finalize import finalize
from ssm_forge.build.leftovers import kill_session, staging_folder, sweep
from ssm_forge.build.request import BuildRequest
from ssm_forge.channel import folder as channels
from ssm_forge.channel.folder import channel_urls

# What the engine says where it can't have a package that it is to build with.
_NOT_RESOLVED = "Failed to resolve dependencies"
_NINJA_STEP = re.compile(r"\[(\d+)/(\d+)\]")
_SOURCE = re.compile(r"([\w./-]+\.(?:cu|cpp))\b(?! *:)")


def build(request: BuildRequest, *, channel: Path, jobs: int, workspace: Workspace, log: Log) -> Path:
    """Build, test and add one package to ``channel``; returns its path there.

    Nothing reaches the channel before the recipe's own tests have passed.

    Args:
        channel: a folder.
        jobs: compilers that run side by side.

    Raises:
        BuildError: when compiling, packaging or a test of the recipe fails.
    """
    sweep(workspace)
    staging = staging_folder(workspace) / f"{request.project}-{owners.mark()}"
    staging.mkdir(parents=True)
    try:
        started = time.monotonic()
        package = _run_worker(request, staging, jobs, workspace, log, channel)
        if package.name != request.filename:
            raise BuildError(
                f"the recipe gave {package.name}, but {request.filename} was planned: it changed during the build.",
                fix="Run the same command again.",
                log=log.path,
            )
        finished = request.finish(package) if request.finish else _finished(package, request, workspace)
        target = channels.add(channel, finished)
        seconds = human_seconds(time.monotonic() - started)
        size = human_bytes(target.stat().st_size)
        say(Text.assemble("Built ", (target.name, "bold"), f" in {seconds} ({size})"))
        return target
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _finished(package: Path, request: BuildRequest, workspace: Workspace) -> Path:
    return finalize(
        package,
        request.rendered,
        request.key,
        workspace,
        compiler=request.compiler,
        compiler_lock=request.compiler_lock,
        solved=None if request.locked is None else materials.locked(request.locked),
    )


def _share_sources(staging: Path, workspace: Workspace) -> None:
    """Let the engine keep upstream's archives between builds (it checks their hashes each time)."""
    sources = workspace.cache / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    (staging / "out").mkdir()
    (staging / "out" / "src_cache").symlink_to(sources)


@for_engine()
def _run_worker(request: BuildRequest, staging: Path, jobs: int, workspace: Workspace, log: Log, channel: Path) -> Path:
    # Long: one life of a process, from what it is told to what it answers; a part of it alone would leave it running.
    _share_sources(staging, workspace)
    root, from_channels = request.root or workspace.root, request.channels
    if request.locked is not None:
        archives = offline.sources(request.rendered)
        root, locked_channels = locked_build.prepare(request.locked, request.beside, workspace, staging, archives)
        # That of a rebuild is new and empty, which the engine takes for a failure.
        channels.ensure_indexed(channel)
        from_channels = (*channel_urls([channel]), *locked_channels)
    spec = staging / "spec.json"
    spec.write_text(
        json.dumps(
            {
                "project": request.project,
                "root": str(root),
                "values": request.key.to_renderer(),
                "output_dir": str(staging / "out"),
                # The build engine reads no configuration of pixi.
                "channels": [mirrors.mirrored(url) for url in from_channels],
            }
        )
    )
    environment = {
        **os.environ,
        "CPU_COUNT": str(jobs),
        "RATTLER_CACHE_DIR": str(workspace.rattler_cache),
        **compile_cache.environment(workspace),
        # Nothing here runs on a GPU, but conda-forge's torch asks for a driver, and our packages for their GPU.
        "CONDA_OVERRIDE_CUDA": request.key.cuda,
        "CONDA_OVERRIDE_CUDA_ARCH": str(request.key.archs.sass[0]),
    }
    # Where the worker says what came of it: what the recipe's tools print is never taken for that.
    answer_fd = os.memfd_create("outcome")
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "ssm_forge.build.worker", spec, str(answer_fd)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,
            pass_fds=(answer_fd,),
        )
        (staging / "worker.pgid").write_text(str(process.pid))
        try:
            tail = _follow(process, request.project, log)
            process.wait()
        except BaseException:
            kill_session(process.pid)
            raise
        outcome = _read_outcome(answer_fd)
    finally:
        os.close(answer_fd)
    if process.returncode == 0 and "error" not in outcome and "package" in outcome:
        return Path(outcome["package"])
    kill_session(process.pid)
    # The engine's errors have one line for each cause.
    reason = " ".join(outcome.get("error", f"exit code {process.returncode}").split())
    if request.locked is not None and _NOT_RESOLVED in reason:
        error = offline.blame((*request.built_with, *request.beside), workspace)
        if error is not None:
            error.log = log.path
            raise error
    raise BuildError(f"building {request.project} failed: {reason}", fix=hint(tail), log=log.path)


def _read_outcome(answer_fd: int) -> dict[str, str]:
    """What the worker said at its end; nothing when it was killed before, or in the middle of it."""
    with os.fdopen(os.dup(answer_fd), encoding="utf-8", errors="replace") as stream:
        stream.seek(0)
        try:
            outcome: dict[str, str] = json.loads(stream.read())
        except ValueError:
            return {}
    return outcome


def _follow(process: subprocess.Popen[str], project: str, log: Log) -> str:
    """Read what is printed: everything into the log, compile steps into the progress bar; returns the last lines."""
    tail: list[str] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"building {project}", total=None)
        assert process.stdout is not None
        for line in process.stdout:
            log(line)
            tail = [*tail[-200:], line]
            step = _NINJA_STEP.search(line)
            if step:
                source = _SOURCE.findall(line)
                name = Path(source[-1]).name if source else ""
                progress.update(
                    task,
                    description=f"building {project}: {name}",
                    completed=int(step.group(1)),
                    total=int(step.group(2)),
                )
    return "".join(tail)


def hint(tail: str) -> str:
    """What to do about a failed build, from the last lines that it printed; empty where they tell nothing."""
    if refusal := re.search(r"^error: (setup\.py .+)$", tail, re.MULTILINE):
        return f"Its {refusal.group(1)}"  # The words of recipes/source-tree/build.sh.
    if re.search(r"Killed|signal 9|out of memory|Cannot allocate", tail):
        return "The compiler ran out of memory: use --jobs 1."
    if "No space left on device" in tail:
        return "The disk is full: free space, or set SSM_FORGE_CACHE_DIR to a folder on a larger disk."
    return ""
