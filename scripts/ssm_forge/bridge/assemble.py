"""Assembles the bridge channel of a variant: plans its packages, downloads, packs, indexes."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.bridge import compiler as host
from ssm_forge.bridge import interpreter as interpreters
from ssm_forge.bridge import pylock
from ssm_forge.bridge.package import SUBDIR, BridgePackage, sweep, write
from ssm_forge.bridge.toolkit import toolkit_packages
from ssm_forge.bridge.wheels import distributions, wheel_package
from ssm_forge.errors import MachineError
from ssm_forge.fetch import Artifact, fetch_all, missing
from ssm_forge.machine import cores, free_disk
from ssm_forge.paths import Workspace
from ssm_forge.ui import Log, human_bytes, say, step_progress
from ssm_forge.variants import Variant

# Seen: a wheel's bytes become about as many in the .conda, twice as many unpacked in the package cache.
_DISK_PER_DOWNLOADED_BYTE = 4.0


@dataclass(frozen=True)
class Parts:
    """What a variant's bridge is made from on this machine, before anything is downloaded.

    Attributes:
        interpreter: the Python that is copied.
        compiler: the C++ compiler that is pointed at.
        wheels: Python packages, torch among them.
        toolkit: the CUDA toolkit's wheels.
    """

    variant: Variant
    interpreter: interpreters.Interpreter
    compiler: host.HostCompiler
    wheels: tuple[pylock.LockedWheel, ...]
    toolkit: tuple[pylock.LockedWheel, ...]

    @property
    def artifacts(self) -> list[Artifact]:
        return list(dict.fromkeys(wheel.artifact for wheel in (*self.wheels, *self.toolkit)))


def channel_dir(workspace: Workspace, variant: Variant) -> Path:
    return workspace.bridge / variant.name


def find_parts(variant: Variant, python: str, host_compiler: str, workspace: Workspace) -> Parts:
    """Look at the machine and the locks.

    Args:
        host_compiler: ``system`` or the path of a g++.

    Raises:
        MachineError: when the machine has no usable Python or compiler.
    """
    tag = f"py{python.replace('.', '')}"
    low, high = (int(bound) for bound in variant.row["host_compiler_range"].split("-"))
    explicit = None if host_compiler == "system" else host_compiler
    return Parts(
        variant=variant,
        interpreter=interpreters.find(python),
        compiler=host.find(range(low, high + 1), variant.cuda, explicit),
        wheels=tuple(pylock.read(pylock.lock_path(workspace, variant.name, tag), python)),
        toolkit=tuple(pylock.read(pylock.lock_path(workspace, variant.name, "toolkit"), python)),
    )


def bytes_needed(parts: Parts, workspace: Workspace) -> tuple[int, int]:
    """Bytes to download and bytes of disk that assembling still takes."""
    if _complete(parts, workspace):
        return 0, 0
    download = sum(a.size for a in missing(parts.artifacts, workspace))
    total = sum(a.size for a in parts.artifacts)
    return download, round(total * (_DISK_PER_DOWNLOADED_BYTE - 1) + download)


def assemble(parts: Parts, workspace: Workspace, log: Log) -> Path:
    """Make the bridge channel hold everything ``parts`` names; returns the channel's folder.

    Safe to kill: packages appear whole, the index is written last, a later run goes on from there.

    Raises:
        MachineError: when the disk is too small.
    """
    channel = channel_dir(workspace, parts.variant)
    if _complete(parts, workspace):
        return channel
    _check_disk(parts, workspace)
    fetch_all(parts.artifacts, workspace)
    with _locked(workspace.bridge):
        packages = _packages(parts, workspace)
        sweep(channel)
        todo = [p for p in packages if not (channel / SUBDIR / p.filename).exists()]
        if todo:
            say(f"Assembling {len(todo)} conda packages from wheels in {channel}")
        with step_progress() as progress:
            task = progress.add_task("assembling", total=len(todo))
            for package in sorted(todo, key=lambda p: -p.size):
                progress.update(task, description=f"assembling {package.name} {package.version}")
                write(package, channel, threads=cores())
                log(f"assembled {package.filename}")
                progress.advance(task)
        wanted = [package.filename for package in packages]
        _record(parts, channel, wanted)
        _prune(channel, log)
        _index(channel)
        log(f"indexed {channel}")
        _stamp(parts, channel).touch()
    return channel


def _packages(parts: Parts, workspace: Workspace) -> list[BridgePackage]:
    dists = distributions(parts.wheels, workspace)
    wheels = [
        wheel_package(
            wheel,
            dists,
            python=parts.interpreter.minor,
            interpreter=parts.interpreter.executable,
            cuda=parts.variant.cuda,
            workspace=workspace,
        )
        for wheel in parts.wheels
    ]
    return [
        *interpreters.python_packages(parts.interpreter),
        *host.system_compiler_packages(parts.compiler),
        *toolkit_packages(parts.toolkit, parts.variant.cuda, workspace),
        *wheels,
    ]


def _identity(parts: Parts) -> str:
    from ssm_forge.bridge.package import FORMAT, hash_text

    return hash_text(
        FORMAT, parts.interpreter, parts.compiler, *(a.sha256 for a in parts.artifacts), parts.variant.row
    )[:12]


def _stamp(parts: Parts, channel: Path) -> Path:
    return channel / f".complete-py{parts.interpreter.minor}-{_identity(parts)}"


def _complete(parts: Parts, workspace: Workspace) -> bool:
    channel = channel_dir(workspace, parts.variant)
    record = channel / f".packages-py{parts.interpreter.minor}"
    if not _stamp(parts, channel).exists() or not record.exists():
        return False
    return all((channel / SUBDIR / name).exists() for name in record.read_text().split())


def _record(parts: Parts, channel: Path, wanted: Sequence[str]) -> None:
    for old in channel.glob(f".complete-py{parts.interpreter.minor}-*"):
        old.unlink()
    partial = channel / f".packages-{os.getpid()}.part"
    partial.write_text("\n".join(wanted) + "\n")
    partial.replace(channel / f".packages-py{parts.interpreter.minor}")


def _prune(channel: Path, log: Log) -> None:
    """Drop packages that no Python's current lock names: the solver must not meet them."""
    wanted = {name for record in channel.glob(".packages-py*") for name in record.read_text().split()}
    for file in (channel / SUBDIR).glob("*.conda"):
        if file.name not in wanted:
            log(f"pruned {file.name}")
            file.unlink()


def _index(channel: Path) -> None:
    from rattler.index import index_fs

    (channel / "noarch").mkdir(exist_ok=True)
    asyncio.run(index_fs(channel, write_zst=False, write_shards=False))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One assembly at a time on this machine; a second run waits for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _check_disk(parts: Parts, workspace: Workspace) -> None:
    _, needed = bytes_needed(parts, workspace)
    have = free_disk(workspace.cache)
    if have < needed:
        raise MachineError(
            f"assembling the bridge needs {human_bytes(needed)} of disk at {workspace.cache}, which has "
            f"{human_bytes(have)}.",
            fix="Free space, or set SSM_FORGE_CACHE_DIR to a folder on a larger disk.",
        )
