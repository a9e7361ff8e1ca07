"""Solving: which packages satisfy these specs, from these channels, on a machine with these properties.

The engine is py-rattler, the one inside pixi. Channels are read online, or from a snapshot: a folder with the
``repodata.json.zst`` of each channel and subdir, as recorded. Both give canonical URLs and hashes.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import rattler
import rattler.exceptions
from rattler import Channel, ChannelPriority, MatchSpec, RepoDataRecord, SparseRepoData

from ssm_forge.base import mirrors
from ssm_forge.base.credentials import for_engine, redact
from ssm_forge.base.errors import ForgeError, NetworkError, SolveError, UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.base.platforms import LINUX_64
from ssm_forge.base.web import HOW_TO_LOG_IN, session
from ssm_forge.channel import index as repodata
from ssm_forge.channel.local_index import folder_of, repodata_file, require_readable
from ssm_forge.manifest.virtual import VirtualPackage, channel_url, subdir_type, virtual_packages

# Lines of the solver's explanation worth showing; the rest lists more alternatives of the same kind.
_MOST_LINES = 14
_TIMEOUT_SECONDS = 60
# Of all channels together, name lookup included.
_PROBE_SECONDS = 8


@dataclass(frozen=True)
class Request:
    """What is to be solved, and for which machine.

    Attributes:
        specs: what must be in the result, as match specs.
        channels: names or URLs, ``file://`` ones too; the first has the highest priority.
        virtual: the target machine.
        subdir: conda platform; ``noarch`` is always read too.
        constraints: what must hold of a package if it is in the result.
        strict: take a package only from the first channel that has it, as pixi does.
        snapshot: folder of recorded repodata for channels that are not ``file://``; None to read them online.
        extra: records no channel has yet, file name -> repodata entry; they take precedence over channels.
        pinned: records that are installed and must stay as they are.
        purpose: what is being solved, for error messages.
        offers_snapshot: the command that asks has the option ``--snapshot``, so that errors may name it.
    """

    specs: tuple[str, ...]
    channels: tuple[str, ...]
    virtual: tuple[VirtualPackage, ...] = field(default_factory=virtual_packages)
    subdir: str = LINUX_64.subdir
    constraints: tuple[str, ...] = ()
    strict: bool = True
    snapshot: Path | None = None
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pinned: tuple[RepoDataRecord, ...] = ()
    purpose: str = "the environment"
    offers_snapshot: bool = False


def solve(request: Request) -> list[RepoDataRecord]:
    """Solve, and return the records sorted by name.

    Raises:
        SolveError: when nothing satisfies the request, with the solver's reason.
        NetworkError: when a channel can't be reached.
        UsageError: when the snapshot lacks a channel, or a spec can't be read.
    """
    return sorted(_solve(request), key=lambda r: r.name.normalized)


def solve_in_order(request: Request) -> list[RepoDataRecord]:
    """Solve, and return the records in the order in which pixi's solver decides on them.

    It depends on how the engine reads channels: recorded ones are read here as if they were folders with channels.
    The request may not name a channel in a spec, nor pin records.

    Raises:
        SolveError, NetworkError, UsageError: as :func:`solve`.
    """
    if request.snapshot is None:
        return _solve(request)
    with _recorded_as_folders(request) as folders:
        try:
            records = _solve(replace(request, channels=tuple(folders), snapshot=None))
        except SolveError:
            # Solved again for an error that names the channels.
            return _solve(request)
    return [_moved(record, folders) for record in records]


@contextmanager
def _recorded_as_folders(request: Request) -> Iterator[dict[str, str]]:
    """``file://`` URL of a folder -> URL of the recorded channel that it holds, in the order of the channels."""
    assert request.snapshot is not None
    with tempfile.TemporaryDirectory(prefix="ssm-forge-recorded-") as scratch:
        urls_of_folders = {}
        for number, channel in enumerate(request.channels):
            base = channel_url(channel)
            recorded = folder_of(base, request.snapshot)
            assert recorded is not None
            for part in (request.subdir, "noarch"):
                target = Path(scratch) / str(number) / part / "repodata.json"
                target.parent.mkdir(parents=True)
                if (path := repodata_file(recorded / part)) is not None:
                    target.symlink_to(path.resolve())
            if not any((Path(scratch) / str(number)).glob("*/*")):
                raise _no_record(channel, recorded, request)
            urls_of_folders[channel_url(Path(scratch, str(number)).as_uri())] = base
        yield urls_of_folders


def _moved(record: RepoDataRecord, folders: Mapping[str, str]) -> RepoDataRecord:
    """The record with the address that its package has."""
    folder = str(record.channel)
    base = folders[folder]
    # An index may name the place of its packages itself.
    url = base + record.url.removeprefix(folder) if record.url.startswith(folder) else record.url
    return RepoDataRecord(record, record.file_name, url, base)


@for_engine()
def _solve(request: Request) -> list[RepoDataRecord]:
    specs = [_parse_spec(text) for text in request.specs]
    constraints = [_parse_spec(text) for text in request.constraints]
    with _extra_channel(request) as extra:
        sources = (*extra, *request.channels)
        common: dict[str, Any] = {
            "specs": specs,
            "constraints": constraints,
            "pinned_packages": list(request.pinned),
            "virtual_packages": [v.to_rattler() for v in request.virtual],
            "channel_priority": ChannelPriority.Strict if request.strict else ChannelPriority.Disabled,
        }
        if request.snapshot is None:
            require_reachable(request.channels, offers_snapshot=request.offers_snapshot)
        try:
            if request.snapshot is None:
                records = asyncio.run(_solve_online(sources, request.subdir, common))
            else:
                recorded = [sparse for c in sources for sparse in _sparse(c, request, request.snapshot)]
                records = asyncio.run(rattler.solve_with_sparse_repodata(sparse_repodata=recorded, **common))
        except rattler.exceptions.SolverError as error:
            raise SolveError(
                f"no set of packages satisfies {request.purpose}: {_shorten(str(error))}\n"
                f"The channels asked were {', '.join(request.channels)}.",
                fix=_solve_fix(request),
            ) from error
        except (rattler.exceptions.GatewayError, rattler.exceptions.FetchRepoDataError) as error:
            # A failed gateway leaves threads behind that crash the interpreter if it ends at once.
            time.sleep(0.5)
            # An answer that is refused is told with its body after it, which may be empty.
            summary = str(error).partition("\n\nBody:")[0].strip()
            reason = summary.splitlines()[-1].removeprefix("Caused by: ")
            require_readable(request.channels, request.subdir, request.snapshot)
            if repodata.damage_in(str(error)):
                raise repodata.DamagedIndexError(
                    redact(", ".join(request.channels)), f"is damaged ({reason})"
                ) from error
            raise _unreachable(request.channels, reason, request.offers_snapshot) from error
        except OSError:
            # How the engine reports recorded or local repodata that it can't read.
            require_readable(request.channels, request.subdir, request.snapshot)
            raise
    return list(records)


async def _solve_online(sources: Sequence[str], subdir: str, common: Mapping[str, Any]) -> list[RepoDataRecord]:
    cache = workspace().cache / "repodata"
    cache.mkdir(parents=True, exist_ok=True)
    gateway = rattler.Gateway(cache_dir=cache, client=mirrors.client(timeout=_TIMEOUT_SECONDS))
    return await rattler.solve(
        sources=[Channel(s) for s in sources],
        platforms=[subdir_type(subdir), subdir_type("noarch")],
        gateway=gateway,
        **common,
    )


def _parse_spec(text: str) -> MatchSpec:
    try:
        return MatchSpec(text)
    except Exception as error:
        raise UsageError(f"'{text}' is not a package spec ({error}).") from error


def _sparse(channel: str, request: Request, snapshot: Path) -> list[SparseRepoData]:
    """The repodata of a channel for ``subdir`` and noarch, from its own folder or from the snapshot."""
    base = channel_url(channel)
    folder = folder_of(base, snapshot)
    assert folder is not None
    recorded = [
        SparseRepoData(Channel(channel), part, str(path))
        for part in (request.subdir, "noarch")
        if (path := repodata_file(folder / part)) is not None
    ]
    if not recorded:
        raise _no_record(channel, folder, request)
    return recorded


def _no_record(channel: str, folder: Path, request: Request) -> UsageError:
    problem = f"{request.snapshot} holds no recorded repodata of channel {channel}"
    if channel_url(channel).startswith("file://"):
        problem = f"{folder} is not a conda channel: it has no repodata.json for {request.subdir} or noarch"
    online = ", or leave --snapshot out to solve online" if request.offers_snapshot else ""
    return UsageError(f"{problem} (looked in {folder}).", fix=f"Check the folder{online}.")


@contextmanager
def _extra_channel(request: Request) -> Iterator[tuple[str, ...]]:
    """A throw-away channel that holds ``request.extra``, if there is any."""
    if not request.extra:
        yield ()
        return
    with tempfile.TemporaryDirectory(prefix="ssm-forge-records-") as folder:
        for part in (request.subdir, "noarch"):
            entries = {name: dict(r) for name, r in request.extra.items() if r.get("subdir", request.subdir) == part}
            path = Path(folder) / part / "repodata.json"
            path.parent.mkdir()
            content = {
                "info": {"subdir": part},
                "packages": {},
                "packages.conda": entries,
                "repodata_version": 1,
            }
            path.write_text(json.dumps(content), encoding="utf-8")
        yield (Path(folder).as_uri(),)


def _shorten(message: str) -> str:
    """The solver's explanation without its opening phrase, and cut where it only lists more of the same."""
    text = message.removeprefix("Cannot solve the request because of: ").strip()
    lines = text.splitlines()
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"... and {len(lines) - _MOST_LINES} more lines"]
    return "\n".join(lines)


def _solve_fix(request: Request) -> str:
    if request.snapshot is not None and request.offers_snapshot:
        return (
            f"The recorded repodata in {request.snapshot} may lack a package that the channel has; "
            "without --snapshot the channels themselves are read."
        )
    return "Loosen the spec that the message names."


def require_reachable(
    channels: Sequence[str], seconds: float = _PROBE_SECONDS, *, public: bool = False, offers_snapshot: bool = False
) -> None:
    """Ask each channel on the network for its index, so that a missing network is one quick, clear error.

    Args:
        channels: names or URLs.
        seconds: how long to wait for all of them together.
        public: whether one that asks for credentials is of no use.
        offers_snapshot: the command that asks has the option ``--snapshot``, so that the error may name it.

    Raises:
        NetworkError: when a channel does not answer in time, or has no index; names the first such channel.
    """
    reasons: dict[str, str] = {}
    # Daemons, because a name server that does not answer keeps a thread for longer than any timeout of the request.
    probes = {c: threading.Thread(target=_probe, args=(c, seconds, public, reasons), daemon=True) for c in channels}
    for probe in probes.values():
        probe.start()
    deadline = time.monotonic() + seconds
    for channel, probe in probes.items():
        probe.join(max(0, deadline - time.monotonic()))
        reason = f"no answer in {seconds:g} seconds" if probe.is_alive() else reasons.get(channel, "")
        if reason:
            raise _unreachable((channel,), reason, offers_snapshot)


def _probe(channel: str, seconds: float, public: bool, reasons: dict[str, str]) -> None:
    """Ask one channel; ``reasons`` gets why it is of no use, if it is not."""
    url = mirrors.mirrored(f"{channel_url(channel)}noarch/")
    if not url.startswith(("http://", "https://")):
        return
    try:
        # Servers that hide a private channel answer 404 to strangers, so this says who asks.
        with session(timeout=seconds) as client:
            # Some channels have one of them only.
            for name in ("repodata.json.zst", "repodata.json"):
                status = client.head(url + name).status_code
                if status != httpx.codes.NOT_FOUND:
                    break
    except httpx.HTTPError as error:
        reasons[channel] = str(error) or type(error).__name__
        return
    if status == httpx.codes.NOT_FOUND:
        reasons[channel] = "it has no index for noarch, so it is not a conda channel"
    elif status >= 400 and (public or status not in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)):
        reasons[channel] = f"it answered {status}"


def _unreachable(channels: Sequence[str], reason: str, offers_snapshot: bool) -> ForgeError:
    if "401" in reason or "403" in reason:
        return NetworkError(redact(f"{', '.join(channels)} could not be read ({reason})."), fix=HOW_TO_LOG_IN)
    return NetworkError(
        redact(f"{', '.join(channels)} could not be read ({reason})."),
        fix="Check the network, or solve offline against recorded repodata with --snapshot DIR."
        if offers_snapshot
        else "Check the network and the channel's address, and the mirrors in pixi's configuration if there are any.",
    )
