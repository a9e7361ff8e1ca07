"""Publishing into a folder, on this machine or on a network drive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.web import TransientError as TransientError  # What targets raise.
from ssm_forge.channel import folder as channels
from ssm_forge.publish.target import Advance, Outcome, Parcel, Publishable


class FolderTarget:
    """A channel in a folder, on this machine or on a network drive; its methods are those of :class:`Target`."""

    def __init__(self, channel: Path) -> None:
        self.channel = channel

    def present(self, package: Publishable) -> str | None:
        path = self.channel / package.subdir / package.filename
        if path.is_symlink():
            raise IntegrityError(f"{path} is a symbolic link, not a package.", fix="Remove it.")
        return sha256_of(path) if path.exists() else None

    def upload(self, parcel: Parcel, advance: Advance) -> Outcome:
        package = parcel.package
        folder = self.channel / ".uploads"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with channels.locked(self.channel):
                partial = folder / f"{package.sha256}.part"
                try:
                    channels.copy(package.path, partial, advance)
                    added = channels.place(self.channel, partial, package.subdir, package.filename, package.sha256)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise channels.full(self.channel, error) from error
        return "added" if added else "was there"

    def attach(self, parcel: Parcel) -> bool:
        package = parcel.package
        try:
            with channels.locked(self.channel):
                channels.place_sidecar(self.channel, package.subdir, package.filename, parcel.statements)
        except OSError as error:
            raise channels.full(self.channel, error) from error
        return True

    def finish(self, parcels: Sequence[Parcel]) -> None:
        channels.ensure_indexed(self.channel)
