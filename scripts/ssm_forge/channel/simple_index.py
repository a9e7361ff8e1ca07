"""The simple index (PEP 503, 691, 658) in a channel's folder: ``simple/cu130-torch211/``, one for each CUDA and torch.

``simple/PAGE/`` holds the wheels, so that it is what ``--find-links`` wants, too. ``simple/PAGE/PROJECT/index.json`` is
what the index knows of a project; the pages for browsers and for old installers say the same. A wheel gets its place
before a page names it, and each page is replaced as a whole.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.utils import canonicalize_name

from ssm_forge.base import files, foreign
from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.files import sha256_of
from ssm_forge.channel import folder as channels
from ssm_forge.package.read_wheel import FILENAME, FOLDER, PAGE, Wheel, inspect, parse

PAGE_FILES = ("index.json", "index.html")
LINKS = "wheels.html"
# Private keys of PEP 691 begin with an underscore.
STATEMENT = "_statement-sha256"
PAGES = "_pages"

Entry = dict[str, Any]

_VERSION = {"api-version": "1.1"}
_ENTRY = {
    "filename": lambda value: isinstance(value, str) and FILENAME.fullmatch(value) is not None,
    "hashes": lambda value: isinstance(value, dict) and foreign.is_hex(64)(value.get("sha256")),
    "size": foreign.is_number,
    "core-metadata": lambda value: isinstance(value, dict) and foreign.is_hex(64)(value.get("sha256")),
    "requires-python": foreign.is_text,
}


def place(channel: Path, partial: Path, wheel: Wheel) -> bool:
    """Give a checked wheel its name in the index, never replacing another one. The caller holds the channel's lock.

    Args:
        partial: the file, on the channel's own file system; it is gone afterwards.

    Returns:
        Whether it is new.

    Raises:
        IntegrityError: when a different file has that name.
    """
    filename = wheel.filename
    added = channels.place(channel, partial, wheel.subdir, filename, wheel.sha256)
    files.write_whole(channel / wheel.subdir / f"{filename}.metadata", wheel.metadata)
    if added or entries(channel, wheel.page, wheel.project).get(filename) is None:
        _update(channel, wheel.page, wheel.project, {filename: _entry(wheel, channel)})
    return added


def add(channel: Path, file: Path) -> Path:
    """Move a wheel that was made here into the channel's index, in place of one of the same name; its new path.

    Raises:
        IntegrityError: when ``file`` is no wheel.
    """
    wheel = inspect(file)
    folder = channel / wheel.subdir
    target = folder / file.name
    with channels.locked(channel):
        folder.mkdir(parents=True, exist_ok=True)
        files.flush(file)
        # What clients have is compared with the page: until that names the new bytes, there is none of that name.
        if target.exists() and sha256_of(target) != wheel.sha256:
            forget(channel, wheel.page, [file.name])
        files.write_whole(folder / f"{file.name}.metadata", wheel.metadata)
        file.replace(target)
        _update(channel, wheel.page, wheel.project, {file.name: _entry(wheel, channel)})
    return target


def place_statement(channel: Path, page: str, filename: str, data: bytes) -> None:
    """Store a wheel's signed statements beside it, named in the index. The caller holds the channel's lock."""
    digest = hashlib.sha256(data).hexdigest()
    folder = channel / FOLDER / page
    files.write_whole(folder / f"{filename}.sigs.{digest}", data)
    files.write_whole(folder / f"{filename}.sigs", data)
    project = parse(filename).project
    listed = entries(channel, page, project)
    if filename in listed and listed[filename].get(STATEMENT) != digest:
        _update(channel, page, project, {filename: {**listed[filename], STATEMENT: digest}})


def forget(channel: Path, page: str, filenames: Sequence[str]) -> None:
    """Take wheels off the pages, then remove them with all that lies beside them. The caller holds the lock."""
    for project in sorted({parse(name).project for name in filenames}):
        kept = {n: e for n, e in entries(channel, page, project).items() if n not in filenames}
        write_pages(channel, page, project, kept)
    for name in filenames:
        for path in beside(channel / FOLDER / page, name):
            path.unlink(missing_ok=True)


def beside(folder: Path, filename: str) -> list[Path]:
    """Paths of a wheel and of the files that are about it: its metadata, its signed statements."""
    signed = sorted(path for path in folder.iterdir() if path.name.startswith(f"{filename}.sigs"))
    return [folder / filename, folder / f"{filename}.metadata", *signed]


def pages(channel: Path) -> list[str]:
    """Names of the indexes that a channel has, such as ``cu130-torch211``, sorted."""
    folder = channel / FOLDER
    return sorted(p.name for p in folder.iterdir() if PAGE.fullmatch(p.name) and p.is_dir()) if folder.is_dir() else []


def projects(channel: Path, page: str) -> list[str]:
    """Names of the projects that an index has a page of, sorted."""
    folder = channel / FOLDER / page
    return sorted(path.parent.name for path in folder.glob("*/index.json")) if folder.is_dir() else []


def entries(channel: Path, page: str, project: str) -> dict[str, Entry]:
    """What an index says of a project: file name -> entry.

    Raises:
        IntegrityError: when it is no index.
    """
    path = channel / FOLDER / page / project / "index.json"
    return read_entries(foreign.read_bytes(path), str(path)) if path.is_file() else {}


def read_entries(data: bytes, address: str) -> dict[str, Entry]:
    """The entries of a project's ``index.json``.

    Raises:
        IntegrityError: when it is none.
    """
    try:
        content = foreign.json_from(data)
        listed = content["files"] if isinstance(content, dict) else None
        if not isinstance(listed, list):
            raise ValueError("it has no list of files")
        for entry in listed:
            foreign.require(entry, _ENTRY)
    except (ValueError, KeyError) as error:
        raise IntegrityError(
            f"{address} is no page of a simple index ({error}).",
            fix="'channel check --repair' writes it anew from the wheels that are there.",
        ) from error
    return {entry["filename"]: entry for entry in listed}


def rebuild(channel: Path) -> None:
    """Write all pages anew from the wheels that are there. The caller holds the lock.

    Raises:
        IntegrityError: when a wheel is damaged.
    """
    for page in pages(channel):
        folder = channel / FOLDER / page
        by_project: dict[str, dict[str, Entry]] = {project: {} for project in projects(channel, page)}
        for path in sorted(folder.glob("*.whl")):
            wheel = inspect(path)
            files.write_whole(folder / f"{path.name}.metadata", wheel.metadata)
            by_project.setdefault(wheel.project, {})[path.name] = _entry(wheel, channel)
        for project, listed in by_project.items():
            write_pages(channel, page, project, listed)


def write_pages(channel: Path, page: str, project: str, listed: Mapping[str, Entry]) -> None:
    """Write a project's pages, and those above it; a project without wheels has none."""
    folder = channel / FOLDER / page
    ordered = [listed[name] for name in sorted(listed)]
    if ordered:
        _write(folder / project, project_pages(project, ordered))
    elif (folder / project).is_dir():
        for name in PAGE_FILES:
            (folder / project / name).unlink(missing_ok=True)
        (folder / project).rmdir()
    project_names = projects(channel, page)
    _write(folder, page_of_projects(project_names))
    everything = [e for name in project_names for e in entries(channel, page, name).values()]
    files.write_whole(folder / LINKS, _html(page, [_link(e, e["url"].removeprefix("../")) for e in everything]))
    _write(channel / FOLDER, page_of_pages(pages(channel)))


def project_pages(project: str, listed: Sequence[Entry]) -> dict[str, bytes]:
    """File name -> bytes of a project's ``index.json`` and ``index.html``: the same entries in both forms."""
    versions = sorted({str(parse(entry["filename"]).version) for entry in listed})
    content = {"meta": _VERSION, "name": project, "versions": versions, "files": list(listed)}
    return {"index.json": _json(content), "index.html": _html(project, [_link(e, e["url"]) for e in listed])}


def page_of_projects(names: Sequence[str]) -> dict[str, bytes]:
    """File name -> bytes of the pages that list an index's projects."""
    content = {"meta": _VERSION, "projects": [{"name": name} for name in names]}
    return {"index.json": _json(content), "index.html": _html("Projects", [_folder(name) for name in names])}


def page_of_pages(names: Sequence[str]) -> dict[str, bytes]:
    """File name -> bytes of the pages that list a channel's indexes; such a page has no projects of its own."""
    content = {"meta": _VERSION, "projects": [], PAGES: list(names)}
    return {"index.json": _json(content), "index.html": _html("Indexes", [_folder(name) for name in names])}


def _update(channel: Path, page: str, project: str, changed: Mapping[str, Entry]) -> None:
    write_pages(channel, page, project, {**entries(channel, page, project), **changed})


def _write(folder: Path, pages: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in pages.items():
        files.write_whole(folder / name, data)


def _entry(wheel: Wheel, channel: Path) -> Entry:
    sidecar = channel / wheel.subdir / f"{wheel.filename}.sigs"
    return {
        "filename": wheel.filename,
        "url": f"../{quote(wheel.filename)}",
        "hashes": {"sha256": wheel.sha256},
        "size": wheel.size,
        "requires-python": wheel.requires_python,
        "core-metadata": {"sha256": hashlib.sha256(wheel.metadata).hexdigest()},
        **({STATEMENT: sha256_of(sidecar)} if sidecar.is_file() else {}),
    }


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def _html(title: str, links: Sequence[str]) -> bytes:
    lines = ["<!DOCTYPE html>", "<html><head>", '<meta name="pypi:repository-version" content="1.1">']
    lines += [f"<title>{html.escape(title)}</title>", "</head><body>", *(f"{link}<br>" for link in links)]
    return ("\n".join([*lines, "</body></html>"]) + "\n").encode()


def _folder(name: str) -> str:
    return f'<a href="{quote(name)}/">{html.escape(name)}</a>'


def _link(entry: Entry, url: str) -> str:
    metadata = f"sha256={entry['core-metadata']['sha256']}"
    python = html.escape(entry["requires-python"], quote=True)
    attributes = f'data-core-metadata="{metadata}" data-dist-info-metadata="{metadata}"'
    attributes += f' data-requires-python="{python}"' if python else ""
    address = html.escape(f"{url}#sha256={entry['hashes']['sha256']}", quote=True)
    return f'<a href="{address}" {attributes}>{html.escape(entry["filename"])}</a>'


def is_in_step(channel: Path, page: str, project: str) -> bool:
    """Whether a project's page for people says what the one for programs says."""
    listed = entries(channel, page, project)
    expected_pages = project_pages(project, [listed[name] for name in sorted(listed)])
    folder = channel / FOLDER / page / project
    return all(
        (folder / name).is_file() and (folder / name).read_bytes() == data for name, data in expected_pages.items()
    )


def is_project(name: str) -> bool:
    """Whether ``name`` can be that of a project, as PEP 503 normalizes names."""
    return canonicalize_name(name) == name and name.isascii() and name.replace("-", "").isalnum()


def size(folder: Path, filename: str) -> int:
    """Bytes of a wheel and of the files that are about it."""
    return sum(os.path.getsize(path) for path in beside(folder, filename) if path.is_file())  # noqa: PTH202
