"""Takes the files out of one .deb: no root, nothing installed, no script of the package run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

from ssm_forge.base import foreign
from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.unpacking import unpack_tar

_AR_MAGIC = b"!<arch>\n"
# Of a package's files; the largest that we use, of CUDA's development libraries, have half of it.
_MOST_DATA_BYTES = 4 << 30


def unpack(path: Path, target: Path) -> None:
    """Extract the files of a .deb below ``target``; absolute links are turned to point inside it.

    Raises:
        IntegrityError: when the file is not a Debian package, or would write outside ``target``.
    """
    try:
        with path.open("rb") as stream:
            name, data = _data_member(stream)
        if name.endswith(".zst"):
            data = io.BytesIO(foreign.from_zstd(data, _MOST_DATA_BYTES))
    except ValueError as error:
        raise IntegrityError(f"{path} is not a Debian package that can be unpacked ({error}).") from error
    unpack_tar(data, target, named=path, absolute_links=True)


def _data_member(stream: IO[bytes]) -> tuple[str, io.BytesIO]:
    """The data archive of a .deb: an ``ar`` file with 60-byte member headers (deb(5), ar(5))."""
    if stream.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ValueError("no ar header")
    while header := stream.read(60):
        if len(header) != 60 or header[58:] != b"`\n":
            raise ValueError("damaged ar header")
        name, digits = header[:16].decode("ascii").strip().rstrip("/"), header[48:58].strip()
        if not digits.isdigit():
            raise ValueError("a member's size is no number")
        size = int(digits)
        if name.startswith("data.tar"):
            return name, io.BytesIO(stream.read(size))
        stream.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("no data.tar in it")
