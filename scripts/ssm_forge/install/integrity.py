"""Does a prefix hold exactly the locked packages, unmodified? Every deviation, file by file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from rattler import RepoDataRecord

from ssm_forge.base.errors import InstallError
from ssm_forge.base.urls import is_under
from ssm_forge.install.marker import UNFINISHED
from ssm_forge.package.installed import InstalledPath, InstalledRecord
from ssm_forge.package.installed import records as records_of
from ssm_forge.package.intact import digest, file_digest
from ssm_forge.solve.lock import describe

Kind = Literal[
    "incomplete",
    "missing package",
    "extra package",
    "other package",
    "missing file",
    "modified file",
    "extra file",
]

# What packages record for a link that leads nowhere.
_EMPTY_SHA256 = hashlib.sha256().hexdigest()

# Not from packages: what the installer itself writes.
_INSTALLERS_OWN = frozenset({"CACHEDIR.TAG"})


@dataclass(frozen=True)
class Deviation:
    """One way in which a prefix is not what the lock says.

    Attributes:
        kind: what is wrong.
        package: name, empty for files of no package.
        path: relative to the prefix, empty when it is about the package as a whole.
        detail: what was expected and found.
    """

    kind: Kind
    package: str
    path: str
    detail: str

    def __str__(self) -> str:
        subject = self.path or self.package
        owner = f" (of {self.package})" if self.path and self.package else ""
        return f"{self.kind}: {subject}{owner}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Report:
    """What the comparison of a prefix with a lock gave.

    Attributes:
        deviations: empty when the prefix is exactly the lock.
        packages: how many locked packages were looked for.
        files: how many files were hashed.
        unhashed: files present whose package recorded no hash (entry points made at installation).
        on_top: packages of ``allowed_channels`` that the lock doesn't have, as ``name version build``.
    """

    deviations: tuple[Deviation, ...]
    packages: int
    files: int
    unhashed: int
    on_top: tuple[str, ...]


class _Compared(NamedTuple):
    """What came of one recorded path.

    Attributes:
        hashed: whether bytes were compared.
        deviation: None where the path is as recorded.
    """

    hashed: bool
    deviation: Deviation | None = None


@dataclass
class _Tally:
    deviations: list[Deviation] = field(default_factory=list)
    owned: set[str] = field(default_factory=set)
    files: int = 0
    unhashed: int = 0
    on_top: list[str] = field(default_factory=list)


def verify(prefix: Path, records: Sequence[RepoDataRecord], allowed_channels: Iterable[str] = ()) -> Report:
    """Compare a prefix with the locked packages, file by file, and report every deviation.

    Args:
        prefix: the environment.
        records: the locked packages.
        allowed_channels: URLs whose packages may be there on top of the lock (kernels built here); their
            files are checked like all others.

    Raises:
        InstallError: when ``prefix`` is not a conda environment.
    """
    if not (prefix / "conda-meta").is_dir():
        raise InstallError(f"{prefix} is not a conda environment (it has no conda-meta folder).")
    tally = _Tally()
    if (prefix / UNFINISHED).exists():
        tally.deviations.append(Deviation("incomplete", "", str(UNFINISHED), "its creation was interrupted"))
    installed = records_of(prefix)
    locked = {r.name.normalized: r for r in records}
    for name, record in locked.items():
        if name not in installed:
            tally.deviations.append(Deviation("missing package", name, "", f"{describe(record)} is locked"))
    for name, meta in sorted(installed.items()):
        _check_package(name, meta, locked.get(name), tuple(allowed_channels), tally)
    _check_files(prefix, installed, tally)
    _find_extra_files(prefix, tally)
    return Report(tuple(tally.deviations), len(locked), tally.files, tally.unhashed, tuple(tally.on_top))


def _check_package(
    name: str, installed: InstalledRecord, record: RepoDataRecord | None, allowed: tuple[str, ...], tally: _Tally
) -> None:
    description = str(installed)
    if record is None:
        if _is_from(installed.url, allowed):
            tally.on_top.append(description)
        else:
            tally.deviations.append(
                Deviation("extra package", name, "", f"{description} from {installed.url or 'nowhere'}")
            )
        return
    algorithm, expected = digest(record)
    recorded = {"sha256": installed.sha256, "md5": installed.md5}.get(algorithm, "")
    if description != describe(record):
        tally.deviations.append(
            Deviation("other package", name, "", f"{describe(record)} is locked, {description} found")
        )
    elif recorded != expected:
        detail = f"{algorithm} {expected} is locked, {recorded or 'none'} recorded"
        tally.deviations.append(Deviation("other package", name, "", detail))


def _is_from(url: str, channels: tuple[str, ...]) -> bool:
    try:
        return any(is_under(url, channel) for channel in channels)
    except ValueError:  # The environment's own record says nonsense.
        return False


def _check_files(prefix: Path, installed: Mapping[str, InstalledRecord], tally: _Tally) -> None:
    entries: list[tuple[str, InstalledPath]] = []
    for name, record in sorted(installed.items()):
        tally.owned.update(record.files)
        tally.owned.update(entry.path for entry in record.paths)
        entries += [(name, entry) for entry in record.paths]

    def check(item: tuple[str, InstalledPath]) -> _Compared:
        return _check_file(prefix, *item)

    with ThreadPoolExecutor() as pool:
        for hashed, deviation in pool.map(check, entries):
            tally.files += hashed
            tally.unhashed += not hashed and deviation is None
            if deviation is not None:
                tally.deviations.append(deviation)


def _check_file(prefix: Path, package: str, entry: InstalledPath) -> _Compared:
    relative = entry.path
    path = prefix / relative
    if not os.path.lexists(path):
        return _Compared(False, Deviation("missing file", package, relative, ""))
    if entry.kind == "directory":
        return _Compared(False)
    if entry.kind == "softlink":
        return _check_link(prefix, package, entry)
    # Where the installer wrote the prefix into a file, its hash is another one than in the package.
    expected = entry.sha256_in_prefix or entry.sha256
    if path.is_symlink() or not path.is_file():
        return _Compared(False, Deviation("modified file", package, relative, "is no longer a file"))
    if not expected:
        return _Compared(False)
    sha256 = file_digest(path, "sha256")
    if sha256 != expected:
        detail = f"sha256 {expected} is recorded, {sha256} found"
        return _Compared(True, Deviation("modified file", package, relative, detail))
    return _Compared(True)


def _check_link(prefix: Path, package: str, entry: InstalledPath) -> _Compared:
    """A symbolic link: the installer records the hash of its text, packages that of what it leads to."""
    relative = entry.path
    path = prefix / relative
    if not path.is_symlink():
        return _Compared(False, Deviation("modified file", package, relative, "is no longer a symbolic link"))
    target = str(path.readlink())
    other = Deviation("modified file", package, relative, f"is a link to {target}, which is not what is recorded")
    if entry.sha256_in_prefix:
        same = hashlib.sha256(target.encode()).hexdigest() == entry.sha256_in_prefix
        return _Compared(True, None if same else other)
    if not entry.sha256:
        return _Compared(False)
    if not path.is_file():
        return _Compared(True, None if entry.sha256 == _EMPTY_SHA256 else other)
    if file_digest(path, "sha256") == entry.sha256:
        return _Compared(True)
    # It may lead to a file that the installer wrote the prefix into; that file has been checked itself.
    return _Compared(False, None if path.resolve().is_relative_to(prefix.resolve()) else other)


def _find_extra_files(prefix: Path, tally: _Tally) -> None:
    for folder, subfolders, files in os.walk(prefix):
        relative_folder = Path(folder).relative_to(prefix)
        if relative_folder == Path():
            subfolders[:] = [n for n in subfolders if n != "conda-meta"]
        links = [n for n in subfolders if (Path(folder) / n).is_symlink()]
        for name in sorted([*files, *links]):
            relative = (relative_folder / name).as_posix()
            if relative in tally.owned or relative in _INSTALLERS_OWN or _is_bytecode_of_owned(relative, tally.owned):
                continue
            tally.deviations.append(Deviation("extra file", "", relative, "no package has it"))


def _is_bytecode_of_owned(relative: str, owned: set[str]) -> bool:
    """Python writes ``x/__pycache__/m.cpython-312.pyc`` beside an owned ``x/m.py`` whenever it likes."""
    path = Path(relative)
    if path.suffix != ".pyc" or path.parent.name != "__pycache__":
        return False
    return (path.parent.parent / f"{path.name.split('.')[0]}.py").as_posix() in owned
