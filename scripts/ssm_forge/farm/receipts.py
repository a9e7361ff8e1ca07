"""Receipts: what a finished job leaves, and how long it is believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ssm_forge.base import owners
from ssm_forge.channel import folder as channels
from ssm_forge.channel.index import IndexRecord

How = Literal["built", "found", "copied", "made"]
HOW: tuple[How, ...] = ("built", "found", "copied", "made")


@dataclass(frozen=True)
class Receipt:
    """What came of a job.

    Attributes:
        job: its name.
        digest: of what it was made from.
        how: ``built``; ``found`` in the channel, as it was to be; ``copied`` from another channel; ``made``, of what is
            no package of ours.
        file: name of the package, or path of the wheel; empty for other jobs.
        sha256: of that file.
        seconds: wall time.
        cpu: CPU seconds of everything that the job ran.
        cores: that the job had.
        host: where it ran.
    """

    job: str
    digest: str
    how: How
    file: str = ""
    sha256: str = ""
    seconds: float = 0.0
    cpu: float = 0.0
    cores: int = 0
    host: str = ""


def name(kind: str, job: str, digest: str) -> str:
    """The path below the farm's folder where the receipt of a job lies, or will."""
    return f"receipts/{kind}/{job}.{digest[:16]}.json"


def read(file: Path) -> Receipt | None:
    """The receipt in a file; None where there is none, or it can't be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        receipt = Receipt(**content)
    except (OSError, ValueError, TypeError):
        return None
    return receipt if receipt.how in HOW else None


def write(target: Path, receipt: Receipt) -> None:
    """Write a receipt to a file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{owners.mark()}.part")
    try:
        partial.write_text(json.dumps(asdict(receipt), indent=1), encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def holds(receipt: Receipt, channel: Path, listed: Mapping[str, IndexRecord]) -> bool:
    """Whether the channel has the very package that a receipt names: listed with its hash, with all its bytes there.

    Args:
        listed: what the channel's index lists, file name -> record.
    """
    record = listed.get(receipt.file)
    held = channels.find(channel, receipt.file)
    try:
        size = held.stat().st_size if held is not None else -1
    except OSError:
        return False
    return record is not None and (record.sha256, record.size) == (receipt.sha256, size)
