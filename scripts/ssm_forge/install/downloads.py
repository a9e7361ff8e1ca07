"""Package archives: where a locked package's file is taken from, and the proof that it is the locked one.

py-rattler checks the hash of what it downloads, but not of ``file://`` packages (0.28): everything local goes
through :func:`require_intact` before it is unpacked.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

import httpx
from rattler import RepoDataRecord

from ssm_forge.base.credentials import redact
from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.base.fetch import Artifact, checked, fetch_all
from ssm_forge.base.mirrors import mirrored
from ssm_forge.base.paths import Workspace
from ssm_forge.base.web import HOW_TO_LOG_IN, refused, session
from ssm_forge.manifest.virtual import channel_url
from ssm_forge.package.intact import CHUNK_BYTES, digest, require_intact

_SUBDIR = re.compile(r"[a-z0-9]+(-[a-z0-9_]+)?")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+!-]*")


@dataclass(frozen=True)
class Mirror:
    """Where packages are taken from instead: what is under the URL ``source`` comes from ``target``.

    Attributes:
        source: URL prefix, ending in a slash.
        target: a folder, or an URL ending in a slash.
    """

    source: str
    target: Path | str

    @classmethod
    def parse(cls, text: str) -> Mirror:
        """Read ``URL=DIR`` as ``--mirror`` takes it into a mirror.

        A channel's name stands for its URL, and DIR may be a URL.

        Raises:
            UsageError: when there is no ``=``, or DIR is no folder.
        """
        source, equals, target = text.rpartition("=")
        if not equals or not source or not target:
            raise UsageError(f"--mirror '{text}' is not of the form URL=DIR.")
        source = channel_url(source)
        if target.startswith(("http://", "https://")):
            return cls(source, target.rstrip("/") + "/")
        folder = _path(target) if target.startswith("file://") else Path(target)
        if not folder.is_dir():
            raise UsageError(f"--mirror '{text}': {folder} is not a folder.")
        return cls(source, folder.resolve())


def local_file(record: RepoDataRecord, mirrors: Sequence[Mirror]) -> Path | None:
    """The record's file on this machine, if a mirror folder or its own ``file://`` URL leads to one."""
    for mirror in mirrors:
        if isinstance(mirror.target, Path) and record.url.startswith(mirror.source):
            rest = PurePosixPath(unquote(record.url[len(mirror.source) :]))
            path = mirror.target / rest
            # A lock comes from anywhere: it names no file outside of the mirror.
            if ".." not in rest.parts and not rest.is_absolute() and path.is_file():
                return path
    return _path(record.url) if record.url.startswith("file://") else None


def network_mirrors(mirrors: Iterable[Mirror]) -> dict[str, list[str]]:
    """The mirrors that are URLs, as py-rattler takes them: source -> where to look, the source itself last."""
    targets_of: dict[str, list[str]] = {}
    for mirror in mirrors:
        if isinstance(mirror.target, str):
            targets_of.setdefault(mirror.source, []).append(mirror.target)
    return {source: [*targets, source] for source, targets in targets_of.items()}


def require_plain_names(records: Iterable[RepoDataRecord]) -> None:
    """Make sure that what records say can be used as the name of a file and of a folder.

    Raises:
        IntegrityError: when such a name would lead elsewhere: locks and environments may come from anybody.
    """
    for record in records:
        names = (record.file_name, f"{record.name.normalized}-{record.version}-{record.build}")
        if not _SUBDIR.fullmatch(record.subdir) or not all(map(_PLAIN.fullmatch, names)):
            raise IntegrityError(
                f"{record.subdir!r}, {names[0]!r}, {names[1]!r} are not a platform, a package's file and its name.",
                fix="Ask whoever made the lock, archive or environment; do not use it.",
            )


def collect(
    records: Sequence[RepoDataRecord], mirrors: Sequence[Mirror], folder: Path, workspace: Workspace
) -> list[Path]:
    """Put every record's archive, verified, into ``folder/SUBDIR/``; downloads what is not on this machine.

    Returns:
        The archives, in the order of the records.

    Raises:
        IntegrityError: when bytes differ from the lock.
        NetworkError: when something can't be downloaded.
    """

    require_plain_names(records)
    local = {r.file_name: path for r in records if (path := local_file(r, mirrors)) is not None}
    remote = [r for r in records if r.file_name not in local]
    artifacts = {
        r.file_name: Artifact(_mirrored(r.url, mirrors), digest(r)[1], r.size or 0, r.file_name)
        for r in remote
        if digest(r)[0] == "sha256"
    }
    fetch_all(list(artifacts.values()), workspace)
    archives = []
    for record in records:
        target = folder / record.subdir / record.file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        if record.file_name in artifacts:
            shutil.copyfile(checked(artifacts[record.file_name], workspace), target)
        elif record.file_name in local:
            require_intact(record, local[record.file_name])
            shutil.copyfile(local[record.file_name], target)
        else:
            _download(_mirrored(record.url, mirrors), target)
        require_intact(record, target)
        archives.append(target)
    return archives


def _mirrored(url: str, mirrors: Sequence[Mirror]) -> str:
    for mirror in mirrors:
        if isinstance(mirror.target, str) and url.startswith(mirror.source):
            return mirror.target + url[len(mirror.source) :]
    return mirrored(url)


def _download(url: str, target: Path) -> None:
    """For the few packages with md5 alone, which the content-addressed cache can't hold."""
    try:
        with session() as client, client.stream("GET", url) as answer:
            answer.raise_for_status()
            with target.open("wb") as stream:
                for chunk in answer.iter_bytes(CHUNK_BYTES):
                    stream.write(chunk)
    except httpx.HTTPError as error:
        raise NetworkError(
            redact(f"{url} could not be downloaded ({error})."),
            fix=HOW_TO_LOG_IN if refused(error) else "Check the network, or give a --mirror.",
        ) from error


def _path(url: str) -> Path:
    return Path(unquote(urlparse(url).path))
