"""Assembles the bridge channel of a variant: plans its packages, downloads, packs, indexes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from ssm_forge.base import locks, owners
from ssm_forge.base.errors import MachineError
from ssm_forge.base.fetch import fetch_all, missing
from ssm_forge.base.machine import cores, free_disk
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import Log, human_bytes, say, step_progress
from ssm_forge.bridge import compiler as host
from ssm_forge.bridge import debian, gcc, nvidia, pylock, thin, torch
from ssm_forge.bridge import interpreter as interpreters
from ssm_forge.bridge.metadata import Distribution
from ssm_forge.bridge.package import FORMAT, BridgePackage, hash_text, sweep, write
from ssm_forge.bridge.parts import BuildTools, Parts, channel_dir
from ssm_forge.bridge.side_by_side import write_all
from ssm_forge.bridge.toolkit import runtime_packages, toolkit_packages
from ssm_forge.bridge.wheels import distributions, wheel_package

# Seen: a wheel's bytes become about as many in the .conda, twice as many unpacked in the package cache.
_DISK_PER_DOWNLOADED_BYTE = 4.0

# Raised where the same parts give packages that they did not give before: channels that were assembled then lack them.
_PACKAGE_SET = 2
_ELSEWHERE = "set SSM_FORGE_CACHE_DIR to a folder on another file system"

# Channel -> the file whose lock says that this process uses it.
_in_use: dict[Path, IO[str]] = {}


class BytesNeeded(NamedTuple):
    """What assembling a bridge still takes, in bytes.

    Attributes:
        files: of all wheels and .deb files that packages are made of.
        download: of those that the cache lacks.
        disk: while it is done.
    """

    files: int
    download: int
    disk: int


def bytes_needed(parts: Parts, workspace: Workspace, without: Collection[str] = ()) -> BytesNeeded:
    """What assembling these parts still takes: what is cached and made is left out, and files ``without`` by sha256."""
    if _complete(parts, workspace):
        return BytesNeeded(0, 0, 0)
    own = [artifact for artifact in parts.artifacts if artifact.sha256 not in without]
    download = sum(a.size for a in missing(own, workspace))
    total = sum(a.size for a in own)
    return BytesNeeded(total, download, round(total * (_DISK_PER_DOWNLOADED_BYTE - 1) + download))


def assemble(parts: Parts, workspace: Workspace, log: Log) -> Path:
    """Make the bridge channel hold everything ``parts`` names; returns the channel's folder.

    It stays so until this process ends: a run that would replace some of it, with another compiler or from other
    locks, waits. Safe to kill: packages appear whole, the index is written last, a later run goes on from there.

    Raises:
        MachineError: when the disk is too small.
    """
    channel = channel_dir(workspace, parts.variant, parts.platform)
    _use(channel)
    while not _complete(parts, workspace):
        _make(parts, channel, workspace, log)
        _use(channel)
    return channel


def assemble_toolchain(parts: Parts, workspace: Workspace, log: Log) -> None:
    """Make the packages of toolkit and compiler alone, which all Pythons share; :func:`assemble` makes the rest."""
    channel = channel_dir(workspace, parts.variant, parts.platform)
    _use(channel)
    debian.fetch_debs((*parts.toolkit.debs, *getattr(parts.compiler, "debs", ())), workspace)
    fetch_all([wheel.artifact for wheel in parts.toolkit.wheels], workspace)
    with _alone(parts, channel), _locked(workspace.bridge):
        drop_older_layout(channel)
        for package in (*_compiler_packages(parts.compiler, workspace), *toolkit_packages(parts.toolkit, workspace)):
            if not (channel / package.place).exists() and not _borrow(package, channel):
                write(package, channel, threads=cores())
                log(f"assembled {package.filename}")
    _use(channel)


def _make(parts: Parts, channel: Path, workspace: Workspace, log: Log) -> None:
    _check_disk(parts, workspace)
    debian.fetch_debs(parts.debs, workspace)
    fetch_all(parts.artifacts, workspace)
    with _alone(parts, channel), _locked(workspace.bridge):
        sweep(channel)
        drop_older_layout(channel)
        for interpreter in (parts.interpreter, *((parts.cross.interpreter,) if parts.cross is not None else ())):
            interpreters.prepare(interpreter, workspace)
        packages = _packages(parts, workspace)
        todo = [p for p in packages if not (channel / p.place).exists()]
        if todo:
            say(f"Assembling {len(todo)} conda packages from wheels in {channel}")
        borrowed = {package.place for package in todo if _borrow(package, channel)}
        for place in sorted(borrowed):
            log(f"taken from another channel of the bridge: {Path(place).name}")
        left = [package for package in todo if package.place not in borrowed]
        with step_progress() as progress:
            task = progress.add_task("assembling", total=len(left))
            for package in write_all(left, partial(_packages, parts, workspace), channel):
                progress.update(task, description=f"assembled {package.name} {package.version}", advance=1)
                log(f"assembled {package.filename}")
        wanted = [package.place for package in packages]
        _record(parts, channel, wanted)
        _prune(channel, log)
        _index(channel)
        log(f"indexed {channel}")
        _stamp(parts, channel).touch()


def _borrow(package: BridgePackage, channel: Path) -> bool:
    """Take a package from the bridge of another variant or environment: its name says what it was made from."""
    target = channel / package.place
    for other in sorted(channel.parent.glob(f"[!.]*/{package.place}")):
        if _is_of_this_layout(other.parents[1]):
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):
                target.hardlink_to(other)
                return True
    return False


def _packages(parts: Parts, workspace: Workspace) -> list[BridgePackage]:
    dists = distributions(parts.wheels, workspace, parts.platform)
    python, cuda = parts.interpreter.minor, parts.variant.cuda
    libraries = [wheel for wheel in parts.wheels if nvidia.is_library(wheel.name)]
    bundled = [wheel for wheel in libraries if torch.is_bundled(wheel.name, cuda)]
    # The runtime is the toolkit's; cuda-toolkit only names what torch's other requirements bring.
    left_out = ("nvidia-cuda-runtime", "cuda-toolkit", "torch")
    others = [wheel for wheel in parts.wheels if wheel not in libraries and wheel.name not in left_out]
    of_wheels = [
        *_torch_packages(parts, bundled, dists, workspace),
        *(
            package
            for wheel in libraries
            if wheel not in bundled and not wheel.name.startswith(left_out)
            for package in nvidia.library_packages(wheel, dists, python=python, cuda=cuda, workspace=workspace)
        ),
        *_wheel_packages(others, dists, parts.interpreter, cuda, workspace),
    ]
    return [
        *interpreters.python_packages(parts.interpreter, parts.wheels, workspace),
        *_compiler_packages(parts.compiler, workspace),
        *toolkit_packages(parts.toolkit, workspace),
        *(replace(package, platform=parts.platform) for package in of_wheels),
        *(_cross_packages(parts, parts.cross, workspace) if parts.cross is not None else ()),
    ]


def _cross_packages(parts: Parts, tools: BuildTools, workspace: Workspace) -> list[BridgePackage]:
    """What a build for another platform has beside what runs there: toolkit to link with, and tools that run here."""
    dists = distributions(tools.wheels, workspace, parts.toolkit.runs_on)
    wheels = _wheel_packages(tools.wheels, dists, tools.interpreter, parts.variant.cuda, workspace)
    return [
        *runtime_packages(replace(parts.toolkit, runs_on=parts.platform), workspace),
        *interpreters.python_packages(tools.interpreter, tools.wheels, workspace),
        *_compiler_packages(tools.compiler, workspace),
        *(replace(package, platform=parts.toolkit.runs_on) for package in wheels),
    ]


def _wheel_packages(
    wheels: Sequence[pylock.LockedWheel],
    dists: Mapping[str, Distribution],
    interpreter: interpreters.Interpreter,
    cuda: str,
    workspace: Workspace,
) -> list[BridgePackage]:
    return [
        wheel_package(
            wheel, dists, python=interpreter.minor, interpreter=interpreter.runs, cuda=cuda, workspace=workspace
        )
        for wheel in wheels
    ]


def _torch_packages(
    parts: Parts,
    bundled: Sequence[pylock.LockedWheel],
    dists: Mapping[str, Distribution],
    workspace: Workspace,
) -> list[BridgePackage]:
    if parts.there is not None:
        return thin.packages(parts.there)
    return torch.torch_packages(
        next(wheel for wheel in parts.wheels if wheel.name == "torch"),
        bundled,
        dists,
        python=parts.interpreter.minor,
        interpreter=parts.interpreter.runs,
        cuda=parts.variant.cuda,
        workspace=workspace,
    )


def _compiler_packages(compiler: host.HostCompiler | gcc.BundledCompiler, workspace: Workspace) -> list[BridgePackage]:
    if isinstance(compiler, gcc.BundledCompiler):
        return gcc.bundled_packages(compiler, workspace)
    return host.system_compiler_packages(compiler)


def _identity(parts: Parts) -> str:
    more = [part for part in (parts.there, parts.cross) if part is not None]
    return hash_text(
        FORMAT,
        _PACKAGE_SET,
        parts.interpreter,
        parts.compiler,
        *(a.sha256 for a in parts.artifacts),
        parts.variant.row,
        *more,
    )[:12]


def _stamp(parts: Parts, channel: Path) -> Path:
    return channel / f".complete-py{parts.interpreter.minor}-{_identity(parts)}"


def _complete(parts: Parts, workspace: Workspace) -> bool:
    channel = channel_dir(workspace, parts.variant, parts.platform)
    record = channel / f".packages-py{parts.interpreter.minor}"
    if not _stamp(parts, channel).exists() or not record.exists():
        return False
    return all((channel / place).exists() for place in record.read_text().split())


def drop_older_layout(channel: Path) -> None:
    """Remove packages that were laid out otherwise, those of all Pythons: no environment may be made of both kinds."""
    if not _is_of_this_layout(channel):
        packages = list(channel.glob("*/*.conda"))
        if packages:
            say(f"The bridge in {channel} is of an older layout: its packages are made anew.")
        for file in (*channel.glob(".complete-*"), *channel.glob(".packages-*"), *packages):
            file.unlink()
        channel.mkdir(parents=True, exist_ok=True)
        (channel / ".layout").write_text(f"{FORMAT}\n")


def _is_of_this_layout(channel: Path) -> bool:
    layout = channel / ".layout"
    return layout.exists() and layout.read_text() == f"{FORMAT}\n"


def _record(parts: Parts, channel: Path, wanted: Sequence[str]) -> None:
    for old in channel.glob(f".complete-py{parts.interpreter.minor}-*"):
        old.unlink()
    partial = channel / f".packages-{owners.mark()}.part"
    partial.write_text("\n".join(wanted) + "\n")
    partial.replace(channel / f".packages-py{parts.interpreter.minor}")


def _prune(channel: Path, log: Log) -> None:
    """Drop packages that no Python's current lock names: the solver must not meet them."""
    wanted = {name for record in channel.glob(".packages-py*") for name in record.read_text().split()}
    for file in channel.glob("*/*.conda"):
        if f"{file.parent.name}/{file.name}" not in wanted:
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
    with locks.held(folder / ".lock", _ELSEWHERE):
        yield


def _use(channel: Path) -> None:
    """Say that this process builds and installs from the channel, until it ends."""
    if channel not in _in_use:
        _in_use[channel] = _open_lock(channel)
        locks.acquire(_in_use[channel], _ELSEWHERE, shared=True)


@contextmanager
def _alone(parts: Parts, channel: Path) -> Iterator[None]:
    """Nobody else uses the channel, where packages of another compiler or other locks are about to be replaced."""
    _in_use.pop(channel).close()
    with _open_lock(channel) as stream:
        replaces = _replaces(parts, channel)
        if locks.acquire(stream, _ELSEWHERE, shared=not replaces, wait=False) is False:
            say(
                f"Another run uses the bridge of {channel.name} with another compiler or other locks; waiting for it "
                f"to end. To go on at once, {_ELSEWHERE}."
            )
            locks.acquire(stream, shared=not replaces)
        yield


def _replaces(parts: Parts, channel: Path) -> bool:
    """Whether packages that another run may use are dropped; adding those of another Python drops none."""
    if not _is_of_this_layout(channel):
        return any(channel.glob(".complete-*"))
    others = channel.glob(f".complete-py{parts.interpreter.minor}-*")
    return any(other != _stamp(parts, channel) for other in others)


def _open_lock(channel: Path) -> IO[str]:
    channel.mkdir(parents=True, exist_ok=True)
    return (channel / ".in-use").open("w+")  # NFS wants the right to read for a shared lock, to write for another.


def _check_disk(parts: Parts, workspace: Workspace) -> None:
    needed = bytes_needed(parts, workspace).disk
    have = free_disk(workspace.cache)
    if have < needed:
        raise MachineError(
            f"assembling the bridge needs {human_bytes(needed)} of disk at {workspace.cache}, which has "
            f"{human_bytes(have)}.",
            fix="Free space, or set SSM_FORGE_CACHE_DIR to a folder on a larger disk.",
        )
