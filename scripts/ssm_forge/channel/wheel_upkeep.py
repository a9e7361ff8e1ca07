"""Housekeeping of a channel's wheels: is the index whole (check, repair), what can go (prune), a copy (mirror)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from email.parser import HeaderParser
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from ssm_forge.base import foreign
from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.platforms import LINUX_64, PLATFORMS
from ssm_forge.channel import folder as channels
from ssm_forge.channel import simple_index as index
from ssm_forge.channel.check import Checked, Problem, is_about, set_aside
from ssm_forge.channel.coverage import Item
from ssm_forge.channel.mirror import Mirrored, download
from ssm_forge.channel.prune import Pruned
from ssm_forge.channel.simple_index import STATEMENT, Entry
from ssm_forge.channel.source import ChannelSource, FolderSource, measure
from ssm_forge.package.kernels import DEFAULT
from ssm_forge.package.pip_torch import page_of, torch_of_page
from ssm_forge.package.read_wheel import FOLDER, PAGE, Name, inspect, parse


class ProjectPage(NamedTuple):
    """Where a project's wheels are listed: ``cu130-torch211`` and ``mamba-ssm``."""

    page: str
    project: str


Listing = dict[ProjectPage, dict[str, Entry]]


def listed(source: ChannelSource) -> Listing:
    """What a channel's indexes list: project's page -> file name -> entry.

    Raises:
        IntegrityError: when a page can't be read.
    """
    listing: Listing = {}
    for page in _names(source, f"{FOLDER}/index.json", index.PAGES):
        if not PAGE.fullmatch(page):
            raise IntegrityError(f"{source.name}/{FOLDER}/index.json names '{page}', which is no index of wheels.")
        for project in _names(source, f"{FOLDER}/{page}/index.json", "projects"):
            path = f"{FOLDER}/{page}/{project}/index.json"
            data = source.read(path) if index.is_project(project) else None
            if data is None:
                raise IntegrityError(f"{source.name}/{path} is missing.")
            listing[ProjectPage(page, project)] = index.read_entries(data, f"{source.name}/{path}")
    return listing


def _names(source: ChannelSource, path: str, key: str) -> list[str]:
    data = source.read(path)
    if data is None:
        return []
    try:
        items = foreign.json_from(data)[key]
        return [str(item["name"]) if isinstance(item, dict) else str(item) for item in items]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{source.name}/{path} is no page of a simple index ({error}).") from error


# --- check, repair ----------------------------------------------------------------------------------------------------


def check(source: ChannelSource) -> Checked:
    """Compare a channel's wheels with its pages; the problems come out, and how many wheels were compared.

    Every listed wheel must be present, intact and what its entry says, all pages must be in step, and nothing in a
    folder may be unlisted.
    """
    try:
        listing = listed(source)
    except IntegrityError as error:
        return Checked([Problem("index", FOLDER, error.what)], 0)
    problems = [
        problem
        for (page, project), entries in listing.items()
        for problem in _check_project(source, page, project, entries)
    ]
    if isinstance(source, FolderSource):
        problems += _check_folder(source.folder, listing)
    return Checked(problems, sum(map(len, listing.values())))


def _check_project(source: ChannelSource, page: str, project: str, entries: dict[str, Entry]) -> Iterator[Problem]:
    folder = f"{FOLDER}/{page}"
    pages = index.project_pages(project, [entries[name] for name in sorted(entries)])
    if source.read(f"{folder}/{project}/index.html") != pages["index.html"]:
        yield Problem("index", f"{folder}/{project}/index.html", "differs from index.json")
    for name, entry in entries.items():
        yield from _check_wheel(source, folder, name, entry)


def _check_wheel(source: ChannelSource, folder: str, name: str, entry: Entry) -> Iterator[Problem]:
    file = f"{folder}/{name}"
    sha256 = entry["hashes"]["sha256"]
    measured = measure(source, file)
    if measured is None:
        yield Problem("missing", file, "the index lists it, and it is not there as a file")
        return
    if measured != (sha256, entry["size"]):
        listed = f"the index says sha256 {sha256} and {entry['size']} bytes"
        yield Problem("changed", file, f"{listed}, found {measured.sha256} and {measured.size_bytes}")
    elif isinstance(source, FolderSource):
        try:
            wheel = inspect(source.folder / file)
            metadata = hashlib.sha256(wheel.metadata).hexdigest()
            facts = (wheel.subdir, wheel.requires_python, metadata)
            if facts != (folder, entry["requires-python"], entry["core-metadata"]["sha256"]):
                yield Problem("index", file, "the index says something else of it than it holds")
        except IntegrityError as error:
            yield Problem("package", file, error.what)
    metadata_file = source.read(f"{file}.metadata")
    if metadata_file is None or hashlib.sha256(metadata_file).hexdigest() != entry["core-metadata"]["sha256"]:
        yield Problem("index", f"{file}.metadata", "is missing, or not the metadata that the index names")
    if digest := entry.get(STATEMENT):
        sidecar = source.read(f"{file}.sigs.{digest}")
        if sidecar is None or hashlib.sha256(sidecar).hexdigest() != digest:
            yield Problem("statement", file, "its signed statement is missing or changed")
        elif not is_about(sidecar, name, sha256):
            yield Problem("statement", file, "its signed statement is about something else")


def _check_folder(channel: Path, listing: Listing) -> Iterator[Problem]:
    for page in index.pages(channel):
        names = {name for listed_on, entries in listing.items() if listed_on.page == page for name in entries}
        for path in sorted((channel / FOLDER / page).iterdir()):
            file = f"{FOLDER}/{page}/{path.name}"
            wheel = f"{path.name.partition('.whl')[0]}.whl"
            if path.is_symlink():
                yield Problem("orphan", file, "a symbolic link; a channel consists of files")
            elif path.name.endswith(".part"):
                yield Problem("leftover", file, "a file that was never finished")
            elif ".whl" in path.name and wheel not in names:
                reason = "a wheel that the index does not list" if path.name == wheel else "it is about no listed wheel"
                yield Problem("orphan", file, reason)


def repair(channel: Path) -> list[str]:
    """Write the pages anew from the wheels that can be trusted, and set aside the others.

    Returns:
        What was done about each file that could not stay as it was, one line each, for people.
    """
    actions: list[str] = []
    with channels.locked(channel):
        for page in index.pages(channel):
            folder = channel / FOLDER / page
            hashes = _hashes(channel, page)
            for path in sorted(folder.glob("*.whl")):
                if reason := _unfit(path, page, hashes.get(path.name, "")):
                    actions.append(set_aside(channel, path, reason))
            for path in sorted(p for p in folder.iterdir() if ".whl." in p.name):
                wheel = folder / f"{path.name.partition('.whl')[0]}.whl"
                if path.name.endswith(".part") or not wheel.is_file():
                    path.unlink()
                elif path.name.endswith(".sigs") and not is_about(path.read_bytes(), wheel.name, sha256_of(wheel)):
                    actions.append(set_aside(channel, path, "it is no statement about a wheel that is here"))
        index.rebuild(channel)
    return actions


def _hashes(channel: Path, page: str) -> dict[str, str]:
    """File name -> sha256, as far as the pages can be read."""
    by_name: dict[str, str] = {}
    for project in index.projects(channel, page):
        try:
            entries = index.entries(channel, page, project)
        except IntegrityError:
            continue
        by_name.update({name: entry["hashes"]["sha256"] for name, entry in entries.items()})
    return by_name


def _unfit(path: Path, page: str, sha256: str) -> str:
    """Why a wheel can't be listed; empty when it can."""
    if path.is_symlink() or not path.is_file():
        return "it is no plain file"
    try:
        wheel = inspect(path)
    except IntegrityError as error:
        return error.what
    if wheel.page != page:
        return f"it is for {wheel.page}"
    return f"the index named another file of this name (sha256 {sha256})" if sha256 not in ("", wheel.sha256) else ""


# --- prune ------------------------------------------------------------------------------------------------------------


def prune(channel: Path, *, keep: int, dry_run: bool) -> Pruned:
    """Remove all but the ``keep`` newest wheels of each project, Python and set of capabilities in each index.

    What a wheel that stays requires stays too, and so does every wheel of a source tree: which of two trees is the
    newer one, nothing says. The pages forget first, then the files go.

    Raises:
        IntegrityError: when a page can't be read; nothing is removed then.
    """
    with channels.locked(channel):
        listing = listed(FolderSource(channel))
        doomed = {page: _superseded(channel, page, listing, keep) for page in index.pages(channel)}
        packages = [f"{FOLDER}/{page}/{name}" for page, names in doomed.items() for name in names]
        other = _garbage(channel, listing, doomed)
        size = sum(index.size((channel / path).parent, Path(path).name) for path in packages)
        size += sum((channel / path).stat().st_size for path in other)
        if not dry_run:
            for page, names in doomed.items():
                if names:
                    index.forget(channel, page, names)
            for path in other:
                (channel / path).unlink(missing_ok=True)
        return Pruned(tuple(packages), tuple(other), size)


def _superseded(channel: Path, page: str, listing: Listing, keep: int) -> list[str]:
    parsed = {name: parse(name) for listed_on, entries in listing.items() if listed_on.page == page for name in entries}
    if page_of(page) == "tree":
        return []
    groups: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for name, named in parsed.items():
        groups[named.project, named.python, named.archs.tag, named.machine].append(name)
    kept = {n for group in groups.values() for n in sorted(group, key=lambda name: parsed[name].order)[-keep:]}
    while needed := _needed(channel / FOLDER / page, parsed, kept):
        kept |= needed
    return sorted(set(parsed) - kept)


def _needed(folder: Path, names: dict[str, Name], kept: set[str]) -> set[str]:
    """Wheels that one which stays requires, where no other one that stays does."""
    required = set()
    for name in kept:
        headers = HeaderParser().parsestr((folder / f"{name}.metadata").read_text(encoding="utf-8"))
        for text in headers.get_all("Requires-Dist", []):
            requirement = Requirement(text)
            fitting = {
                other
                for other, named in names.items()
                if (named.project, named.python, named.machine)
                == (requirement.name, names[name].python, names[name].machine)
                and requirement.specifier.contains(named.version, prereleases=True)
            }
            if requirement.marker is None and not fitting & kept:
                required |= fitting
    return required


def _garbage(channel: Path, listing: Listing, doomed: dict[str, list[str]]) -> list[str]:
    """Statements that no page names any more, files about no wheel, unfinished files."""
    paths = []
    for page in index.pages(channel):
        current = {
            n: e.get(STATEMENT)
            for listed_on, entries in listing.items()
            if listed_on.page == page
            for n, e in entries.items()
        }
        for path in sorted((channel / FOLDER / page).iterdir()):
            wheel = f"{path.name.partition('.whl')[0]}.whl"
            digest = path.name.partition(".sigs.")[2]
            old = digest and digest != current.get(wheel)
            about_none = ".whl." in path.name and wheel not in current
            if path.name.endswith(".part") or ((old or about_none) and wheel not in doomed[page]):
                paths.append(f"{FOLDER}/{page}/{path.name}")
    return paths


# --- mirror, coverage -------------------------------------------------------------------------------------------------


def mirror(source: ChannelSource, target: Path, *, only: Sequence[str], log: Callable[[str], None]) -> Mirrored:
    """Copy a channel's wheels and their statements into a folder, each compared with the hash on its page.

    Args:
        only: file name patterns; all wheels when empty.

    Raises:
        IntegrityError: when the source's bytes are not what its pages say, or ``target`` has another file of the name.
        MachineError: when the disk is full.
    """
    copied = present = 0
    try:
        for (page, _), entries in listed(source).items():
            for name, entry in entries.items():
                if only and not any(fnmatch(name, pattern) for pattern in only):
                    continue
                new = _copy(source, target, page, name, entry, log)
                log(f"{FOLDER}/{page}/{name}: {'copied' if new else 'was there'}")
                copied, present = copied + new, present + (not new)
    except OSError as error:
        raise channels.full(target, error) from error
    return Mirrored(copied, present)


def _copy(source: ChannelSource, target: Path, page: str, name: str, entry: Entry, log: Callable[[str], None]) -> bool:
    sha256, file = entry["hashes"]["sha256"], target / FOLDER / page / name
    if file.exists() and sha256_of(file) != sha256:
        raise channels.different(name, str(target))
    partial = target / channels.UPLOADS / f"{sha256}.part"
    partial.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        channels.copy(file, partial, lambda count: None)  # A run that was killed may have left it out of the pages.
    else:
        download(source, f"{FOLDER}/{page}/{name}", partial, log)
    try:
        if sha256_of(partial) != sha256:
            raise IntegrityError(
                f"{source.name}/{FOLDER}/{page}/{name} has sha256 {sha256_of(partial)}, but is listed with {sha256}; "
                "it was not copied.",
                fix=f"See what else is wrong with 'channel check {source.name}'.",
            )
        wheel = inspect(partial, filename=name)
        if wheel.page != page:
            raise IntegrityError(f"{source.name} lists {name} in {page}, and it is for {wheel.page}.")
        with channels.locked(target):
            added = index.place(target, partial, wheel)
            if digest := entry.get(STATEMENT):
                index.place_statement(target, page, name, _statement(source, page, name, str(digest)))
    finally:
        partial.unlink(missing_ok=True)
    return added


def _statement(source: ChannelSource, page: str, name: str, digest: str) -> bytes:
    data = source.read(f"{FOLDER}/{page}/{name}.sigs.{digest}")
    if data is None or hashlib.sha256(data).hexdigest() != digest:
        raise IntegrityError(f"{source.name}: the signed statement of {name} is missing or changed.")
    return data


def items(source: ChannelSource) -> list[Item]:
    """The wheels that a channel lists, for the table of what it covers; those of source trees are on no row of it."""
    wheels = []
    for (page, project), entries in sorted(listed(source).items()):
        torch = torch_of_page(page)
        of = page_of(page)
        for name, entry in sorted(entries.items()):
            named = parse(name)
            if of == "tree":
                continue
            wheels.append(
                Item(
                    filename=name,
                    name=project,
                    version=named.public,
                    cuda=torch.cuda,
                    torch=torch.version,
                    python=named.python,
                    archs=str(named.archs),
                    size=int(entry["size"]),
                    signed=STATEMENT in entry,
                    kind="wheel",
                    kernels="upstream" if of == "upstream" else DEFAULT,
                    subdir=next((p.subdir for p in PLATFORMS if p.machine == named.machine), LINUX_64.subdir),
                )
            )
    return wheels
