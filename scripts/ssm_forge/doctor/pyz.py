"""Writes ``ssm-forge-doctor.pyz``: this package as one file, the same bytes from everywhere."""

from __future__ import annotations

import zipfile
from pathlib import Path

_MAIN = """\
import sys

if sys.version_info < (3, 8):
    sys.exit("error: ssm-forge-doctor needs Python 3.8 or newer, this is %d.%d." % sys.version_info[:2])
from ssm_forge.doctor.__main__ import guarded

sys.exit(guarded())
"""
_FIRST_LINE = b"#!/usr/bin/env python3\n"
# The oldest that a zip file can say.
_TIME = (1980, 1, 1, 0, 0, 0)


def write(target: Path) -> None:
    """Write ``ssm-forge-doctor.pyz`` to ``target``, whole or not at all.

    It is not compressed: compressors differ between machines.

    Raises:
        OSError: when it can't be written.
    """
    root = Path(__file__).parents[2]
    package = root / "ssm_forge"
    files = [
        package / "__init__.py",
        *sorted(p for p in (package / "doctor").iterdir() if p.suffix in (".py", ".json")),
    ]
    contents = [("__main__.py", _MAIN.encode())]
    contents += [(path.relative_to(root).as_posix(), path.read_bytes()) for path in files]
    # By hand: this folder travels alone, without base/files.
    partial = target.with_name(f".{target.name}.part")
    with partial.open("wb") as stream:
        stream.write(_FIRST_LINE)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, data in contents:
                entry = zipfile.ZipInfo(name, _TIME)
                entry.create_system, entry.external_attr = 3, 0o100644 << 16
                archive.writestr(entry, data)
    partial.chmod(0o755)
    partial.replace(target)
