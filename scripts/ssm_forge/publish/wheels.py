"""Publishing wheels: into a folder, or to our own server, with the rules of :mod:`ssm_forge.publish.send`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

from ssm_forge.base.credentials import redact
from ssm_forge.base.errors import NetworkError, UsageError
from ssm_forge.channel import folder as channels
from ssm_forge.channel import simple_index as index
from ssm_forge.package.read_wheel import FOLDER, Wheel, inspect, parse
from ssm_forge.publish.send import Published, send, target
from ssm_forge.publish.target import Advance, Outcome, Parcel, Publishable, Target
from ssm_forge.publish.to_folder import FolderTarget
from ssm_forge.publish.to_http import ServeTarget


def takes_wheels(to: str) -> bool:
    """Whether ``to`` is a kind of channel that has a place for wheels: a folder, or a server of ours."""
    return urlsplit(to).scheme in ("", "file", "http", "https")


def publish(
    paths: Sequence[Path], to: str, *, statements: Callable[[Wheel], bytes], log: Callable[[str], None]
) -> list[Published]:
    """Publish wheels and return what became of each; arguments and errors are those of ``send.publish``.

    Raises:
        UsageError: also for a channel that has no place for wheels.
    """
    destination = _target(to)
    wheels = [inspect(path) for path in paths]
    return send(destination, [Parcel(wheel, statements(wheel)) for wheel in wheels], to, log)


def _target(to: str) -> Target:
    destination = target(to) if takes_wheels(to) else None
    if isinstance(destination, FolderTarget):
        return FolderWheels(destination.channel)
    if isinstance(destination, ServeTarget):
        return ServedWheels(destination.client)
    raise UsageError(
        f"{redact(to)} has no place for wheels.",
        fix="Publish them to a folder or to a server of 'serve'; a plain web server can offer that folder, too.",
    )


class Selection(NamedTuple):
    """Wheels that names mean, and those of the names that mean something else, too (or nothing)."""

    wheels: list[Path]
    other_names: list[str]


def select(names: Sequence[str], channel: Path) -> Selection:
    """The wheels that a user means: paths, or names of projects in the local channel; all when none is named.

    Raises:
        UsageError: when a path ends in ``.whl`` and there is no such file.
    """
    wheels = [p for page in index.pages(channel) for p in sorted((channel / FOLDER / page).glob("*.whl"))]
    packages = {path.name.rsplit("-", 2)[0] for path in channel.glob("*/*.conda")}
    if not names:
        return Selection(wheels, [])
    chosen: list[Path] = []
    other_names = []
    for name in names:
        if name.endswith(".whl"):
            path = Path(name).absolute()
            if not path.is_file():
                raise UsageError(f"{path} does not exist.")
            chosen.append(path)
            continue
        fitting = [path for path in wheels if parse(path.name).project == name]
        if not fitting or name in packages:
            other_names.append(name)
        chosen += fitting
    return Selection(list(dict.fromkeys(chosen)), other_names)


class FolderWheels:
    """The index of wheels in a channel's folder; its methods are those of :class:`Target`."""

    def __init__(self, channel: Path) -> None:
        self._channel = channel
        self._files = FolderTarget(channel)

    def present(self, package: Publishable) -> str | None:
        return self._files.present(package)

    def upload(self, parcel: Parcel, advance: Advance) -> Outcome:
        package = parcel.package
        partial = self._channel / channels.UPLOADS / f"{package.sha256}.part"
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            with channels.locked(self._channel):
                try:
                    channels.copy(package.path, partial, advance)
                    wheel = inspect(partial, filename=package.filename)
                    return "added" if index.place(self._channel, partial, wheel) else "was there"
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise channels.full(self._channel, error) from error

    def attach(self, parcel: Parcel) -> bool:
        package = parcel.package
        try:
            with channels.locked(self._channel):
                page = package.subdir.rpartition("/")[2]
                index.place_statement(self._channel, page, package.filename, parcel.statements)
        except OSError as error:
            raise channels.full(self._channel, error) from error
        return True

    def finish(self, parcels: Sequence[Parcel]) -> None:
        channels.ensure_indexed(self._channel)


class ServedWheels(ServeTarget):
    """The index of wheels on our own server; its methods are those of :class:`Target`."""

    def present(self, package: Publishable) -> str | None:
        entry = self._entries(package).get(package.filename)
        return str(entry["hashes"]["sha256"]) if entry else None

    def attach(self, parcel: Parcel) -> bool:
        entry = self._entries(parcel.package).get(parcel.package.filename, {})
        if entry.get(index.STATEMENT) != hashlib.sha256(parcel.statements).hexdigest():
            self.send_statement(parcel)
        return True

    def _entries(self, package: Publishable) -> dict[str, index.Entry]:
        path = f"{package.subdir}/{parse(package.filename).project}/index.json"
        answer = self.client.send("GET", path)
        address = redact(f"{self.client.url}/{path}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return {}
        if answer.status_code != httpx.codes.OK:
            raise NetworkError(f"{address} answered {answer.status_code}.")
        return index.read_entries(answer.content, address)
