"""Installs packages into a prefix with the engine: a new prefix appears whole, an existing one is only added to."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ssm_forge import foreign, locks, mirrors, owners, policy
from ssm_forge.arch import ArchList
from ssm_forge.credentials import for_engine
from ssm_forge.errors import ForgeError, InstallError, IntegrityError, NetworkError
from ssm_forge.install_records import present
from ssm_forge.machine import glibc, gpus
from ssm_forge.manifest_virtual import VirtualPackage, virtual_packages
from ssm_forge.package_intact import require_all_intact
from ssm_forge.packages import local_file
from ssm_forge.paths import Workspace
from ssm_forge.solver import Request, solve
from ssm_forge.ui import Log, step_progress
from ssm_forge.web import HOW_TO_LOG_IN

if TYPE_CHECKING:
    from rattler import RepoDataRecord


# Not .json: conda and pixi take every such file here for the record of a package, and refuse the environment.
MARKER = Path("conda-meta/ssm-forge")

# Written first and removed last where a prefix has to be made in its final place.
UNFINISHED = Path("conda-meta/ssm-forge-unfinished")

_DISCARD_SECONDS = 10


@dataclass(frozen=True)
class Installed:
    """What ssm-forge put into a prefix.

    Attributes:
        variant: ``cu130``.
        python: ``3.12``.
        source: ``conda`` or ``bridge``.
        packages: file names of the built packages.
        created: whether the prefix was made by ssm-forge, or existed before.
    """

    variant: str
    python: str
    source: str
    packages: tuple[str, ...]
    created: bool


def read_marker(prefix: Path) -> Installed | None:
    """What is installed there by us, or None."""
    try:
        return installed_from(foreign.json_from(foreign.read_bytes(prefix / MARKER)))
    except (OSError, ValueError):
        return None


def installed_from(content: object) -> Installed:
    """What a marker, or the same table in a pack, says; an environment or an archive may come from anybody.

    Raises:
        ValueError: when it says anything else than :class:`Installed` does.
    """
    foreign.require(content, _INSTALLED)
    told = cast("dict[str, Any]", content)
    if set(told) != set(_INSTALLED):
        raise ValueError(f"it says {sorted(set(told) - set(_INSTALLED))} too")
    return Installed(**{**told, "packages": tuple(told["packages"])})


def _are_file_names(value: object) -> bool:
    return isinstance(value, list) and all(map(foreign.is_file_name, value))


_INSTALLED: dict[str, Callable[[object], bool]] = {
    # They become parts of paths: of a variant's lock, of lib/pythonX.Y.
    "variant": lambda value: value == "" or foreign.is_file_name(value),
    "python": lambda value: isinstance(value, str) and re.fullmatch(r"(3\.[0-9]{1,2})?", value) is not None,
    "source": lambda value: isinstance(value, str) and value.isprintable(),
    "packages": _are_file_names,
    "created": lambda value: isinstance(value, bool),
}


def write_marker(prefix: Path, installed: Installed) -> None:
    partial = prefix / f"{MARKER}.part"
    partial.write_text(json.dumps(asdict(installed), indent=2) + "\n", encoding="utf-8")
    partial.replace(prefix / MARKER)


def machine_virtual_packages() -> tuple[VirtualPackage, ...]:
    """What this machine offers to the solver: glibc, and the driver's CUDA and the GPU where there is one.

    The user's CONDA_OVERRIDE_CUDA, CONDA_OVERRIDE_CUDA_ARCH and CONDA_OVERRIDE_GLIBC hold, as in conda and pixi.
    """
    from rattler import VirtualPackage as Detected
    from rattler import VirtualPackageOverrides

    detected = Detected.detect(VirtualPackageOverrides.from_env())
    found = {str(v.into_generic().name.normalized): str(v.into_generic().version) for v in detected}
    capabilities = sorted(gpu.capability for gpu in gpus())
    return virtual_packages(
        cuda=found.get("__cuda"),
        cuda_arch=os.environ.get("CONDA_OVERRIDE_CUDA_ARCH") or (str(capabilities[0]) if capabilities else None),
        glibc=os.environ.get("CONDA_OVERRIDE_GLIBC") or glibc() or "2.28",
        linux=found.get("__linux", "4.18"),
    )


def target_machine(cuda: str, archs: ArchList | None) -> tuple[VirtualPackage, ...]:
    """This machine, and where it has no driver or GPU, those that the packages are for, so that it can install them.

    Args:
        cuda: CUDA release to assume where there is no driver.
        archs: what the packages are made for; where there is no GPU, one that runs them is assumed.
    """

    virtual = machine_virtual_packages()
    if all(v.name != "__cuda" for v in virtual):
        virtual = (VirtualPackage("__cuda", cuda), *virtual)
    if archs is not None and all(v.name != "__cuda_arch" for v in virtual):
        virtual = (VirtualPackage("__cuda_arch", str(archs.sass[0])), *virtual)
    return virtual


def solve_for_prefix(
    specs: Sequence[str],
    channels: Sequence[str],
    *,
    prefix: Path | None,
    cuda: str,
    archs: ArchList | None = None,
    locked: Sequence[RepoDataRecord] = (),
    pending: Mapping[str, Mapping[str, Any]] | None = None,
    snapshot: Path | None = None,
) -> list[RepoDataRecord]:
    """Solve ``specs``, each package from the first channel that has it.

    Args:
        prefix: an existing environment to add to, whose packages stay as they are; None for a new one.
        cuda: CUDA release to assume where there is no driver, so that a machine without a GPU can install.
        archs: what the packages are made for; where there is no GPU, one that runs them is assumed.
        locked: the packages that a new environment is to have, as they are.
        pending: packages that are still to be built, file name -> index entry.
        snapshot: folder of recorded channel data, to solve offline.

    Raises:
        SolveError: with the solver's reason, when the packages do not fit together.
    """

    kept = tuple(locked) if prefix is None else present(prefix)
    return solve(
        Request(
            specs=(*specs, *(r.name.normalized for r in kept)),
            channels=tuple(channels),
            virtual=target_machine(cuda, archs),
            pinned=kept,
            extra=pending or {},
            snapshot=snapshot,
            purpose=f"{prefix}" if prefix is not None and kept else "the environment",
        )
    )


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
        IntegrityError: when a package lacks the statement that the policy asks for; nothing is linked then.
        InstallError: when linking fails; a prefix of our own is then unchanged.
    """
    prefix = prefix.absolute()
    admitted = policy.admit(packages, workspace, rules, log)
    with locked(prefix):
        if not installed.created:
            _link(admitted, prefix, None, workspace, log)
            write_marker(prefix, installed)
            return
        _sweep(prefix)
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
            _swap(fresh, prefix)
        except BaseException:
            _discard(fresh)
            raise


def _engine_relocates() -> bool:
    """Whether the engine can write one prefix into files that it puts elsewhere (py-rattler 0.28, not 0.25)."""
    import rattler

    return "alternative_target_prefix" in inspect.signature(rattler.install).parameters


@contextmanager
def replacing(prefix: Path) -> Iterator[None]:
    """Make a prefix in its final place: the one that was there is set aside, and comes back on any failure.

    The caller holds the prefix's lock: what other runs have set aside or begun here is taken for a killed one's.

    Raises:
        InstallError: when something else than an environment is there; it is left alone.
    """
    check_target(prefix)
    aside = prefix.with_name(f".{prefix.name}.old-{owners.mark()}")
    if (prefix / UNFINISHED).exists():
        shutil.rmtree(prefix)
    _sweep(prefix)
    if prefix.exists():
        prefix.rename(aside)
    try:
        (prefix / UNFINISHED).parent.mkdir(parents=True)
        (prefix / UNFINISHED).touch()
        yield
        (prefix / UNFINISHED).unlink()
    except BaseException:
        _discard(prefix)
        if aside.exists():
            aside.rename(prefix)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _discard(unfinished: Path) -> None:
    """Remove a prefix that could not be finished, and see that it stays away.

    When one package fails, the engine's threads go on with those that they have begun, and make folders anew.
    """
    deadline = time.monotonic() + _DISCARD_SECONDS
    absent = 0
    while absent < 3 and time.monotonic() < deadline:
        if unfinished.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            absent = 0
        else:
            absent += 1
        time.sleep(0.05)


@for_engine()
def _link(admitted: policy.Admitted, target: Path, final: Path | None, workspace: Workspace, log: Log) -> None:
    import rattler

    packages = admitted.records
    place: dict[str, Any] = {"alternative_target_prefix": final} if final else {}
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
                    **place,
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
    """What the engine's message is about; it has one type of error for everything.

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


def _swap(fresh: Path, prefix: Path) -> None:
    old = prefix.with_name(f".{prefix.name}.old-{owners.mark()}")
    if prefix.exists():
        prefix.rename(old)
    try:
        fresh.rename(prefix)
    except OSError:
        if old.exists():
            old.rename(prefix)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(prefix: Path) -> None:
    """Remove what killed runs left; bring back the old prefix if one died between the two renames."""
    leftovers = [*prefix.parent.glob(f".{prefix.name}.new-*"), *prefix.parent.glob(f".{prefix.name}.old-*")]
    for leftover in leftovers:
        if owners.others_work(leftover.name):
            continue
        if ".old-" in leftover.name and not prefix.exists():
            leftover.rename(prefix)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def locked(prefix: Path) -> Iterator[None]:
    """One run at a time makes or changes a prefix; a second one waits. The folder that it is in is made."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lock = prefix.with_name(f".{prefix.name}.lock")
    with locks.held(lock, "name a --prefix on another file system", what=str(prefix)):
        yield


def is_foreign(prefix: Path) -> bool:
    """Whether the prefix existed before ssm-forge put anything there."""
    if not (prefix / "conda-meta").is_dir() or (prefix / UNFINISHED).exists():
        return False
    marker = read_marker(prefix)
    return marker is None or not marker.created


def check_target(prefix: Path) -> None:
    """
    Raises:
        InstallError: when ``prefix`` is a file, or a folder with something in it that is no environment.
    """
    if not prefix.exists() or (prefix / "conda-meta").is_dir():
        return
    if not prefix.is_dir() or any(prefix.iterdir()):
        raise InstallError(
            f"{prefix} exists and is not a conda environment (it has no conda-meta folder).",
            fix="Name an empty or new folder, or an existing environment, with --prefix.",
        )


def installed_prefixes(workspace: Workspace) -> list[Path]:
    """Prefixes of this workspace that hold the kernels, the newest first; others are remembered by path."""
    # Names that start with a dot are what killed installations left.
    found = [path.parent.parent for path in workspace.envs.glob(f"[!.]*/{MARKER}")]
    with contextlib.suppress(OSError):
        found += [Path(line) for line in (workspace.state / "prefixes").read_text().splitlines()]
    unique = [path for path in dict.fromkeys(found) if read_marker(path)]
    return sorted(unique, key=lambda path: (path / MARKER).stat().st_mtime, reverse=True)


def remember(prefix: Path, workspace: Workspace) -> None:
    """Keep the path of a prefix outside the workspace, for ``verify`` and ``python`` without --prefix."""
    if prefix.is_relative_to(workspace.envs):
        return
    file = workspace.state / "prefixes"
    known = file.read_text().splitlines() if file.exists() else []
    if str(prefix) not in known:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join([*known, str(prefix)]) + "\n")


def holds(prefix: Path, locked: Sequence[RepoDataRecord]) -> bool:
    """Whether the environment is the locked one, with our packages or without."""
    have = {(r.name.normalized, str(r.version), str(r.build)) for r in present(prefix)}
    return have == {(r.name.normalized, str(r.version), str(r.build)) for r in locked}
