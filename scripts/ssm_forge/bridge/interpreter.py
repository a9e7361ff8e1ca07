"""The bridge's python: a relocated copy of an interpreter of this machine, or of Debian's, headers included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ssm_forge.base import platforms
from ssm_forge.base.errors import MachineError
from ssm_forge.base.fetch import checked
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import Platform
from ssm_forge.bridge import debian_python
from ssm_forge.bridge.debian import Deb
from ssm_forge.bridge.debian_python import DebianPython
from ssm_forge.bridge.package import BridgePackage, hash_text, link
from ssm_forge.bridge.pylock import LockedWheel
from ssm_forge.bridge.wheels import compile_bytecode

_PROBE = """
import json, os, sys, sysconfig
paths = sysconfig.get_paths("posix_prefix")
print(json.dumps({
    "version": list(sys.version_info[:3]),
    "implementation": sys.implementation.name,
    "prefix": os.path.realpath(sys.base_prefix),
    "executable": os.path.realpath(os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2])),
    "has_headers": os.path.exists(os.path.join(paths["include"].replace(sys.prefix, sys.base_prefix), "Python.h")),
    "distribution_layout": "deb_system" in sysconfig.get_scheme_names() or sys.base_prefix == "/usr",
    "conda": os.path.isdir(os.path.join(sys.base_prefix, "conda-meta")),
    "debug": hasattr(sys, "gettotalrefcount"),
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
}))
"""

_SKIP = shutil.ignore_patterns(
    "site-packages", "test", "tests", "idlelib", "turtledemo", "__pycache__", "*.a", "EXTERNALLY-MANAGED", "config-*"
)


@dataclass(frozen=True)
class Interpreter:
    """A Python that can be copied.

    Attributes:
        executable: the real file.
        prefix: its installation prefix.
        version: full version, ``3.12.1``.
        made_from: what of Debian's the prefix is made from, by :func:`prepare`; None where it is on the machine.
        beside: a Python of the same minor that runs here, where this one does not: it is for another platform.
    """

    executable: Path
    prefix: Path
    version: str
    made_from: DebianPython | None = None
    beside: Path | None = field(default=None, repr=False)

    @property
    def platform(self) -> Platform:
        """What it is for."""
        return self.made_from.platform if self.made_from else platforms.here()

    @property
    def runs(self) -> Path:
        """A Python of this minor that runs on this machine, and compiles bytecode for both."""
        return self.beside or self.executable

    @property
    def minor(self) -> str:
        """``3.12`` of ``3.12.4``."""
        return ".".join(self.version.split(".")[:2])

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        return self.made_from.origin if self.made_from else str(self.executable)

    @property
    def debs(self) -> tuple[Deb, ...]:
        """Debian packages to download for it."""
        return self.made_from.debs if self.made_from else ()

    @property
    def identity(self) -> str:
        """A digest of what it is, which is known before it is made."""
        if self.made_from:
            return self.made_from.digest
        return hash_text(self.prefix, self.version, self.executable.stat().st_size)


def choose(python: str, workspace: Workspace) -> Interpreter:
    """The interpreter of a minor version that the bridge is made with.

    One that can be copied as it is, else one that is made from the system's own, else from Debian packages.

    Raises:
        MachineError: when there is none, saying what was found and why it does not do.
    """
    try:
        return find(python)
    except MachineError as error:
        system = debian_python.of_system(python, workspace)
        of_debian = debian_python.of_debs(python, workspace) if isinstance(system, str) else system
        if isinstance(of_debian, DebianPython):
            return _of_debian(of_debian, workspace)
        why = "; ".join(reason for reason in (system, of_debian) if isinstance(reason, str) and reason)
        others = [*available(workspace), *(p for p in brought(workspace) if p not in available(workspace))]
        raise MachineError(
            f"{error.what.removesuffix('.')}, and Debian's does not do: {why}.",
            fix=f"Install one without root, e.g. 'uv python install {python}' or 'pyenv install {python}'"
            + (f", or choose another with --python ({', '.join(others)} can be had here)." if others else "."),
        ) from error


def for_another(python: str, platform: Platform, workspace: Workspace) -> Interpreter:
    """The interpreter of a minor version for a platform that is not this machine's: Debian's.

    Raises:
        MachineError: where none is locked, or this machine has none of that minor to compile its bytecode with.
    """
    of_debian = debian_python.of_debs(python, workspace, platform)
    if not isinstance(of_debian, DebianPython):
        others = brought(workspace, platform)
        raise MachineError(
            f"no Python {python} for {platform.subdir} can be had here: {of_debian}.",
            fix=f"Use --python {' or --python '.join(reversed(others))}, or build on such a machine.",
        )
    # Its own version need not be the same: a minor has one form of bytecode.
    return replace(_of_debian(of_debian, workspace), beside=choose(python, workspace).executable)


def _of_debian(python: DebianPython, workspace: Workspace) -> Interpreter:
    home = python.home(workspace)
    return Interpreter(home / "bin" / python.name, home, python.version, python)


def prepare(interpreter: Interpreter, workspace: Workspace) -> None:
    """Make the prefix, where it is one that is made.

    Raises:
        NetworkError, IntegrityError: when a Debian package can't be had.
        BuildError: when something of it is missing.
    """
    if interpreter.made_from:
        debian_python.make(interpreter.made_from, workspace)


def find(python: str) -> Interpreter:
    """The first interpreter of a minor version that can be copied as it is.

    Looked for on PATH, under pyenv and under uv.

    Raises:
        MachineError: when there is none, saying what was found and why it does not do.
    """
    rejected: list[str] = []
    seen: set[Path] = set()
    for candidate in _candidates(python):
        real = candidate.resolve()
        if real in seen:
            continue
        seen.add(real)
        outcome = _probe(candidate, python)
        if isinstance(outcome, Interpreter):
            return outcome
        if outcome:
            rejected.append(f"{candidate}: {outcome}")
    why = f" (found, but unusable: {'; '.join(rejected)})" if rejected else ""
    raise MachineError(
        f"no Python {python} with headers was found on PATH, under pyenv or under uv{why}.",
        fix=f"Install one without root, e.g. 'uv python install {python}' or 'pyenv install {python}'.",
    )


def available(workspace: Workspace) -> list[str]:
    """Python minors from 3.10 on that this machine has; headers may have to be brought."""
    minors = []
    for minor in range(10, 16):
        python = f"3.{minor}"
        if any(isinstance(_probe(c, python), Interpreter) for c in _candidates(python)) or isinstance(
            debian_python.of_system(python, workspace), DebianPython
        ):
            minors.append(python)
    return minors


def brought(workspace: Workspace, platform: Platform | None = None) -> list[str]:
    """Python minors that can be brought whole, from Debian packages that run here, or on a platform."""
    locked = debian_python.minors(workspace, platform)
    return [python for python in locked if isinstance(debian_python.of_debs(python, workspace, platform), DebianPython)]


def _candidates(python: str) -> Iterator[Path]:
    name = f"python{python}"
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        # Version managers' shims are scripts that may refuse; the real files come from the folders below.
        if folder and "shims" not in Path(folder).parts and (Path(folder) / name).exists():
            yield Path(folder) / name
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python"))
    yield from sorted(pyenv.glob(f"versions/{python}.*/bin/{name}"), key=_version_key, reverse=True)
    yield from sorted(uv.glob(f"cpython-{python}.*/bin/{name}"), key=_version_key, reverse=True)


def _version_key(path: Path) -> list[int]:
    digits = "".join(c if c.isdigit() else " " for c in path.parts[-3])
    return [int(part) for part in digits.split()]


def _probe(candidate: Path, python: str) -> Interpreter | str:
    """The interpreter, or why it does not do; empty where it is simply another version."""
    try:
        answer = subprocess.run(
            [candidate, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=20, check=True
        ).stdout
        facts = json.loads(answer)
    except (OSError, subprocess.SubprocessError, ValueError):
        return "does not run"
    version = ".".join(map(str, facts["version"]))
    if not version.startswith(f"{python}.") or facts["implementation"] != "cpython":
        return ""
    if not facts["has_headers"]:
        return "has no headers (Python.h)"
    if facts["distribution_layout"]:
        return "is the system's own, which can't be copied as it is"
    if facts["conda"]:
        return "is conda's, which needs the libraries of its environment"
    if facts["debug"] or facts["free_threaded"]:
        return "is a debug or free-threaded build"
    return Interpreter(Path(facts["executable"]), Path(facts["prefix"]), version)


def python_packages(
    interpreter: Interpreter, wheels: Sequence[LockedWheel], workspace: Workspace
) -> list[BridgePackage]:
    """``python`` and ``python_abi`` made from ``interpreter``.

    Args:
        wheels: of the variant; Debian's ``ensurepip`` has none of its own.
    """
    tag = interpreter.minor.replace(".", "")
    made_from = interpreter.made_from
    origin = made_from.origin if made_from and not made_from.system else ""
    bundled = [w for w in wheels if debian_python.is_bundled(w.name, interpreter.minor)] if made_from else []
    abi = BridgePackage(
        name="python_abi",
        version=interpreter.minor,
        inputs=(tag,),
        stage=lambda folder: None,
        constrains=(f"python {interpreter.minor}.*",),
        build_suffix=f"1_cp{tag}",
        summary=f"Metapackage to select CPython {interpreter.minor}",
        platform=interpreter.platform,
    )
    python = BridgePackage(
        name="python",
        version=interpreter.version,
        inputs=(interpreter.identity, _FOLLOW_PREFIX, _CONDA_COMPILERS, *(w.artifact.sha256 for w in bundled)),
        stage=lambda folder: _stage(interpreter, bundled, folder, workspace),
        depends=(
            f"python_abi {interpreter.minor}.* *_cp{tag}",
            *([f"__glibc >={made_from.glibc}"] if made_from else []),
        ),
        build_suffix="0_cpython" if int(tag) < 313 else f"0_cp{tag}",
        license="PSF-2.0",
        summary=f"CPython of {origin}" if origin else "CPython, copied from this machine",
        run_exports={"noarch": ["python"], "weak": [f"python_abi {interpreter.minor}.* *_cp{tag}"]},
        size=100_000_000,
        platform=interpreter.platform,
    )
    return [abi, python]


def _stage(interpreter: Interpreter, bundled: Sequence[LockedWheel], folder: Path, workspace: Workspace) -> None:
    name = f"python{interpreter.minor}"
    library = folder / "lib"
    shutil.copytree(interpreter.prefix / "lib" / name, library / name, ignore=_SKIP, symlinks=True)
    (library / name / "site-packages").mkdir()
    (library / name / "site-packages" / "README.txt").write_text("Packages of this environment.\n")
    shutil.copytree(interpreter.prefix / "include" / name, folder / "include" / name, symlinks=True)
    (folder / "bin").mkdir()
    executable = folder / "bin" / name
    shutil.copy2(interpreter.executable, executable)
    executable.chmod(0o755)
    for shared in (interpreter.prefix / "lib").glob(f"libpython{interpreter.minor}*.so*"):
        shutil.copy2(shared, library / shared.name, follow_symlinks=False)
    debian_python.find_libraries(executable)
    for wheel in bundled:
        target = library / name / "ensurepip/_bundled" / wheel.artifact.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(checked(wheel.artifact, workspace), target)
    for alias in ("python", "python3"):
        link(name, folder / "bin" / alias)
    _describe_as_conda(interpreter, library / name)
    compile_bytecode(interpreter.runs, folder, library / name)


# What sysconfig answers follows the prefix that the interpreter runs from; links get an rpath to its libraries.
_FOLLOW_PREFIX = """
import sys as _sys
build_time_vars = {
    key: value.replace('@PREFIX@', _sys.base_prefix) if isinstance(value, str) else value
    for key, value in build_time_vars.items()
}
for _key in ('LDSHARED', 'BLDSHARED', 'LDCXXSHARED', 'LDFLAGS'):
    if _key in build_time_vars:
        build_time_vars[_key] += ' -Wl,-rpath,{0}/lib -Wl,-rpath-link,{0}/lib -L{0}/lib'.format(_sys.base_prefix)
"""

_CONDA_COMPILERS = """\
import importlib as _importlib

build_time_vars = dict(_importlib.import_module('{default}').build_time_vars)
for _key, _value in build_time_vars.items():
    for _name in ('gcc', 'g++', 'cc', 'c++'):
        if isinstance(_value, str) and (_value == _name or _value.startswith(_name + ' ')):
            build_time_vars[_key] = '{triple}-' + _value
"""


def _describe_as_conda(interpreter: Interpreter, stdlib: Path) -> None:
    """Make sysconfig's build variables what conda's own Python has, under both of its names."""
    triple = interpreter.platform.triple
    for file in sorted(stdlib.glob("_sysconfigdata*.py")):
        text = file.read_text(encoding="utf-8").replace(str(interpreter.prefix), "@PREFIX@")
        file.write_text(text + _FOLLOW_PREFIX, encoding="utf-8")
        conda = _CONDA_COMPILERS.format(default=file.stem, triple=triple)
        (stdlib / f"_sysconfigdata_{triple.replace('-', '_')}.py").write_text(conda, encoding="utf-8")
