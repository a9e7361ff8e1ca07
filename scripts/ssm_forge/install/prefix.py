"""Installs packages into a prefix with the engine: a new prefix appears whole, an existing one is only added to."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_forge.base import locks, mirrors, owners
from ssm_forge.base.credentials import for_engine
from ssm_forge.base.errors import ForgeError, InstallError, IntegrityError, NetworkError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import Log, step_progress
from ssm_forge.base.web import HOW_TO_LOG_IN
from ssm_forge.channel import policy
from ssm_forge.install.downloads import local_file
from ssm_forge.install.marker import Installed, check_target, write_marker
from ssm_forge.install.swap import discard, locked, replacing, swap, sweep
from ssm_forge.package.intact import require_all_intact

if TYPE_CHECKING:
    from rattler import RepoDataRecord


def install(
    packages: Sequence[RepoDataRecord],
    prefix: Path,
    installed: Installed,
    workspace: Workspace,
    log: Log,
    rules: Sequence[policy.Rule] | None = None,
) -> None:
    """Link ``packages`` into ``prefix`` and write the marker.

    A prefix of our own is made beside its place and renamed into it, so that it is there whole or not at all.
    A prefix that existed before is added to in place.

    Args:
        rules: the trust policy; None for the one that is in force here.

    Raises:
        IntegrityError: when a package lacks the statement that the policy asks for, or its bytes are not those that its
            record names; nothing is linked then.
        NetworkError: when a package can't be downloaded.
        InstallError: when linking fails; a prefix of our own is then unchanged.
    """
    prefix = prefix.absolute()
    admitted = policy.admit(packages, workspace, rules, log)
    with locked(prefix):
        if not installed.created:
            _link(admitted, prefix, None, workspace, log)
            write_marker(prefix, installed)
            return
        sweep(prefix)
        if not _engine_relocates():
            with replacing(prefix):
                _link(admitted, prefix, None, workspace, log)
                (prefix / "conda-meta/history").touch()
                write_marker(prefix, installed)
            return
        check_target(prefix)
        fresh = prefix.with_name(f".{prefix.name}.new-{owners.mark()}")
        try:
            _link(admitted, fresh, prefix, workspace, log)
            # conda's own tools know an environment by its history file.
            (fresh / "conda-meta/history").touch()
            write_marker(fresh, installed)
            swap(fresh, prefix)
        except BaseException:
            discard(fresh)
            raise


def _engine_relocates() -> bool:
    """Whether the engine can write one prefix into files that it puts elsewhere (py-rattler 0.28, not 0.25)."""
    import rattler

    return "alternative_target_prefix" in inspect.signature(rattler.install).parameters


@for_engine()
def _link(admitted: policy.Admitted, target: Path, final: Path | None, workspace: Workspace, log: Log) -> None:
    import rattler

    packages = admitted.records
    relocation: dict[str, Any] = {"alternative_target_prefix": final} if final else {}
    log(f"installing {len(packages)} packages into {target}")
    # The engine checks what it downloads, and trusts what lies in a folder.
    local = [(record, path) for record in packages if (path := local_file(record, ())) is not None]
    require_all_intact(local)
    with step_progress() as progress:
        task = progress.add_task(f"installing {len(packages)} packages", total=len(packages))

        class Reporter(rattler.InstallerReporter):
            def on_transaction_start(self, total_operations: int) -> None:
                progress.update(task, total=total_operations)

            def on_transaction_operation_complete(self, operation: int) -> None:
                progress.advance(task)

        try:
            asyncio.run(
                rattler.install(
                    records=list(packages),
                    target_prefix=target,
                    cache_dir=workspace.package_cache,
                    # The engine's own default knows no credentials and no mirrors.
                    client=mirrors.client(),
                    show_progress=False,
                    reporter=Reporter(),  # type: ignore[abstract]
                    **relocation,
                )
            )
        except Exception as error:
            # The engine has no common base class for its failures: disk, permission, hash, network.
            raise _explained(error, final or target, log) from error


_NETWORK = (
    "error sending request",
    "lookup address",
    "status client error",
    "status server error",
    "error decoding response body",
    "timed out",
)


def kind_of_failure(message: str) -> type[ForgeError]:
    """The type of error that the engine's message is about; the engine has one type for everything.

    A package that is not what its record says fails in some twenty ways, which differ from one py-rattler to the next
    (another hash, zip's or tar's or zstd's complaints, whichever comes first). What else can fail while a package is
    fetched is the network and the machine, and those can be told: by few words, and by the system's error number.
    """
    if any(words in message for words in _NETWORK):
        return NetworkError
    if "failed to fetch" in message and "(os error" not in message:
        return IntegrityError
    return InstallError


def _explained(error: Exception, prefix: Path, log: Log) -> ForgeError:
    text = " ".join(str(error).split())
    again = "then run the same command again."
    kind = kind_of_failure(text)
    if kind is IntegrityError:
        return IntegrityError(
            f"a package is not what its channel's index says: {text}. Nothing was installed.",
            fix="Run the same command again; if it happens again, tell whoever runs the channel.",
            log=log.path,
        )
    if kind is NetworkError:
        refused = "401 Unauthorized" in text or "403 Forbidden" in text
        fix = HOW_TO_LOG_IN if refused else f"Check the network, {again}"
        return NetworkError(f"a package could not be fetched: {text}. Nothing was installed.", fix=fix, log=log.path)
    fix = f"Check that the folder is writable and the disk not full, {again}"
    if any(f"(os error {number})" in text for number in locks.NOT_THERE):
        fix = "Its file system lacks something; set SSM_FORGE_CACHE_DIR, or --prefix, to a folder on a local disk."
    return InstallError(f"packages could not be linked into {prefix}: {text}.", fix=fix, log=log.path)
