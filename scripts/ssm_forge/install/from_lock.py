"""Environments from a lock alone: no solve, every hash checked, all or nothing."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import rattler
import rattler.exceptions
from rattler import RepoDataRecord

from ssm_forge.base.credentials import for_engine, redact
from ssm_forge.base.errors import ForgeError, InstallError, IntegrityError, NetworkError, UsageError
from ssm_forge.base.files import replacing
from ssm_forge.base.mirrors import client as channel_client
from ssm_forge.base.paths import Workspace
from ssm_forge.base.web import HOW_TO_LOG_IN
from ssm_forge.channel import policy
from ssm_forge.install import marker, swap
from ssm_forge.install import prefix as install
from ssm_forge.install.downloads import Mirror, local_file, network_mirrors, require_plain_names
from ssm_forge.install.integrity import Report, verify
from ssm_forge.manifest.virtual import subdir_type
from ssm_forge.package.intact import require_all_intact
from ssm_forge.solve.lock import LockedEnvironment

_TIMEOUT_SECONDS = 60


def create(
    locked: LockedEnvironment,
    prefix: Path,
    *,
    mirrors: Sequence[Mirror],
    workspace: Workspace,
    force: bool = False,
    installed: marker.Installed | None = None,
    rules: Sequence[policy.Rule] | None = None,
) -> Report:
    """Make ``prefix`` exactly the locked environment, verify it, and return what was compared.

    A prefix that was there is set aside, and comes back if the new one can't be made. One run at a time: a second one
    for the same prefix waits.

    Args:
        installed: what the marker is to say of the environment; None for one that only a lock describes.
        rules: the trust policy; None for the one that is in force here.

    Raises:
        UsageError: when ``prefix`` exists and ``force`` is not set.
        IntegrityError: when a package's bytes are not the locked ones, or it lacks the statement that the policy asks
            for; nothing of it is installed.
        NetworkError: when a package can't be downloaded.
        InstallError: when linking fails, or ``prefix`` is something else than an environment.
    """
    _check_free(prefix, force)
    require_plain_names(locked.records)
    files = [(r, path) for r in locked.records if (path := local_file(r, mirrors)) is not None]
    require_all_intact(files)
    _require_hashes(locked)
    admitted = policy.admit(locked.records, workspace, rules, beside=lambda record: local_file(record, mirrors))
    with swap.locked(prefix):
        # Again: a run that this one waited for may have made it.
        _check_free(prefix, force)
        with swap.replacing(prefix):
            report = _install_and_verify(locked, admitted, prefix, mirrors, workspace)
            if installed is not None:
                marker.write_marker(prefix, installed)
            return report


def _check_free(prefix: Path, force: bool) -> None:
    marker.check_target(prefix)
    finished = prefix.exists() and not (prefix / marker.UNFINISHED).exists()
    if finished and any(prefix.iterdir()) and not force:
        raise UsageError(f"{prefix} exists already.", fix="Add --force to make it anew, or choose another --prefix.")


def _require_hashes(locked: LockedEnvironment) -> None:
    for record in locked.records:
        if not record.sha256 and not record.md5:
            raise IntegrityError(f"the lock has no hash of {record.file_name}, so it can't be trusted.")


def _install_and_verify(
    locked: LockedEnvironment,
    admitted: policy.Admitted,
    prefix: Path,
    mirrors: Sequence[Mirror],
    workspace: Workspace,
) -> Report:
    """Link, then compare every file; unpacked copies in the cache that turn out damaged are replaced once."""
    for attempt in (1, 2):
        _link(admitted, locked.platform.subdir, prefix, mirrors, workspace)
        report = verify(prefix, locked.records)
        deviations = [d for d in report.deviations if d.kind != "incomplete"]
        if not deviations:
            return Report((), report.packages, report.files, report.unhashed, report.on_top)
        if attempt == 2:
            break
        # Environments share files with the cache by hard link, so an edit in one damages the cached copy.
        damaged = {d.package for d in deviations}
        for record in locked.records:
            if record.name.normalized in damaged:
                stem = f"{record.name.normalized}-{record.version}-{record.build}"
                shutil.rmtree(workspace.package_cache / stem, ignore_errors=True)
        for entry in prefix.iterdir():
            if entry.name != "conda-meta":
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for meta in (prefix / "conda-meta").glob("*.json"):
            meta.unlink()
    raise InstallError(
        f"the new environment is not what the lock says: {deviations[0]} ({len(deviations)} deviations)."
    )


@for_engine()
def _link(
    admitted: policy.Admitted, subdir: str, prefix: Path, mirrors: Sequence[Mirror], workspace: Workspace
) -> None:
    canonical = {r.name.normalized: r.url for r in admitted.records}
    records = []
    for record in admitted.records:
        path = local_file(record, mirrors)
        records.append(record if path is None else _from_file(record, path))
    client = channel_client(timeout=_TIMEOUT_SECONDS, first=network_mirrors(mirrors))
    try:
        asyncio.run(
            rattler.install(
                records,
                prefix,
                cache_dir=workspace.package_cache,
                platform=subdir_type(subdir),
                client=client,
                show_progress=True,
            )
        )
    except rattler.exceptions.InstallerError as error:
        raise _explain(str(error)) from error
    _restore_urls(prefix, canonical)


def _from_file(record: RepoDataRecord, path: Path) -> RepoDataRecord:
    return RepoDataRecord(record, record.file_name, path.resolve().as_uri(), str(record.channel))


def _explain(message: str) -> ForgeError:
    lines = [line.removeprefix("Caused by: ") for line in message.splitlines() if line.strip()]
    reason = f"{lines[0]}: {lines[-1]}" if len(lines) > 1 else message
    kind = install.kind_of_failure(message)
    if kind is IntegrityError:
        return IntegrityError(f"a package is not the locked one: {reason.rstrip('.')}. Nothing was installed.")
    if kind is NetworkError:
        refused = "401 Unauthorized" in message or "403 Forbidden" in message
        fix = HOW_TO_LOG_IN if refused else "Check the network, or give a --mirror URL=DIR that has the package."
        return NetworkError(redact(f"{reason}."), fix=fix)
    return InstallError(f"the environment could not be made: {reason}.")


def _restore_urls(prefix: Path, canonical: dict[str, str]) -> None:
    """Record where a package belongs, not the mirror it was taken from; all else in its record stays as it is."""
    for path in (prefix / "conda-meta").glob("*.json"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        url = canonical.get(meta["name"])
        if url and meta["url"] != url:
            meta["url"] = url
            with replacing(path) as partial:
                partial.write_text(json.dumps(meta, indent=2), encoding="utf-8")
