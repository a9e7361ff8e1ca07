"""Puts wheels into an environment as pip would: with RECORD, in place of an older release, touching nothing else."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from installer import install as install_wheel
from installer.destinations import SchemeDictionaryDestination
from installer.sources import WheelFile

from ssm_forge.base import locks
from ssm_forge.base.errors import InstallError
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge.package import hash_text
from ssm_forge.existing.reader import Distribution, Existing, read_distribution, read_record
from ssm_forge.package import wheel


def installed(existing: Existing, project: str) -> Distribution | None:
    """A project's package in the folder that packages are installed into; None where it has none."""
    for info in sorted(existing.site.glob(f"{project.replace('-', '_')}-*.dist-info")):
        distribution = read_distribution(info)
        if distribution is not None and distribution.name == project:
            return distribution
    return None


def is_installed(existing: Existing, project: str, filename: str, sha256: str) -> bool:
    """Whether the environment has the wheel of that very conda package, with all its files."""
    distribution = installed(existing, project)
    if distribution is None:
        return False
    origin = wheel.read_origin(distribution.info)
    if (origin.get("package"), origin.get("sha256")) != (filename, sha256):
        return False
    return all((existing.site / path).is_file() for path, digest in distribution.paths() if digest)


def changed(site: Path, distribution: Distribution) -> list[str]:
    """The files of a package that are gone, or not what its RECORD says."""
    return sorted(path for path, digest in distribution.paths() if digest and not _is_intact(site / path, digest))


def _is_intact(path: Path, digest: str) -> bool:
    algorithm, _, recorded = digest.partition("=")
    try:
        actual = hashlib.new(algorithm, path.read_bytes()).digest()
    except (OSError, ValueError):
        return False
    return base64.urlsafe_b64encode(actual).rstrip(b"=").decode() == recorded


@contextmanager
def locked(existing: Existing, workspace: Workspace) -> Iterator[None]:
    """Hold the lock of an environment, which lies in the workspace: one run at a time changes an environment."""
    folder = workspace.state / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = hash_text(existing.root.resolve())[:16]
    with locks.held(folder / name, "use a checkout on another file system", what=str(existing.root)):
        yield


def put(existing: Existing, project: str, file: Path) -> str:
    """Install a wheel; returns the release that it has replaced, empty where there was none.

    Raises:
        InstallError: when the environment can't be written.
    """
    previous = installed(existing, project)
    try:
        if previous is not None:
            remove(existing, previous)
        with WheelFile.open(file) as source:
            existing.site.mkdir(parents=True, exist_ok=True)
            for element in source.get_contents():
                # Never written through: a file may be a hard link into the cache of pip or uv.
                (existing.site / element[0][0]).unlink(missing_ok=True)
            install_wheel(
                source=source,
                destination=SchemeDictionaryDestination(
                    scheme_dict={
                        **dict.fromkeys(("purelib", "platlib"), str(existing.site)),
                        "scripts": str(existing.root / "bin"),
                        "headers": str(existing.root / f"include/site/python{existing.minor}/{project}"),
                        "data": str(existing.root),
                    },
                    interpreter=str(existing.python),
                    script_kind="posix",
                ),
                additional_metadata={"INSTALLER": b"ssm-forge\n"},
            )
    except OSError as error:
        raise InstallError(
            f"{project} could not be written into {existing.site}: {error.strerror} ({error.filename}).",
            fix="Correct the rights or free space, and run the same command again.",
        ) from error
    return previous.version if previous else ""


def remove(existing: Existing, distribution: Distribution) -> None:
    """Remove a package as `pip uninstall` does: what its RECORD lists, bytecode, and folders that are empty then.

    Raises:
        InstallError: when it has no RECORD.
    """
    site, inside = existing.site.resolve(), existing.root.resolve()
    folders: set[Path] = set()
    for path, _ in read_record(distribution.info):
        file = (site / path).parent.resolve() / Path(path).name
        if not file.is_relative_to(inside):
            continue  # Of a RECORD that somebody has made up.
        file.unlink(missing_ok=True)
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
            compiled.unlink()
        folders.update(parent for parent in (file.parent / "__pycache__", file.parent, *file.parent.parents))
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        if folder.is_relative_to(site) and folder != site:
            with contextlib.suppress(OSError):
                folder.rmdir()
