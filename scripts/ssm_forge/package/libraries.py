"""What is in a shared library: pure questions to its ELF headers, answered with pyelftools.

GPU code is asked of NVIDIA's cuobjdump, which reads every form of fat binary.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.hash import ELFHashSection, GNUHashSection
from elftools.elf.sections import SymbolTableSection
from packaging.version import Version

from ssm_forge.base.arch import ArchList, Capability
from ssm_forge.base.errors import IntegrityError, MachineError
from ssm_forge.base.platforms import PLATFORMS

# The C library is the system's, as everywhere in conda.
GLIBC_LIBRARIES = frozenset(
    {
        "libc.so.6",
        "libm.so.6",
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
        "libutil.so.1",
        "libresolv.so.2",
        "libmvec.so.1",
        "libanl.so.1",
        *(known.loader for known in PLATFORMS),
    }
)


@dataclass(frozen=True)
class Library:
    """The dynamic section of a shared library or executable.

    Attributes:
        needed: DT_NEEDED names.
        rpaths: DT_RPATH or DT_RUNPATH entries as written.
        undefined: symbols that others must define; weak ones are left out.
        versions: library -> symbol versions needed from it.
    """

    path: Path
    needed: tuple[str, ...]
    rpaths: tuple[str, ...]
    undefined: frozenset[str]
    versions: dict[str, frozenset[str]]

    @property
    def foreign_rpaths(self) -> tuple[str, ...]:
        """Where it looks for libraries that is not beside it: a folder of the machine that built it."""
        return tuple(rpath for rpath in self.rpaths if not rpath.startswith(("$ORIGIN", "${ORIGIN}")))

    @property
    def glibc(self) -> str:
        """The highest GLIBC symbol version needed, ``2.32``; ``2.2.5`` when none is."""
        needed = (
            name.removeprefix("GLIBC_")
            for names in self.versions.values()
            for name in names
            if re.fullmatch(r"GLIBC_[\d.]+", name)
        )
        return max(needed, key=Version, default="2.2.5")


def rpaths(path: Path) -> tuple[str, ...]:
    """DT_RPATH or DT_RUNPATH of a file, as :attr:`Library.rpaths`, without reading its symbols.

    Raises:
        IntegrityError: when the file is no ELF library.
    """
    return _dynamic_of(path).rpaths


def needed(path: Path) -> tuple[str, ...]:
    """DT_NEEDED of a file, as :attr:`Library.needed`, without reading its symbols.

    Raises:
        IntegrityError: when the file is no ELF library.
    """
    return _dynamic_of(path).needed


class _Dynamic(NamedTuple):
    """What a library needs, and the folders where the loader looks for it."""

    needed: tuple[str, ...]
    rpaths: tuple[str, ...]


def _dynamic_of(path: Path) -> _Dynamic:
    try:
        with path.open("rb") as stream:
            return _dynamic(ELFFile(stream))
    except (ELFError, StopIteration, OSError) as error:
        raise IntegrityError(f"{path} is not a readable ELF library ({error}).") from error


def _dynamic(elf: ELFFile) -> _Dynamic:
    dynamic: Any = next(s for s in elf.iter_sections() if isinstance(s, DynamicSection))
    needed, folders = [], []
    for tag in dynamic.iter_tags():
        if tag.entry.d_tag == "DT_NEEDED":
            needed.append(tag.needed)
        elif tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
            text = tag.rpath if tag.entry.d_tag == "DT_RPATH" else tag.runpath
            folders += text.split(":")
    return _Dynamic(tuple(needed), tuple(folders))


def read(path: Path) -> Library:
    """What the ELF headers of a shared library or program say.

    Raises:
        IntegrityError: when the file is no ELF library.
    """
    try:
        with path.open("rb") as stream:
            elf = ELFFile(stream)
            needed, folders = _dynamic(elf)
            versions: dict[str, set[str]] = {}
            for section in elf.iter_sections():
                if isinstance(section, GNUVerNeedSection):
                    library: Any
                    for library, auxiliaries in section.iter_versions():
                        versions.setdefault(library.name, set()).update(a.name for a in auxiliaries)
            symbols = elf.get_section_by_name(".dynsym")
            undefined = frozenset(_undefined(symbols)) if isinstance(symbols, SymbolTableSection) else frozenset()
    except (ELFError, StopIteration, OSError) as error:
        raise IntegrityError(f"{path} is not a readable ELF library ({error}).") from error
    return Library(path, needed, folders, undefined, {k: frozenset(v) for k, v in versions.items()})


def _undefined(symbols: SymbolTableSection) -> Iterable[str]:
    for symbol in symbols.iter_symbols():
        if symbol.entry.st_shndx == "SHN_UNDEF" and symbol.name and symbol.entry.st_info.bind != "STB_WEAK":
            yield symbol.name


def defines(path: Path, names: Iterable[str]) -> set[str]:
    """Which of ``names`` the library at ``path`` exports (by its hash table, so big libraries cost nothing).

    Raises:
        IntegrityError: when the file is no ELF library.
    """
    try:
        with path.open("rb") as stream:
            elf = ELFFile(stream)
            table = next((s for s in elf.iter_sections() if isinstance(s, (GNUHashSection, ELFHashSection))), None)
            if table is None:
                return set()
            look_up: Callable[[str], Any] = table.get_symbol
            symbols = {name: look_up(name) for name in names}
            return {name for name, symbol in symbols.items() if symbol and symbol.entry.st_shndx != "SHN_UNDEF"}
    except (ELFError, OSError) as error:
        raise IntegrityError(f"{path} is not a readable ELF library ({error}).") from error


@dataclass(frozen=True)
class Resolution:
    """How a library's needs are met inside a prefix.

    Attributes:
        libraries: needed name -> file, transitively.
        missing_libraries: names found nowhere in the prefix.
        outside: names that resolve to a file outside the prefix.
        missing_symbols: undefined symbols that no found library defines.
    """

    libraries: dict[str, Path]
    missing_libraries: tuple[str, ...]
    outside: tuple[str, ...]
    missing_symbols: tuple[str, ...]


def resolve(library: Library, prefix: Path, preloaded: Iterable[Path]) -> Resolution:
    """Follow DT_NEEDED as the loader would, but never out of ``prefix``.

    Args:
        preloaded: libraries that are in the process before this one is loaded: the interpreter, and torch's,
            which upstream requires to be imported first.
    """
    root = prefix.resolve()
    by_name = {path.name: path for path in preloaded}
    paths: dict[str, Path] = {}
    missing: list[str] = []
    outside: list[str] = []
    queue = [(library.path, name, library.rpaths) for name in library.needed]
    while queue:
        origin, name, rpaths = queue.pop(0)
        if name in GLIBC_LIBRARIES or name in paths or name in missing:
            continue
        path = _locate(name, origin, rpaths) or by_name.get(name)
        if path is None:
            missing.append(name)
            continue
        if not path.resolve().is_relative_to(root):
            outside.append(f"{name} ({path})")
        paths[name] = path
        inner = read(path)
        queue += [(path, needed, inner.rpaths or rpaths) for needed in inner.needed]
    wanted = set(library.undefined) - _from_glibc(library)
    for path in [*paths.values(), *by_name.values()]:
        if not wanted:
            break
        wanted -= defines(path, wanted)
    return Resolution(paths, tuple(missing), tuple(outside), tuple(sorted(wanted)))


def _locate(name: str, origin: Path, rpaths: Iterable[str]) -> Path | None:
    for rpath in rpaths:
        folder = Path(rpath.replace("$ORIGIN", str(origin.parent)).replace("${ORIGIN}", str(origin.parent)))
        if (folder / name).exists():
            return folder / name
    return None


def _from_glibc(library: Library) -> set[str]:
    """Undefined symbols whose version says that the C library has them."""
    names = set()
    with library.path.open("rb") as stream:
        elf = ELFFile(stream)
        symbols: Any = elf.get_section_by_name(".dynsym")
        versions: Any = elf.get_section_by_name(".gnu.version")
        needs: Any = elf.get_section_by_name(".gnu.version_r")
        if symbols is None or versions is None or needs is None:
            return set()
        glibc_indices = {
            auxiliary.entry.vna_other
            for needed, auxiliaries in needs.iter_versions()
            for auxiliary in auxiliaries
            if needed.name in GLIBC_LIBRARIES
        }
        for number, symbol in enumerate(symbols.iter_symbols()):
            index = versions.get_symbol(number).entry["ndx"]
            if isinstance(index, int) and (index & 0x7FFF) in glibc_indices:
                names.add(symbol.name)
    return names


def cuobjdump() -> Path:
    """NVIDIA's cuobjdump, from the tools environment or PATH.

    Raises:
        MachineError: when it is nowhere.
    """
    site = Path(sysconfig.get_paths()["purelib"])
    for candidate in sorted(site.glob("nvidia/*/bin/cuobjdump")):
        return candidate
    tool = shutil.which("cuobjdump")
    if tool is None:
        raise MachineError("cuobjdump is missing from the tools.", fix="Delete .pixi/tools and run again.")
    return Path(tool)


def gpu_code(path: Path) -> ArchList:
    """The SASS and PTX architectures in a library.

    Raises:
        IntegrityError: when there is no GPU code at all, or the file can't be read.
    """
    sass = _list(path, "--list-elf", r"\.sm_(\d+)[a-z]?\.")
    ptx = _list(path, "--list-ptx", r"\.sm_(\d+)[a-z]?\.|\.compute_(\d+)[a-z]?\.")
    if not sass and not ptx:
        raise IntegrityError(f"{path} holds no GPU code.")
    return ArchList(tuple(sorted(sass)), tuple(sorted(ptx)))


def _list(path: Path, option: str, pattern: str) -> set[Capability]:
    done = subprocess.run([cuobjdump(), option, path], capture_output=True, text=True, check=False)
    if done.returncode and "does not contain device code" not in done.stderr:
        raise IntegrityError(f"cuobjdump could not read {path} ({done.stderr.strip() or done.returncode}).")
    capabilities = set()
    for line in done.stdout.splitlines():
        match = re.search(pattern, line)
        if match:
            capabilities.add(Capability.from_sm(next(group for group in match.groups() if group)))
    return capabilities
