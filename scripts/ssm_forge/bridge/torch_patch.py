"""The patches that teach torch's compiler check the CUDA releases it does not know.

torch refuses a host compiler outside the bounds of ``CUDA_GCC_VERSIONS`` and ``CUDA_CLANG_VERSIONS`` in
``torch/utils/cpp_extension.py``, and only warns where a release is not listed. The bounds come from each
toolkit's own ``crt/host_config.h`` and are kept in ``patches/torch/bounds.toml``; the patches under
``patches/torch/VERSION`` are made from both here, and applied by ``recipes/common/patch_torch.py``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from ssm_forge.base import foreign
from ssm_forge.base.errors import BuildError

MEMBER = "torch/utils/cpp_extension.py"

# host_config.h names no oldest g++; this is what torch itself has for every release since 11.4.
_OLDEST_GCC = "(6, 0, 0)"
_OLDEST_CLANG = "MINIMUM_CLANG_VERSION"

_HEADER = """\
Add the CUDA releases that torch {version} does not list to CUDA_GCC_VERSIONS and CUDA_CLANG_VERSIONS, with the
bounds of each toolkit's own crt/host_config.h, and widen what torch has stricter than the toolkit itself (g++ 14
for 12.8 and 12.9). torch then enforces its check of the host compiler, instead of warning that there are no
version bounds defined.

Upstream: '11.8' is missing in every release so far, and every table ends with the release of its day.

"""


@dataclass(frozen=True)
class Bounds:
    """Host compilers that a toolkit accepts.

    Attributes:
        cuda: CUDA release, ``11.8``.
        gcc: newest g++ major.
        clang: newest clang major.
        source: the file that says so.
        sha256: digest of ``host_config.h``.
    """

    cuda: str
    gcc: int
    clang: int
    source: str = ""
    sha256: str = ""


def read_host_config(text: str, cuda: str) -> Bounds:
    """The bounds in ``crt/host_config.h``; where it has two for clang, the stricter one.

    Raises:
        BuildError: when the header says it another way.
    """
    gcc = re.findall(r"^#if __GNUC__ > (\d+)$", text, re.MULTILINE)
    clang = re.findall(r"^#if \(__clang_major__ >= (\d+)\)", text, re.MULTILINE)
    if not gcc or not clang:
        raise BuildError(f"crt/host_config.h of CUDA {cuda} states no newest g++ or clang that can be read.")
    return Bounds(cuda, min(map(int, gcc)), min(map(int, clang)) - 1)


def read_bounds(path: Path) -> tuple[Bounds, ...]:
    """``patches/torch/bounds.toml``, oldest release first."""
    data = foreign.toml_from(path.read_bytes())
    bounds = [Bounds(cuda=cuda, **entry) for cuda, entry in data.items()]
    return tuple(sorted(bounds, key=lambda b: Version(b.cuda)))


def make_patch(version: str, source: str, bounds: Sequence[Bounds]) -> str:
    """The patch for one torch: unified diff with its header.

    Args:
        version: torch version.
        source: that torch's ``cpp_extension.py``.

    Raises:
        BuildError: when the file has no such tables.
    """
    text = source
    for table, oldest in (("CUDA_GCC_VERSIONS", _OLDEST_GCC), ("CUDA_CLANG_VERSIONS", _OLDEST_CLANG)):
        text = _extended(text, table, oldest, bounds, version)
    diff = difflib.unified_diff(source.splitlines(True), text.splitlines(True), f"a/{MEMBER}", f"b/{MEMBER}")
    return _HEADER.format(version=version) + "".join(diff)


def _extended(text: str, table: str, oldest: str, bounds: Sequence[Bounds], version: str) -> str:
    block = re.search(rf"^{table}: VersionMap = \{{\n(.*?)^\}}\n", text, re.MULTILINE | re.DOTALL)
    if block is None:
        raise BuildError(
            f"{MEMBER} of torch {version} has no table {table} of the known form.",
            fix="Look at the file: torch's check has changed, and the patch has to be written by hand.",
        )
    lines = {line.split("'")[1]: line for line in block.group(1).splitlines(True) if "'" in line}
    for bound in bounds:
        beyond = (bound.gcc if "GCC" in table else bound.clang) + 1
        line = lines.get(bound.cuda, f"    '{bound.cuda}': ({oldest}, (0, 0)),\n")
        limit = re.search(r"\((\d+), 0\)\),", line)
        if limit is None:
            raise BuildError(f"{table} of torch {version} has a line of unknown form: {line.strip()}")
        if int(limit.group(1)) < beyond:
            lines[bound.cuda] = line.replace(limit.group(0), f"({beyond}, 0)),")
    body = "".join(lines[cuda] for cuda in sorted(lines, key=Version))
    return text[: block.start(1)] + body + text[block.end(1) :]
