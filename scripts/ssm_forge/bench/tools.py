"""What a process of a build is, from its command line: which tool, which source file, which extension."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath

# The compilers themselves; everything else that a build runs is its overhead.
COMPILERS = ("cicc", "ptxas", "cudafe++", "host compiler")

_HOST = re.compile(
    r"((x86_64|aarch64)-\S+-)?(g\+\+|gcc|c\+\+|cc)(-[\d.]+)?|cc1|cc1plus|as|ld|ld\.\w+|collect2|lto1|lto-wrapper"
)
_NAMED = {"cicc", "ptxas", "cudafe++", "fatbinary", "nvlink", "nvcc", "ninja", "ccache"}
_SHELLS = {"sh", "bash", "dash"}
_SOURCE = re.compile(r"\S+\.(cu|cpp|cc|cxx|c)")
_EXTENSION = re.compile(r"-DTORCH_EXTENSION_NAME=(\w+)")


def describe(argv: tuple[str, ...]) -> tuple[str, Mapping[str, str]]:
    """The tool, and the labels ``source`` and ``extension`` that its command line tells.

    A tool that is not told apart is ``other``. A compiler that only links has the source ``(link)``.
    """
    tool = _tool(argv[0])
    labels = {}
    sources = [word for word in argv if _SOURCE.fullmatch(word)]
    extension = next((m.group(1) for word in argv if (m := _EXTENSION.fullmatch(word))), "")
    if extension:
        labels["extension"] = extension
    if tool in ("nvcc", "ccache", "host compiler") and "-c" in argv and sources:
        labels["source"] = PurePath(sources[-1]).name
    elif tool == "host compiler" and (linked := _linked(argv)):
        labels |= {"source": "(link)", "extension": linked}
    return tool, labels


def _tool(program: str) -> str:
    # The recipes start some of nvcc's compilers by a script of their name.
    name = PurePath(program).name.removesuffix(".real")
    if name in _NAMED:
        return name
    if name in _SHELLS:
        return "shell"
    if _HOST.fullmatch(name):
        return "host compiler"
    return "python" if name.startswith("python") else "other"


def _linked(argv: tuple[str, ...]) -> str:
    """The extension that a linking command makes; empty when it makes none."""
    if "-o" not in argv or "-c" in argv:
        return ""
    output = PurePath(argv[argv.index("-o") + 1 :][0] if argv.index("-o") + 1 < len(argv) else "").name
    return output.split(".")[0] if ".so" in output else ""
