"""What an environment is, read from its files: which Python, where packages are, which packages, who made it."""

from __future__ import annotations

import csv
import os
import re
import shlex
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from packaging.utils import canonicalize_name

from ssm_forge.base import platforms
from ssm_forge.base.errors import InstallError, MachineError

Kind = Literal["venv", "conda", "plain"]

# e_machine of an ELF file -> the architecture, as uname has it.
_MACHINES = {62: "x86-64", 183: "aarch64", 3: "i386", 21: "ppc64le", 243: "riscv64", 22: "s390x"}
_LONGEST_METADATA = 1 << 20


@dataclass(frozen=True)
class Distribution:
    """One installed package, as its dist-info says.

    Attributes:
        name: normalised, ``mamba-ssm``.
        info: its dist-info folder.
        requires: its ``Requires-Dist`` lines.
        installer: who installed it, ``pip`` or ``conda``; may be empty.
    """

    name: str
    version: str
    info: Path
    requires: tuple[str, ...]
    installer: str

    def paths(self) -> list[tuple[str, str]]:
        """Its files and their hashes as RECORD has them: paths from the folder that the dist-info is in.

        Raises:
            InstallError: when there is no RECORD.
        """
        return read_record(self.info)


@dataclass(frozen=True)
class Existing:
    """An environment that somebody has.

    Attributes:
        prefix: its folder.
        python: its interpreter, as it is called.
        version: of Python; only the minor where nothing tells more.
        base: the folder of the installation that its Python is from.
        sites: folders that packages are imported from, in order; packages are installed into the first.
        conda: name -> (version, build) of conda's records.
        by_uv: uv made it, and it may have no pip.
        target: another folder to install into, that the user puts on Python's path; nothing of the environment's own
            is changed then.
    """

    prefix: Path
    kind: Kind
    python: Path
    version: str
    base: Path
    sites: tuple[Path, ...]
    conda: Mapping[str, tuple[str, str]]
    by_uv: bool
    target: Path | None = None

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])

    @property
    def site(self) -> Path:
        """Where packages are installed."""
        return self.target or self.sites[0]

    @property
    def folders(self) -> tuple[Path, ...]:
        """All that packages are imported from, in order."""
        return tuple(dict.fromkeys((self.site, *self.sites)))

    @property
    def root(self) -> Path:
        """What nothing is written outside of."""
        return self.target or self.prefix

    @property
    def option(self) -> str:
        """The options that name it to our own commands."""
        target = f" --target {shlex.quote(str(self.target))}" if self.target else ""
        return f"--prefix {shlex.quote(str(self.prefix))}{target}"

    @cached_property
    def distributions(self) -> dict[str, Distribution]:
        """Every installed package by its normalised name; of two, the one that is imported."""
        by_name: dict[str, Distribution] = {}
        for site in self.folders:
            for info in sorted(site.glob("*.dist-info")):
                distribution = read_distribution(info)
                if distribution is not None:
                    by_name.setdefault(distribution.name, distribution)
        return by_name


def find(prefix: Path) -> Path | None:
    """The environment that ``prefix`` names, where it is one that pip or uv install into; None for any other.

    A folder of a project names the ``.venv`` in it, an interpreter the environment that it belongs to.
    """
    prefix = prefix.expanduser().absolute()
    if prefix.is_file() and prefix.parent.name == "bin" and prefix.name.startswith("python"):
        prefix = prefix.parent.parent
    for folder in (prefix, prefix / ".venv"):
        if (folder / "pyvenv.cfg").is_file():
            return folder
    if (prefix / "conda-meta").is_dir():
        return prefix
    return prefix if any(_interpreters(prefix)) else None


def folder_of(prefix: Path | None) -> Path | None:
    """``prefix``, or the environment's folder where it is an interpreter."""
    return (find(prefix) or prefix) if prefix is not None and prefix.is_file() else prefix


def _interpreters(prefix: Path) -> list[Path]:
    candidates = [prefix / "bin/python", prefix / "bin/python3", *sorted((prefix / "bin").glob("python3.*"))]
    return [path for path in candidates if os.path.lexists(path) and not path.name.endswith("config")]


def read(prefix: Path, *, python: Path | None = None, target: Path | None = None) -> Existing:
    """Read an environment that :func:`find` has found.

    Args:
        python: its interpreter, where one was named; a folder such as ``/usr`` may have several.
        target: another folder to install into.

    Raises:
        InstallError: when it is broken, was moved, or is of a kind that nothing can be installed into.
        MachineError: when its Python is for another machine, or of a kind that the kernels can't be made for.
    """
    settings = _settings(prefix / "pyvenv.cfg")
    conda = conda_records(prefix)
    kind: Kind = "venv" if settings else "conda" if (prefix / "conda-meta").is_dir() else "plain"
    python = python or _python(prefix)
    _check_machine(python)
    _check_place(prefix)
    version, base = _version(prefix, settings, conda, python)
    minor = ".".join(version.split(".")[:2])
    library = prefix / f"lib/python{minor}"
    if not library.is_dir():
        other = next(iter(sorted(prefix.glob("lib/python3*"))), None)
        if other is not None and other.name.endswith("t"):
            raise MachineError(
                f"the Python of {prefix} is a free-threaded one ({other.name}), which the kernels are not made for.",
                fix=f"Make an environment with an ordinary Python {minor}.",
            )
        raise InstallError(
            f"{prefix} has no lib/python{minor}, the folder of its Python {version}.", fix="Make the environment anew."
        )
    sites = _debians(prefix, minor) if kind == "plain" else []
    sites = sites or [library / "site-packages"]
    if settings.get("include-system-site-packages", "").lower() == "true":
        sites += [base / f"lib/python{minor}/{name}" for name in ("site-packages", "dist-packages")]
        sites += [base / "lib/python3/dist-packages", Path(f"/usr/local/lib/python{minor}/dist-packages")]
    if kind == "plain" and target is None and (library / "EXTERNALLY-MANAGED").exists():
        raise InstallError(
            f"{prefix} is an installation of Python that its own tools manage (EXTERNALLY-MANAGED).",
            fix=f"Make an environment of it: '{python} -m venv --system-site-packages ENV', and name ENV; or leave it "
            "as it is, and take a folder of your own with --target DIR.",
        )
    present_sites = tuple(site for site in dict.fromkeys(sites) if site.is_dir())
    if not present_sites or (present_sites[0] != sites[0] and target is None):
        raise InstallError(f"{prefix} has no {sites[0].relative_to(prefix)}.", fix="Make the environment anew.")
    absolute_target = target.expanduser().absolute() if target else None
    return Existing(prefix, kind, python, version, base, present_sites, conda, "uv" in settings, absolute_target)


def _debians(prefix: Path, minor: str) -> list[Path]:
    """Where Debian's own Python, and Ubuntu's, have packages; pip's go into the first. Empty for any other Python."""
    if (prefix / f"lib/python{minor}/site-packages").is_dir() or not (prefix / "lib/python3/dist-packages").is_dir():
        return []
    names = (f"local/lib/python{minor}/dist-packages", "lib/python3/dist-packages", f"lib/python{minor}/dist-packages")
    return [prefix / name for name in names]


def check_writable(existing: Existing) -> None:
    """Refuse an environment that this user can't change.

    Raises:
        InstallError: when nothing can be installed into the environment, or into the folder that is named instead.
    """
    if existing.target is not None:
        _check_target(existing.target)
    elif not os.access(existing.site, os.W_OK) or _is_read_only(existing.site):
        raise InstallError(
            f"{existing.site} can't be written.",
            fix="Run this as whoever owns it, or leave it as it is and take a folder of your own with --target DIR, "
            "or put an environment of your own on top: "
            f"'{existing.python} -m venv --system-site-packages ENV', and name ENV with --prefix.",
        )


def _check_target(target: Path) -> None:
    nearest = target
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InstallError(f"{target} can't be made: {nearest} is no folder.", fix="Name a folder with --target.")
    if not os.access(nearest, os.W_OK) or _is_read_only(nearest):
        raise InstallError(f"{target} can't be written.", fix="Name a folder of your own with --target.")


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _settings(file: Path) -> dict[str, str]:
    """What ``pyvenv.cfg`` says; empty where there is none."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {"": "", **{key.strip().lower(): value.strip() for key, _, value in pairs}}


def conda_records(prefix: Path) -> dict[str, tuple[str, str]]:
    """Name -> (version, build) of what conda installed; by the records' names, for the files are megabytes."""
    records = {}
    for path in sorted((prefix / "conda-meta").glob("*.json")):
        match = re.fullmatch(r"(.+)-([^-]+)-([^-]+)", path.stem)
        if match is not None:
            records[match.group(1)] = (match.group(2), match.group(3))
    return records


def _python(prefix: Path) -> Path:
    links = _interpreters(prefix)
    if not links:
        raise InstallError(f"{prefix} has no bin/python.", fix="Make the environment anew.")
    working = next((link for link in links if link.exists()), None)
    if working is None:
        raise InstallError(
            f"the Python of {prefix} is gone: {links[0]} leads to {os.path.realpath(links[0])}, which does not exist.",
            fix="Install that Python again, or make the environment anew.",
        )
    return working


def _check_machine(python: Path) -> None:
    """Refuse an interpreter that was made for another kind of machine.

    Raises:
        MachineError: when the program is one of another architecture.
    """
    with python.open("rb") as stream:
        header = stream.read(20)
    if header[:4] != b"\x7fELF":
        return  # A script that starts the real one.
    (number,) = struct.unpack("<H" if header[5] == 1 else ">H", header[18:20])
    own = platforms.here()
    if number != own.elf:
        raise MachineError(
            f"{python} is a program for {_MACHINES.get(number, f'another machine ({number})')}, and the kernels are "
            f"made for {own.people}.",
            fix=f"Run this on such a machine, or name an environment for {own.people}.",
        )


def _check_place(prefix: Path) -> None:
    """Refuse an environment that no longer lies where it was made.

    Raises:
        InstallError: when the environment was made in another folder: its programs still start that one's Python.
    """
    made_at = _recorded_place(prefix)
    if made_at is not None and os.path.realpath(made_at) != os.path.realpath(prefix):
        raise InstallError(
            f"{prefix} was moved or copied: it was made as {made_at}, and its programs start the Python there.",
            fix=f"Make it anew in its place, or move it back to {made_at}.",
        )


def _recorded_place(prefix: Path) -> str | None:
    """Where the environment's own programs believe it to be."""
    text = _beginning(prefix / "bin/activate")
    named = re.search(r"""^\s*(?:export\s+)?VIRTUAL_ENV=(['"]?)(/[^'"\n]*)\1\s*$""", text, re.MULTILINE)
    if named:
        return named.group(2)
    if (prefix / "conda-meta").is_dir():
        for name in ("pip", "pip3"):
            started = re.match(r"#!(/\S+)/bin/python[\d.]*\n", _beginning(prefix / "bin" / name))
            if started:
                return started.group(1)
    return None


def _version(
    prefix: Path, settings: Mapping[str, str], conda: Mapping[str, tuple[str, str]], python: Path
) -> tuple[str, Path]:
    """(version of Python, the installation that it is from)"""
    if "python" in conda:
        return conda["python"][0], prefix
    base = Path(settings["home"]).parent if settings.get("home") else Path(os.path.realpath(python)).parents[1]
    if settings and not base.is_dir():
        raise InstallError(
            f"the Python that {prefix} was made with is gone: {settings.get('home')} does not exist.",
            fix="Install that Python again, or make the environment anew.",
        )
    recorded = re.match(r"3\.\d+(\.\d+)?", settings.get("version_info") or settings.get("version") or "")
    if recorded:
        return recorded.group(0), base
    folders = sorted(prefix.glob("lib/python3.*[0-9]"), key=lambda path: int(path.name.rpartition(".")[2]))
    named = re.fullmatch(r"python(3\.\d+)", Path(os.path.realpath(python)).name)
    if named or folders:
        return named.group(1) if named else folders[-1].name.removeprefix("python"), base
    raise InstallError(f"{prefix} does not tell which Python it has.", fix="Make the environment anew.")


def read_distribution(info: Path) -> Distribution | None:
    """What a dist-info folder says; None where it says no name or version."""
    header = _beginning(info / "METADATA").replace("\r\n", "\n").split("\n\n", 1)[0]
    name = re.search(r"^Name: *(\S+)", header, re.MULTILINE)
    version = re.search(r"^Version: *(\S+)", header, re.MULTILINE)
    if name is None or version is None:
        return None
    return Distribution(
        name=canonicalize_name(name.group(1)),
        version=version.group(1),
        info=info,
        requires=tuple(re.findall(r"^Requires-Dist: *(.*?)\s*$", header, re.MULTILINE)),
        installer=_beginning(info / "INSTALLER").strip(),
    )


def read_record(info: Path) -> list[tuple[str, str]]:
    """(path, hash) of every line of a RECORD; paths from the folder that the dist-info is in.

    Raises:
        InstallError: when there is none.
    """
    try:
        with (info / "RECORD").open(encoding="utf-8", newline="") as stream:
            return [(row[0], row[1]) for row in csv.reader(stream) if len(row) == 3]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InstallError(
            f"{info} is broken: its RECORD can't be read ({getattr(error, 'strerror', None) or error}).",
            fix="Install that package again.",
        ) from error


def _beginning(path: Path) -> str:
    """The beginning of a text file, empty where it can't be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(_LONGEST_METADATA).decode("utf-8", "replace")
    except OSError:
        return ""
