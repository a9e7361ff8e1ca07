"""Downloads: parallel, resumed, verified by sha256, kept in a content-addressed cache."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.progress import Progress, TaskID

from ssm_forge.base import locks, owners
from ssm_forge.base.errors import ForgeError, IntegrityError, MachineError, NetworkError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.ui import download_progress, human_bytes
from ssm_forge.base.web import HOW_TO_LOG_IN, session

_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 4
# A host that can't be reached is most often a missing network: say so soon.
_CONNECT_ATTEMPTS = 2
_PARALLEL = 6


@dataclass(frozen=True)
class Artifact:
    """A file on the network, pinned.

    Attributes:
        url: where it is.
        sha256: hexadecimal digest of its bytes.
        size: in bytes, 0 where unknown.
        name: file name.
    """

    url: str
    sha256: str
    size: int
    name: str


def cached_path(artifact: Artifact, workspace: Workspace) -> Path:
    """Where the cache has a file, or will have it."""
    return workspace.downloads / artifact.sha256 / artifact.name


def missing(artifacts: Sequence[Artifact], workspace: Workspace) -> list[Artifact]:
    """Those that would have to be downloaded."""
    return [a for a in artifacts if not cached_path(a, workspace).exists()]


def adopt(artifact: Artifact, path: Path, workspace: Workspace) -> None:
    """Put a copy of a file, whose bytes are the artifact's, into the cache."""
    target = cached_path(artifact, workspace)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{owners.mark()}.part")
    shutil.copyfile(path, partial)
    partial.replace(target)


def fetch_all(artifacts: Sequence[Artifact], workspace: Workspace) -> dict[Artifact, Path]:
    """Download what the cache lacks and return where each file is.

    Files already cached are hashed again by :func:`checked` when they are used, not here.

    Raises:
        NetworkError: when a host does not answer or does not have the file.
        IntegrityError: when the bytes are not those of the lock; nothing is kept.
        MachineError: when the disk is full.
    """
    _sweep(workspace)
    todo = list(dict.fromkeys(missing(artifacts, workspace)))
    if todo:
        total = sum(a.size for a in todo)
        with download_progress() as progress:
            task = progress.add_task(f"downloading {len(todo)} files", total=total or None)
            stop = threading.Event()
            limits = httpx.Limits(max_connections=_PARALLEL * 2)
            with (
                session(timeout=httpx.Timeout(30, connect=10), limits=limits) as client,
                ThreadPoolExecutor(_PARALLEL) as pool,
            ):
                # Largest first, so that the last download is a short one.
                ordered = sorted(todo, key=lambda a: -a.size)
                jobs = [pool.submit(_fetch, a, workspace, client, progress, task, stop) for a in ordered]
                try:
                    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                    failed = next((job for job in done if job.exception()), None)
                    if failed is not None:
                        failed.result()
                except BaseException:
                    # Ctrl-C too: the pool would wait for every download that is queued.
                    stop.set()
                    for job in jobs:
                        job.cancel()
                    raise
    return {a: cached_path(a, workspace) for a in artifacts}


def checked(artifact: Artifact, workspace: Workspace) -> Path:
    """The cached file, after its hash was compared with the lock.

    Raises:
        IntegrityError: when it differs; the file is removed, so that the next run downloads it again.
    """
    path = cached_path(artifact, workspace)
    sha256 = sha256_of(path)
    if sha256 != artifact.sha256:
        path.unlink()
        raise _mismatch(artifact, sha256, str(path))
    return path


def mirrored(url: str) -> str:
    """``url`` with the prefix replaced as ``SSM_FORGE_MIRRORS`` (``FROM=TO``, space separated) says."""
    for rule in os.environ.get("SSM_FORGE_MIRRORS", "").split():
        prefix, _, replacement = rule.partition("=")
        if prefix and replacement and url.startswith(prefix):
            return replacement + url[len(prefix) :]
    return url


def _fetch(
    artifact: Artifact,
    workspace: Workspace,
    client: httpx.Client,
    progress: Progress,
    task: TaskID,
    stop: threading.Event,
) -> None:
    target = cached_path(artifact, workspace)
    target.parent.mkdir(parents=True, exist_ok=True)
    # One partial file per process: two runs at once must not write into each other's.
    partial = target.with_name(f"{target.name}.{owners.mark()}.part")
    adopted = _adopt_leftover(target, partial)
    with _held(partial):
        _fill(artifact, partial, workspace, client, progress, task, stop)
        sha256 = sha256_of(partial)
        if sha256 == artifact.sha256:
            partial.replace(target)
            return
        progress.advance(task, -partial.stat().st_size)
        partial.unlink()
    if not adopted:
        raise _mismatch(artifact, sha256, mirrored(artifact.url))
    # What the killed run left may be what is wrong.
    _fetch(artifact, workspace, client, progress, task, stop)


def _fill(
    artifact: Artifact,
    partial: Path,
    workspace: Workspace,
    client: httpx.Client,
    progress: Progress,
    task: TaskID,
    stop: threading.Event,
) -> None:
    """Download into ``partial`` until it is whole, or its host has failed too often.

    Not :func:`web.retrying`: each attempt goes on where the one before stopped, waits no longer once another download
    has failed, and a host that can't be reached at all is given up sooner.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _download(artifact, partial, client, progress, task, stop)
            break
        except httpx.HTTPError as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
            unreachable = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            last = attempt >= (_CONNECT_ATTEMPTS if unreachable else _ATTEMPTS) or stop.is_set()
            # Busy servers (429, 5xx) are asked again; everything else is an answer.
            if status and (last or not (status == httpx.codes.TOO_MANY_REQUESTS or status >= 500)):
                raise _refused(artifact, status) from error
            if last:
                raise NetworkError(
                    f"{mirrored(artifact.url)} could not be downloaded ({type(error).__name__}: {error}).",
                    fix="Check the network (SSM_FORGE_MIRRORS=FROM=TO sets a mirror) and run the same command "
                    "again; it goes on where it stopped.",
                ) from error
            stop.wait(2**attempt / 2)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno == errno.ENOSPC:
                raise MachineError(
                    f"the disk of {workspace.downloads} is full; {artifact.name} needs {human_bytes(artifact.size)}.",
                    fix="Free space, or set SSM_FORGE_CACHE_DIR to a folder on a larger disk.",
                ) from error
            raise


def _adopt_leftover(target: Path, partial: Path) -> bool:
    """Go on with what a killed run left, if nobody writes into it any more."""
    for leftover in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
        if leftover != partial and _is_abandoned(leftover):
            # Another run may adopt it at the same moment.
            with suppress(FileNotFoundError):
                leftover.replace(partial)
    return partial.exists()


def _sweep(workspace: Workspace) -> None:
    """Remove what was begun a week ago and nobody went on with: the same file may never be wanted again."""
    for leftover in workspace.downloads.glob("*/*.part"):
        if owners.forgotten(leftover) and _is_abandoned(leftover):
            leftover.unlink(missing_ok=True)


def _is_abandoned(leftover: Path) -> bool:
    ended = owners.gone(leftover.name)
    if ended is not None:
        return ended
    # Of another machine, container or boot: whoever writes into it holds its lock.
    if owners.is_marked(leftover.name):
        with suppress(FileNotFoundError), leftover.open("rb+") as stream:
            free = locks.acquire(stream, wait=False)
            if free is not None:
                return free
    return owners.forgotten(leftover)


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Say to other machines that the file is being written; an empty one is not left behind."""
    with partial.open("ab") as stream:
        locks.acquire(stream, wait=False)
        try:
            yield
        finally:
            if partial.exists() and not partial.stat().st_size:
                partial.unlink()


def _download(
    artifact: Artifact,
    partial: Path,
    client: httpx.Client,
    progress: Progress,
    task: TaskID,
    stop: threading.Event,
) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    # Compressed in transit, byte ranges would not be those of the file.
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with client.stream("GET", mirrored(artifact.url), headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            os.truncate(partial, 0)  # Not removed: the lock is on this very file.
            raise httpx.ReadError("the partial file did not fit; starting over")
        response.raise_for_status()
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        counted = have if resumed else 0
        progress.advance(task, counted)
        try:
            with partial.open("ab" if resumed else "wb") as stream:
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    if stop.is_set():
                        raise httpx.ReadError("stopped because another download failed")
                    stream.write(chunk)
                    counted += len(chunk)
                    progress.advance(task, len(chunk))
        except BaseException:
            # The next attempt counts what is there already.
            progress.advance(task, -counted)
            raise


def _refused(artifact: Artifact, status: int) -> ForgeError:
    fix = "Run the same command again later."
    if status == httpx.codes.UNAUTHORIZED:
        fix = HOW_TO_LOG_IN
    elif status in (403, 404, 410):
        fix = f"The lock is out of date: refresh it with '{launcher()} bump bridge'."
    return NetworkError(f"{mirrored(artifact.url)} answered {status}.", fix=fix)


def _mismatch(artifact: Artifact, sha256: str, where: str) -> IntegrityError:
    return IntegrityError(
        f"sha256 of {where} is {sha256}, but the lock says {artifact.sha256}; the file was not used.",
        fix="Run the same command again; if it happens again, the file or the lock was tampered with.",
    )
