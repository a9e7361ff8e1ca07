"""Is a channel whole (check), and what can be put right in it (repair)?

Repair believes nothing that check doubts. A package whose bytes are not those that the index named, or which is no
package, is not listed as if nothing had happened: it is set aside, out of readers' sight, for its owner to look at.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ssm_forge.base import files, foreign, owners
from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.ui import step_progress
from ssm_forge.channel import folder as channels
from ssm_forge.channel import index as repodata
from ssm_forge.channel.index import IndexRecord, Records
from ssm_forge.channel.source import ChannelSource, FolderSource, measure, read_index, records
from ssm_forge.channel.statement import about, bundles_of
from ssm_forge.package.read import Package, inspect

# Hidden, so that neither the engine nor our server takes it for a part of the channel.
ASIDE = ".damaged"

# Of each record, what a solver goes by, and the hash that clients compare.
_SOLVER_FIELDS = ("name", "version", "build", "build_number", "subdir", "depends", "constrains")
_HASHES = ("sha256", "md5", "size")
_PACKAGE_ENDS = (".conda", ".tar.bz2")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a channel.

    Attributes:
        kind: ``missing``, ``changed``, ``package``, ``index``, ``statement``, ``orphan`` or ``leftover``.
        file: path inside the channel.
        what: what is wrong with the file, without its name.
    """

    kind: str
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.what}"


class Checked(NamedTuple):
    """What a check of a channel found, and how many packages (or wheels) it compared with the index."""

    problems: list[Problem]
    compared: int


# --- check ------------------------------------------------------------------------------------------------------------


def check(source: ChannelSource) -> Checked:
    """Compare a channel's packages with its index; the problems come out, and how many packages were compared.

    Every listed file must be present, intact and what its record says, all forms of the index must be in step, and
    nothing may be unlisted. A server shows only what is listed, and packages are not unpacked from there: what else
    lies in its folder, and what packages hold, is not checked.
    """
    problems: list[Problem] = []
    compared = 0
    folder = source.folder if isinstance(source, FolderSource) else None
    for subdir in sorted({*source.subdirs(), "noarch"} if folder else source.subdirs()):
        index_path = f"{source.name}/{subdir}/repodata.json"
        try:
            index = repodata.document(read_index(source, subdir), index_path)
        except repodata.DamagedIndexError as error:
            # What it lists can't be told, so nothing can be missing or orphaned.
            problems.append(Problem("index", f"{subdir}/repodata.json", error.reason))
            continue
        listed = repodata.listed_in(index)
        index_subdir = index.get("info", {}).get("subdir")
        if index_subdir not in (None, subdir):
            problems.append(Problem("index", f"{subdir}/repodata.json", f"says that it is for {index_subdir!r:.80}"))
        compared += len(listed)
        problems += _check_packages(source, subdir, listed)
        problems += _check_index(source, subdir, listed)
        if folder:
            problems += _check_folder(folder / subdir, subdir, listed)
    if folder:
        problems += _check_leftovers(folder)
    return Checked(problems, compared)


def _check_packages(source: ChannelSource, subdir: str, listed: Records) -> Iterator[Problem]:
    with step_progress() as progress:
        task = progress.add_task(f"checking {subdir}", total=len(listed))
        for name, record in listed.items():
            yield from _check_package(source, subdir, name, record)
            yield from _check_statement(source, f"{subdir}/{name}", name, record)
            progress.advance(task)


def _check_package(source: ChannelSource, subdir: str, name: str, record: IndexRecord) -> Iterator[Problem]:
    file = f"{subdir}/{name}"
    measured = measure(source, file)
    if measured is None:
        yield Problem("missing", file, "the index lists it, and it is not there as a file")
    elif measured != (record.sha256, record.size):
        yield Problem(
            "changed",
            file,
            f"the index says sha256 {record.sha256} and {record.size} bytes, "
            f"found {measured.sha256} and {measured.size_bytes}",
        )
    elif isinstance(source, FolderSource) and name.endswith(".conda"):
        try:
            package = inspect(source.folder / file)
        except IntegrityError as error:
            yield Problem("package", file, error.what)
            return
        for field in _SOLVER_FIELDS:
            indexed = _plain(getattr(record, field))
            if (indexed or None) != (package.index.get(field) or None):
                difference = f"its {field} is {indexed!r:.80} there, and {package.index.get(field)!r:.80} in {name}"
                yield Problem("index", file, difference)


def _plain(value: object) -> object:
    """A field as JSON has it, to compare with a package's own."""
    return list(value) if isinstance(value, tuple) else value


def _check_statement(source: ChannelSource, file: str, name: str, record: IndexRecord) -> Iterator[Problem]:
    digest = record.attestations_sha256
    if digest:
        sidecar = source.read(f"{file}.sigs.{digest}")
        if sidecar is None or hashlib.sha256(sidecar).hexdigest() != digest:
            yield Problem("statement", file, "its signed statement is missing or changed")
        elif not is_about(sidecar, name, str(record.sha256)):
            yield Problem("statement", file, "its signed statement is about something else")
    if isinstance(source, FolderSource):
        newest = source.read(f"{file}.sigs")
        if (hashlib.sha256(newest).hexdigest() if newest is not None else None) != digest:
            yield Problem("statement", f"{file}.sigs", "it is not the statement that the index names")


def is_about(sidecar: bytes, name: str, sha256: str) -> bool:
    """Whether one of a sidecar's statements is about exactly the file of this name and hash (hex)."""
    try:
        bundles = bundles_of(sidecar, name)
    except IntegrityError:
        return False
    return any(about(bundle, name, sha256) for bundle in bundles)


def _check_index(source: ChannelSource, subdir: str, listed: Records) -> Iterator[Problem]:
    """repodata.json.zst, shards and run_exports.json against repodata.json."""
    exact = isinstance(source, FolderSource)
    folder_name = f"{source.name}/{subdir}"
    forms = channels.differing_forms(lambda name: source.read(f"{subdir}/{name}"), folder_name, listed, exact=exact)
    for name, reason in forms.items():
        yield Problem("index", f"{subdir}/{name}", reason)
    file = f"{subdir}/repodata_shards.msgpack.zst"
    shards = source.read(file)
    try:
        if shards is None:
            if exact:
                yield Problem("index", file, "is missing")
        elif _essence(_sharded(source, subdir, shards)) != _essence(listed):
            yield Problem("index", file, "differs from repodata.json")
    except repodata.DamagedIndexError as error:
        yield Problem("index", file, error.reason)


def _essence(listed: Records) -> dict[str, tuple[Any, ...]]:
    """File name -> what all forms of the index must agree in; one form leaves out what another has as null or empty."""
    return {
        name: tuple(getattr(record, field) or None for field in (*_SOLVER_FIELDS, *_HASHES))
        for name, record in listed.items()
    }


def _sharded(source: ChannelSource, subdir: str, index: bytes) -> Records:
    """File name -> record, as the shards say; a shard that is missing or changed leaves its packages out."""
    listed: Records = {}
    for digest in repodata.shard_digests(index, f"{source.name}/{subdir}/repodata_shards.msgpack.zst").values():
        file = f"{subdir}/shards/{digest}.msgpack.zst"
        data = source.read(file)
        if data is not None and hashlib.sha256(data).hexdigest() == digest:
            listed.update(repodata.shard(data, f"{source.name}/{file}"))
    return listed


def _check_folder(folder: Path, subdir: str, listed: Records) -> Iterator[Problem]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        file = f"{subdir}/{path.name}"
        if path.name in listed or path.name in channels.INDEX_FILES:
            continue  # Looked at already.
        if path.is_symlink():
            yield Problem("orphan", file, "a symbolic link; a channel consists of files")
        elif path.name.endswith(_PACKAGE_ENDS):
            yield Problem("orphan", file, "a package that the index does not list")
        elif ".conda.sigs" in path.name and path.name.partition(".sigs")[0] not in listed:
            yield Problem("orphan", file, "a statement about a package that is not there")
        elif path.name.endswith(".part"):
            yield Problem("leftover", file, "a file that was never finished")


def _check_leftovers(folder: Path) -> Iterator[Problem]:
    for path in channels.unfinished(folder):
        yield Problem("leftover", f".uploads/{path.name}", "an upload that was never finished")
    for path in sorted(path for path in folder.glob(".prune-*") if owners.gone(path.name) is not False):
        yield Problem("leftover", path.name, "a prune that was never finished")
    if (folder / channels.PENDING).exists():
        yield Problem(
            "leftover", channels.PENDING, "a package got its place, and the index may describe the one before"
        )


# --- repair -----------------------------------------------------------------------------------------------------------


def repair(channel: Path) -> list[str]:
    """Make the index anew from the packages that can be trusted, and remove what nobody will finish.

    Returns:
        What was done about each file that could not stay as it was, one line each, for people.

    Raises:
        IntegrityError: when the index can't be written even so.
        MachineError: when the disk is full.
    """
    actions: list[str] = []
    with channels.locked(channel):
        for path in [*channels.unfinished(channel), *channel.glob("*/.*.part")]:
            path.unlink(missing_ok=True)
        channels.sweep_staging(channel)
        # A run that was killed while it replaced a package leaves an index of the package before.
        pending = channel / channels.PENDING
        replaced = pending.read_text(encoding="utf-8", errors="replace").split() if pending.exists() else []
        for subdir in channels.subdirs(channel):
            hashes = _hashes(channel / subdir) if replaced or not pending.exists() else {}
            actions += _repair_folder(
                channel, subdir, {n: digests for n, digests in hashes.items() if n not in replaced}
            )
        channels.index(channel, force=True)
        pending.unlink(missing_ok=True)
    return actions


def _hashes(folder: Path) -> dict[str, set[str]]:
    """File name -> sha256 in each form of the index that can be read: one of them may be what is damaged."""
    by_name: dict[str, set[str]] = {}
    source = FolderSource(folder.parent)

    def plain() -> Records:
        return records(source, folder.name)

    def packed() -> Records:
        data = source.read(f"{folder.name}/repodata.json.zst") or b""
        return repodata.records(repodata.decompress(data, str(folder)), str(folder))

    def sharded() -> Records:
        return _sharded(source, folder.name, source.read(f"{folder.name}/repodata_shards.msgpack.zst") or b"")

    for form in (plain, packed, sharded):
        try:
            listed = form()
        except repodata.DamagedIndexError:
            continue
        for name, record in listed.items():
            if record.sha256:
                by_name.setdefault(name, set()).add(record.sha256)
    return by_name


def _repair_folder(channel: Path, subdir: str, hashes: dict[str, set[str]]) -> Iterator[str]:
    folder = channel / subdir
    for path in sorted(folder.iterdir()):
        if path.name in (*channels.INDEX_FILES, "shards"):
            is_of_index = path.is_dir() if path.name == "shards" else path.is_file()
            if path.is_symlink() or not is_of_index:
                yield set_aside(channel, path, "it is not what an index consists of")
        elif path.name.endswith(_PACKAGE_ENDS):
            reason = _unfit(path, subdir, hashes.get(path.name, set()))
            if reason:
                yield set_aside(channel, path, reason)
        elif path.is_symlink():
            yield set_aside(channel, path, "it is a symbolic link")
    for shard in (folder / "shards").glob("*"):
        # The engine writes none that is there by its name.
        if shard.is_symlink() or not shard.is_file() or sha256_of(shard) != shard.name.partition(".")[0]:
            shard.unlink() if shard.is_symlink() or not shard.is_dir() else shutil.rmtree(shard)
    for package in sorted({path.name.partition(".sigs")[0] for path in folder.glob("*.conda.sigs*")}):
        yield from _repair_statements(channel, folder / package)


def _unfit(path: Path, subdir: str, hashes: set[str]) -> str:
    """Why a file can't be listed; empty when it can."""
    if path.is_symlink() or not path.is_file():
        return "it is no plain file"
    try:
        package = inspect(path)
    except IntegrityError as error:
        return error.what
    if package.subdir != subdir:
        return f"it is for {package.subdir}"
    return _other_bytes(package, hashes)


def _other_bytes(package: Package, hashes: set[str]) -> str:
    if hashes and package.sha256 not in hashes:
        return f"the index named another file of this name (sha256 {' or '.join(sorted(hashes))})"
    return ""


def _repair_statements(channel: Path, package: Path) -> Iterator[str]:
    """Leave one statement that is about the package, under both of its names, or none."""
    name = package.name
    newest = package.with_name(f"{name}.sigs")
    kept = sorted(package.parent.glob(f"{name}.sigs.*"), key=lambda path: path.lstat().st_mtime_ns, reverse=True)
    sha256 = sha256_of(package) if package.is_file() else ""
    sound: bytes | None = None
    for path in (newest, *kept):
        data = _statement(path)
        named = path.name.removeprefix(f"{name}.sigs").removeprefix(".")
        fits = data is not None and named in ("", hashlib.sha256(data).hexdigest())
        if fits and data is not None and sha256 and is_about(data, name, sha256):
            sound = sound or data
        elif os.path.lexists(path):
            yield set_aside(channel, path, "it is no statement about a package that is here")
    if sound is not None:
        files.write_whole(newest, sound)
        files.write_whole(package.with_name(f"{name}.sigs.{hashlib.sha256(sound).hexdigest()}"), sound)


def _statement(path: Path) -> bytes | None:
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return foreign.read_bytes(path)
    except ValueError:
        return None


def set_aside(channel: Path, path: Path, why: str) -> str:
    """Move a file of the channel into its hidden folder for damaged files; one line that tells people comes out."""
    folder = channel / ASIDE / path.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    number = 0
    while os.path.lexists(target):
        number += 1
        target = folder / f"{path.name}.{number}"
    path.rename(target)
    return f"{path.parent.name}/{path.name} was set aside as {target.relative_to(channel)}: {why}"
