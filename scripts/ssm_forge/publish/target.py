"""What every kind of channel that is published to offers, and what is sent there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ssm_forge.base.errors import ForgeError
from ssm_forge.base.web import TransientError as TransientError  # What targets raise.
from ssm_forge.channel.index import IndexRecord

Outcome = Literal["added", "was there"]
Advance = Callable[[int], None]


class Publishable(Protocol):
    """A checked file that has a place in a channel: a conda package, or a wheel.

    Attributes:
        path: the file on this machine.
        filename: its name in the channel.
        subdir: the folder of the channel that it belongs into.
        sha256: of its bytes, hex.
        size: bytes.
    """

    @property
    def path(self) -> Path: ...
    @property
    def filename(self) -> str: ...
    @property
    def subdir(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Parcel:
    """What is published together.

    Attributes:
        package: the checked file.
        statements: its sidecar, a JSON list of sigstore bundles; empty when there is none.
    """

    package: Publishable
    statements: bytes = b""


class Target(Protocol):
    """A channel that can be published to."""

    def present(self, package: Publishable) -> str | None:
        """sha256 (hex) of the file of the package's name in the channel; None when there is none."""
        ...

    def upload(self, parcel: Parcel, advance: Advance) -> Outcome:
        """Add one package, calling ``advance`` with the bytes that went. May be called again after a TransientError."""
        ...

    def attach(self, parcel: Parcel) -> bool:
        """Put the statements beside the package; False where the server has no place for them."""
        ...

    def finish(self, parcels: Sequence[Parcel]) -> None:
        """Bring the index in step, once everything was sent."""
        ...


def compare(package: Publishable, record: IndexRecord | None) -> str | None:
    """The sha256 that an index's record tells of a package; None when the index does not list it.

    Raises:
        ForgeError: when the record has no sha256, so that nothing can be said about the package's bytes.
    """
    if record is None:
        return None
    if record.sha256 is None:
        raise ForgeError(f"the channel lists {package.filename} without a sha256, so it can't be compared.")
    return record.sha256
