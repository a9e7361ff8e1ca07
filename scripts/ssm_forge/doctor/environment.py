"""What is installed in an environment: found in its files, and by asking its Python where it imports from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ssm_forge.doctor.processes import Clock, ask

PROJECTS = {"causal_conv1d_cuda": "causal-conv1d", "selective_scan_cuda": "mamba-ssm"}
MODULES = ("torch", "causal_conv1d", "mamba_ssm", *PROJECTS, "triton", "transformers", "einops", "ninja")

# Runs in the environment's Python, of any version from 3.6 on. Nothing is imported but the standard library.
_ASK = """
import importlib.util, json, sys, sysconfig
found = {}
for name in sys.argv[1:]:
    try:
        spec = importlib.util.find_spec(name)
        found[name] = spec and (spec.origin or (list(spec.submodule_search_locations or ()) + [None])[0])
    except Exception as error:
        found[name] = None
paths = sysconfig.get_paths()
print(json.dumps({
    "version": sys.version_info[:3], "path": sys.path, "prefix": sys.prefix, "base": sys.base_prefix, "found": found,
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"), "include": paths["include"],
    "sites": [paths["purelib"], paths["platlib"]], "executable": sys.executable}))
"""
_MOST_METADATA_BYTES = 1 << 18


class NoEnvironmentError(Exception):
    """There is nothing to examine.

    Attributes:
        code: of the finding that says so.
    """

    def __init__(self, code: str, evidence: str) -> None:
        super().__init__(evidence)
        self.code = code


@dataclass(frozen=True)
class Distribution:
    """One installed package, as its dist-info says.

    Attributes:
        name: normalised, ``mamba-ssm``.
        version: as written.
        folder: the site-packages folder that it is in.
        requires: its ``Requires-Dist`` lines.
        installer: who installed it, ``pip`` or ``conda``; may be empty.
        pure: its wheel has no compiled part.
        editable: it is a link to a source folder.
    """

    name: str
    version: str
    folder: Path
    requires: tuple[str, ...]
    installer: str
    pure: bool
    editable: bool


class CondaRecord(NamedTuple):
    """Version and build of one of conda's packages, as the name of its record says."""

    version: str
    build: str


@dataclass(frozen=True)
class Torch:
    """The torch that is imported.

    Attributes:
        folder: the package's folder.
        version: ``2.11.0+cu130``.
        cuda: of the build, ``13.0``; empty for one without CUDA.
        libraries: its own libraries.
    """

    folder: Path
    version: str
    cuda: str
    libraries: tuple[Path, ...]

    @property
    def minor(self) -> str:
        """``2.11`` of ``2.11.0+cu130``."""
        return ".".join(self.version.split("+")[0].split(".")[:2])


@dataclass(frozen=True)
class Environment:
    """A Python environment.

    Attributes:
        prefix: its folder.
        python: its interpreter.
        kind: ``conda``, ``pixi``, ``venv`` or ``system``.
        version: of Python, ``3.12``.
        suffix: of its extension modules.
        path: where it imports from, in order; an empty entry is the working folder.
        sites: its own site-packages.
        include: where its Python.h should be.
        origins: module -> file or folder that it would be imported from.
        distributions: every installed package, in the order of ``path``.
        conda: package name -> conda's record.
        torch: None where there is none.
    """

    prefix: Path
    python: Path
    kind: str
    version: str
    suffix: str
    path: tuple[Path, ...]
    sites: tuple[Path, ...]
    include: Path
    origins: Mapping[str, Path]
    distributions: tuple[Distribution, ...]
    conda: Mapping[str, CondaRecord]
    torch: Torch | None

    def distribution(self, name: str) -> Distribution | None:
        """The package of that name that is found first; None where there is none."""
        return next((entry for entry in self.distributions if entry.name == name), None)

    def extensions(self, module: str) -> list[Path]:
        """Every file of an extension module in the folders that are imported from, for any Python."""
        paths = []
        for folder in self.path:
            paths += sorted(folder.glob(f"{module}*.so")) if folder.is_dir() else []
        return [path for path in dict.fromkeys(paths) if re.match(rf"{module}(\.|$)", path.name)]

    def library_folders(self) -> list[Path]:
        """Where the environment itself has shared libraries."""
        folders = [self.prefix / "lib", *((self.torch.folder / "lib",) if self.torch else ())]
        for site in self.sites:
            folders += sorted(site.glob("nvidia/*/lib"))
        return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def interpreter(location: Path) -> Path:
    """The Python of an environment's folder, or ``location`` itself where that is a file.

    Raises:
        NoEnvironmentError: when there is none.
    """
    if location.is_file():
        return location
    for name in ("bin/python", "bin/python3", "python.exe", "Scripts/python.exe"):
        if (location / name).exists() or (location / name).is_symlink():
            return location / name
    inside = "an empty folder" if location.is_dir() and not any(location.iterdir()) else "no bin/python in it"
    reason = inside if location.is_dir() else "there is no such folder"
    raise NoEnvironmentError("not-an-environment", f"{location}: {reason}")


def examine(python: Path, variables: Mapping[str, str], clock: Clock) -> Environment:
    """What is installed for a Python, and where that Python imports it from.

    Args:
        python: the interpreter, which is started.
        variables: the environment variables that the user has.
        clock: how much time is left; the interpreter gets a part of it.

    Raises:
        NoEnvironmentError: when its Python does not run.
    """
    # No sitecustomize of a stranger decides how long this takes.
    answer = ask([str(python), "-c", _ASK, *MODULES], variables, clock.left(0.6))
    try:
        seen = json.loads(answer.output.splitlines()[-1])
    except (ValueError, IndexError):
        last_words = (answer.errors.strip().splitlines() or ["it said nothing"])[-1][:200]
        ended = "did not end in time" if answer.code is None else f"exit status {answer.code}"
        raise NoEnvironmentError("python-does-not-run", f"{python}: {ended}: {last_words}") from None
    path = tuple(dict.fromkeys(Path(entry).absolute() for entry in seen["path"] if not entry.endswith(".zip")))
    prefix = Path(seen["prefix"])
    origins = {name: Path(origin) for name, origin in seen["found"].items() if origin and origin != "built-in"}
    return Environment(
        prefix=prefix,
        python=python,
        kind=_kind(prefix, seen),
        version=".".join(map(str, seen["version"][:2])),
        suffix=seen["suffix"] or ".so",
        path=path,
        sites=tuple(dict.fromkeys(map(Path, seen["sites"]))),
        include=Path(seen["include"]),
        origins=origins,
        distributions=tuple(distribution for folder in path for distribution in _distributions(folder)),
        conda=_conda_records(prefix),
        torch=_torch(origins.get("torch"), prefix),
    )


def _kind(prefix: Path, seen: Mapping[str, Any]) -> str:
    if (prefix / "conda-meta").is_dir():
        return "pixi" if ".pixi" in prefix.parts else "conda"
    return "venv" if seen["prefix"] != seen["base"] else "system"


def _distributions(folder: Path) -> list[Distribution]:
    distributions = []
    if folder.is_dir():
        for entry in [*sorted(folder.glob("*.dist-info")), *sorted(folder.glob("*.egg-info"))]:
            distribution = _distribution(entry, folder)
            if distribution is not None:
                distributions.append(distribution)
    return distributions


def _distribution(entry: Path, folder: Path) -> Distribution | None:
    text = text_of(entry / "METADATA") or text_of(entry / "PKG-INFO")
    header = text.split("\n\n", 1)[0]
    name = re.search(r"^Name: *(\S+)", header, re.MULTILINE)
    version = re.search(r"^Version: *(\S+)", header, re.MULTILINE)
    if name is None or version is None:
        return None
    return Distribution(
        name=re.sub(r"[-_.]+", "-", name.group(1)).lower(),
        version=version.group(1),
        folder=folder,
        requires=tuple(re.findall(r"^Requires-Dist: *(.*?)\s*$", header, re.MULTILINE)),
        installer=text_of(entry / "INSTALLER").strip(),
        pure="Root-Is-Purelib: true" in text_of(entry / "WHEEL"),
        editable='"editable": true' in text_of(entry / "direct_url.json"),
    )


def text_of(path: Path) -> str:
    """The first 256 KiB of a file as text, with one kind of line ends; empty where it can't be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(_MOST_METADATA_BYTES).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return ""


def _conda_records(prefix: Path) -> dict[str, CondaRecord]:
    records = {}
    folder = prefix / "conda-meta"
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        # NAME-VERSION-BUILD.json; the files themselves are megabytes.
        match = re.fullmatch(r"(.+)-([^-]+)-([^-]+)", path.stem)
        if match is not None:
            records[match.group(1)] = CondaRecord(match.group(2), match.group(3))
    return records


def _torch(origin: Path | None, prefix: Path) -> Torch | None:
    if origin is None:
        return None
    folder = origin if origin.is_dir() else origin.parent
    source = text_of(folder / "version.py")
    version = re.search(r"^__version__ *(?::[^=]*)?= *['\"]([^'\"]+)", source, re.MULTILINE)
    cuda = re.search(r"^cuda *(?::[^=]*)?= *['\"]([\d.]+)", source, re.MULTILINE)
    if version is None:
        return None
    names = ("libc10.so", "libc10_cuda.so", "libtorch_cpu.so", "libtorch_cuda.so", "libtorch_python.so", "libtorch.so")
    folders = [folder / "lib", prefix / "lib"]
    libraries = [next((p / name for p in folders if (p / name).exists()), None) for name in names]
    return Torch(
        folder, version.group(1), cuda.group(1) if cuda else "", tuple(path for path in libraries if path is not None)
    )
