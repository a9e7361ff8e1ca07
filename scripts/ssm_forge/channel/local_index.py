"""The index of a channel that lies on this machine: its own folder, or a recorded snapshot of what a server has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

from ssm_forge.base.errors import UsageError
from ssm_forge.base.files import write_whole
from ssm_forge.base.paths import workspace
from ssm_forge.channel import index
from ssm_forge.manifest.virtual import channel_url


def folder_of(base: str, snapshot: Path | None) -> Path | None:
    """The folder on this machine that has a channel's repodata; None when the channel is only online.

    Args:
        base: the channel's URL.
        snapshot: folder of recorded channel data, if there is one.
    """
    path = urlparse(base).path
    if base.startswith("file://"):
        return Path(unquote(path))
    # A snapshot mirrors the paths of the server: nvidia/label/cuda-11.8.0 is three folders deep.
    return snapshot / path.strip("/") if snapshot else None


def require_readable(channels: Sequence[str], subdir: str, snapshot: Path | None) -> None:
    """Read what these channels have of indexes on this machine: the engine does not say in which file it met damage.

    Args:
        channels: names or URLs.
        subdir: conda platform; ``noarch`` is read too.
        snapshot: folder of recorded channel data, if there is one.

    Raises:
        DamagedIndexError: for the first index that can't be read.
    """
    for channel in channels:
        folder = folder_of(channel_url(channel), snapshot)
        for part in (subdir, "noarch"):
            if folder is not None and (path := repodata_file(folder / part)) is not None:
                index.records(path.read_bytes(), str(folder / part / "repodata.json"))


def repodata_file(folder: Path) -> Path | None:
    """The path of a subdir's repodata, uncompressed; None where there are none.

    Compressed ones are unpacked into the cache, once.

    Raises:
        UsageError: when a compressed file is none.
    """
    plain, packed = folder / "repodata.json", folder / "repodata.json.zst"
    if plain.exists():
        return plain
    if not packed.exists():
        return None
    import zstandard

    data = packed.read_bytes()
    cache = workspace().cache / "repodata"
    target = cache / f"snapshot-{hashlib.sha256(data).hexdigest()[:32]}.json"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(target, zstandard.ZstdDecompressor().stream_reader(data).read())
        except zstandard.ZstdError as error:
            raise UsageError(f"{packed} is not a zstd file ({error}).") from error
    return target
