"""A .cu file's arguments of nvcc with our headers in the place of torch's: own_headers.py COMMAND...

Prints one argument a line, or nothing where the file stays with torch's headers: because it includes one that
cu_headers/ has not, or one whose name only the preprocessor knows. What is left in the command names no torch, so the
compile cache has one object for all of them; torch's folders are not on the path, so no file sees both.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_INCLUDE = re.compile(r"""^\s*#\s*include(?:_next)?\s*(?:"([^"]+)"|<([^>]+)>|(\S))""", re.MULTILINE)
# Of torch wherever they are.
_TORCHS = {"ATen", "c10", "caffe2", "pybind11", "torch"}
# CUDA's own headers, which a host environment may have beside torch's.
_CUDAS = {"cooperative_groups", "cub", "cuda", "nv", "thrust"}
_FOLDER_OPTIONS = ("-isystem", "-I")
# What torch's build adds for the Python module, and the C++ ABI where it is the compilers' default: newer torches leave
# that one out. The module's name is the same for all of them, and tells who measures a build what is compiled.
_DEFINES = ("-DTORCH_", "-DPYBIND11_", "-DPy_LIMITED_API", "-D_GLIBCXX_USE_CXX11_ABI=1")
_KEPT = "-DTORCH_EXTENSION_NAME="


class UnknownNameError(Exception):
    """An include of what the preprocessor makes."""


def _included(file: Path) -> Iterator[tuple[str, bool]]:
    for quoted, angled, other in _INCLUDE.findall(file.read_text(encoding="utf-8", errors="replace")):
        if other:
            raise UnknownNameError
        yield quoted or angled, bool(quoted)


def uses_only(file: Path, own: Path, folders: Sequence[Path], torchs: Sequence[Path], toolkit: Sequence[Path]) -> bool:
    """Whether all that a file includes of torch is in ``own``, the project's headers from ``folders`` included."""
    waiting, seen = [file], {file}
    while waiting:
        here = waiting.pop()
        try:
            names = list(_included(here))
        except UnknownNameError:
            return False
        for name, quoted in names:
            near = [here.parent] if quoted else []
            found = next((path for folder in (*near, *folders) if (path := folder / name).is_file()), None)
            if found is not None:
                if found not in seen:
                    seen.add(found)
                    waiting.append(found)
            elif not (own / name).is_file() and _is_torchs(name, torchs, toolkit):
                return False
    return True


def _is_torchs(name: str, torchs: Sequence[Path], toolkit: Sequence[Path]) -> bool:
    top = name.split("/")[0]
    if top in _TORCHS:
        return True
    if top in _CUDAS or any((folder / name).is_file() for folder in toolkit):
        return False
    return any((folder / name).is_file() for folder in torchs)


def _folders(command: Sequence[str]) -> Iterator[tuple[int, int, Path]]:
    """Each folder of headers in a command: place, number of words, path."""
    place = 0
    while place < len(command):
        for option in _FOLDER_OPTIONS:
            if command[place] == option and place + 1 < len(command):
                yield place, 2, Path(command[place + 1])
                place += 1
                break
            if command[place].startswith(option):
                yield place, 1, Path(command[place][len(option) :])
                break
        place += 1


def rewritten(command: Sequence[str], own: Path, environment: dict[str, str]) -> list[str]:
    """The command without torch, or nothing (see above)."""
    work, host, build = (Path(environment[name]) for name in ("SRC_DIR", "PREFIX", "BUILD_PREFIX"))
    toolkit = [build / "include", *build.glob("targets/*/include"), *host.glob("targets/*/include")]
    # Python's own and the whole host environment's, too: with conda's torch, that is where torch's headers are.
    torchs = {host / "include", Path(environment["SP_DIR"])}
    dropped: set[int] = set()
    passed: list[Path] = []
    projects: list[Path] = []
    for place, words, folder in _folders(command):
        if any(there == folder or there in folder.parents for there in torchs):
            dropped.update(range(place, place + words))
            passed.append(folder)
        elif any(there == folder or there in folder.parents for there in (work, work.resolve())):
            projects.append(folder)
    source = next(work / word for word in command if word.endswith(".cu"))
    if not uses_only(source, own, projects, passed, toolkit):
        return []
    left = (word for place, word in enumerate(command) if place not in dropped)
    compiler, *arguments = (word for word in left if word.startswith(_KEPT) or not word.startswith(_DEFINES))
    return [compiler, f"-I{own}", *arguments]


if __name__ == "__main__":
    print("\n".join(rewritten(sys.argv[1:], Path(os.environ["CU_HEADERS"]), dict(os.environ))))
