"""Debian's Python in CPython's own layout: what the bridge's python is copied from where no other Python will do.

Debian, and Ubuntu after it, spread an interpreter over /usr: packages go to ``dist-packages``, ``ensurepip`` refuses to
work, the headers of the architecture lie elsewhere, shared libraries are everybody's. Here its files are put below one
folder, in which it is at home like any other Python, with the shared libraries that it needs: those of the system's
own Python (its headers from a Debian package where they are not installed), or all of them from Debian packages.
"""

from __future__ import annotations

import ast
import pprint
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.version import Version

from ssm_forge.base import machine, platforms
from ssm_forge.base.errors import BuildError, MachineError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.folders import give_place
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.bridge import deb_file, debian
from ssm_forge.bridge.debian import Deb
from ssm_forge.bridge.package import hash_text
from ssm_forge.bridge.pylock import suffix
from ssm_forge.package import libraries as elf

# Where the system's own Python is.
SYSTEM = Path("/")

# Raise it when the same files are to be laid out anew.
_LAYOUT = 1

# Debian's release, and the glibc that the newest symbol in its Python and the libraries beside it is of.
_RELEASES = {"bookworm": ("Debian 12", "2.36"), "trixie": ("Debian 13", "2.38")}

# Not taken: what is Debian's own, or of no use in an environment, or needs libraries for nothing that people use.
_LEFT_OUT = shutil.ignore_patterns(
    *("__pycache__", "dist-packages", "test", "tests", "config-*", "EXTERNALLY-MANAGED", "sitecustomize.py"),
    *("_distutils_system_mod.py", "_sysconfigdata*", "tkinter", "idlelib", "turtledemo"),
    *(f"{name}.cpython-*" for name in ("nis", "_dbm", "_gdbm", "_tkinter", "_test*", "_ctypes_test", "_xxtest*")),
    "xx*.cpython-*",
)
# GCC's are packages of their own.
_OF_OTHERS = elf.GLIBC_LIBRARIES | {"libgcc_s.so.1", "libstdc++.so.6"}

# Variables of the build that name folders of the machine, not of the interpreter.
_OF_THE_MACHINE = re.compile(r"TZPATH|DTRACE|INSTALL|MODULE_|WASM_|CONFIGURE_")

_SITE = '''\
def getsitepackages(prefixes=None):
    """The site-packages folders below prefixes, or below those of this interpreter."""
    folder = "lib/python%d.%d/site-packages" % sys.version_info[:2]
    return [os.path.join(p, folder) for p in dict.fromkeys(PREFIXES if prefixes is None else prefixes) if p]
'''

# From 3.11 on the interpreter has Debian's site inside it and reads no site.py. That is mended as early as can be: by a
# .pth file in the folder where that site looks for packages.
_MENDED_SITE = f"""\
import os
import site
import sys
from site import PREFIXES


{_SITE}

site.getsitepackages = getsitepackages
sys.path[:] = [path for path in sys.path if path != os.path.join(os.path.dirname(__file__), "dist-packages")]
for path in getsitepackages():
    site.addsitedir(path)
"""

# Module -> function of Debian's -> what stands there instead.
_EDITS = {
    "site.py": {"getsitepackages": _SITE},
    "sysconfig": {
        "_get_preferred_schemes": """\
def _get_preferred_schemes():
    return {"prefix": "posix_prefix", "home": "posix_home", "user": "posix_user"}


for _scheme in ("deb_system", "posix_local"):
    _INSTALL_SCHEMES.pop(_scheme, None)
""",
        "_get_sysconfigdata_name": """\
def _get_sysconfigdata_name():
    name = f"_sysconfigdata_{sys.abiflags}_{sys.platform}_{getattr(sys.implementation, '_multiarch', '')}"
    return os.environ.get("_PYTHON_SYSCONFIGDATA_NAME", name)
""",
    },
    "ensurepip": {
        "_ensurepip_is_disabled_in_debian_for_system": """\
def _ensurepip_is_disabled_in_debian_for_system():
    pass
"""
    },
    # Asked only where Debian wants to know whether its own layout is meant.
    "distutils/sysconfig.py": {
        "is_virtual_environment": """\
def is_virtual_environment():
    return True
"""
    },
}
# From Python 3.12 on there is none, and Debian has it in a package of its own.
_OPTIONAL = ("distutils/sysconfig.py",)


@dataclass(frozen=True)
class DebianPython:
    """Files of Debian's that make a Python.

    Attributes:
        version: of the interpreter, in full.
        debs: Debian packages that are brought: all there is to it, or the headers of the system's own.
        system: the folder whose ``usr/`` has the rest; None where all of it is brought.
        glibc: the C library it needs, ``2.36``.
        digest: of everything that it is made from.
        platform: what it runs on.
    """

    version: str
    debs: tuple[Deb, ...]
    system: Path | None
    glibc: str
    digest: str
    platform: Platform = field(default=LINUX_64, repr=False)

    @property
    def name(self) -> str:
        """``python3.11``."""
        return f"python{_minor(self.version)}"

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        release = " and ".join(dict.fromkeys(_RELEASES[deb.suite][0] for deb in self.debs))
        if self.system is None:
            return release
        executable = self.system / "usr/bin" / self.name
        return f"{executable}, headers of {release}" if self.debs else str(executable)

    def home(self, workspace: Workspace) -> Path:
        """The prefix that it is laid out in, once :func:`make` has run."""
        return workspace.cache / "tools" / f"{self.name}-{self.digest[:12]}"


def of_system(python: str, workspace: Workspace) -> DebianPython | str:
    """The system's own Python of a minor version, or why it does not do; empty where the system has none.

    It needs the venv module, and headers: installed, or locked for that very version.
    """
    executable = SYSTEM / f"usr/bin/python{python}"
    if not executable.exists():
        return ""
    stdlib = SYSTEM / f"usr/lib/python{python}"
    if not (stdlib / "ensurepip/__init__.py").exists():
        return f"{executable} has no venv module ('apt install python{python}-venv')"
    try:
        edits(stdlib)
        code = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
        command = [str(executable), "-I", "-c", code]
        version = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except ValueError as error:
        return f"{executable} is not laid out as Debian's ({error})"
    except (OSError, subprocess.SubprocessError):
        return f"{executable} does not run"
    debs: tuple[Deb, ...] = ()
    if not (SYSTEM / f"usr/include/python{python}/Python.h").exists():
        debs = tuple(deb for deb in locked(python, workspace) if deb.part == "headers")
        if [deb.upstream for deb in debs] != [version]:
            return f"{executable} has no headers ('apt install python{python}-dev')"
    digest = _digest(debs, sha256_of(executable), SYSTEM)
    return DebianPython(version, debs, SYSTEM, machine.glibc(), digest, platforms.here())


def of_debs(python: str, workspace: Workspace, platform: Platform | None = None) -> DebianPython | str:
    """A Python of a minor version from Debian packages alone, or why there is none.

    Args:
        platform: None for this machine's.
    """
    own = platforms.known_here() or LINUX_64
    platform = platform or own
    debs = locked(python, workspace, platform)
    if not debs:
        names = minors(workspace, platform)
        others = [f"{p} (glibc {_RELEASES[locked(p, workspace, platform)[0].suite][1]})" for p in names]
        here = f", and this machine has glibc {machine.glibc()}" if platform == own else ""
        return f"its packages are locked for {' and '.join(others)}{here}"
    release, needed = _RELEASES[debs[0].suite]
    # A build for another platform is solved with this machine's C library, too.
    if Version(machine.glibc()) < Version(needed):
        return f"that of {release} needs glibc {needed}, and this machine has {machine.glibc()}"
    version = next(deb for deb in debs if deb.package == f"python{python}-minimal").upstream
    return DebianPython(version, debs, None, needed, _digest(debs), platform)


def minors(workspace: Workspace, platform: Platform | None = None) -> tuple[str, ...]:
    """The Python minors that Debian packages are locked for, oldest first; of this machine's platform for None."""
    end = suffix(platform or platforms.known_here() or LINUX_64)
    names = (path.name for path in workspace.bridge_locks.glob("debs.python-*.toml"))
    found = (re.fullmatch(rf"debs\.python-([\d.]+){end}\.toml", name) for name in names)
    return tuple(sorted((match.group(1) for match in found if match), key=Version))


def locked(python: str, workspace: Workspace, platform: Platform | None = None) -> tuple[Deb, ...]:
    """The Debian packages of a Python minor; empty where none are locked; for this machine's platform for None."""
    end = suffix(platform or platforms.known_here() or LINUX_64)
    lock = workspace.bridge_locks / f"debs.python-{python}{end}.toml"
    return debian.read_lock(lock) if lock.exists() else ()


def make(python: DebianPython, workspace: Workspace) -> Path:
    """Lay the files out, unless that was done before; returns the prefix.

    Raises:
        NetworkError, IntegrityError: when a Debian package can't be had.
        BuildError: when a file that belongs to it is missing.
        MachineError: when patchelf is missing.
    """
    home = python.home(workspace)
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{python.name}-") as scratch:
            brought, fresh = Path(scratch, "brought"), Path(scratch, "made")
            for path in debian.fetch_debs(python.debs, workspace).values():
                deb_file.unpack(path, brought)
            _lay_out(python, [brought, *([python.system] if python.system else [])], fresh, home)
            give_place(fresh, home)
    return home


def edits(stdlib: Path) -> dict[str, str]:
    """What Debian changed in a standard library, as CPython has it: file -> text.

    Raises:
        ValueError: when a module is not as Debian's is.
    """
    texts = {}
    for module, functions in _EDITS.items():
        name = module if module.endswith(".py") else f"{module}/__init__.py"
        if module == "sysconfig" and not (stdlib / name).exists():
            name = "sysconfig.py"
        if module in _OPTIONAL and not (stdlib / name).exists():
            continue
        try:
            text = (stdlib / name).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"it has no {name}") from error
        for function, instead in functions.items():
            text = _replaced(text, name, function, instead)
        texts[name] = text
    return texts


def _replaced(text: str, file: str, function: str, instead: str) -> str:
    defined = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    node = next((node for node in defined if node.name == function), None)
    if node is None:
        raise ValueError(f"its {file} has no {function}")
    lines = text.splitlines(keepends=True)
    return "".join((*lines[: node.lineno - 1], instead, *lines[node.end_lineno :]))


def _lay_out(python: DebianPython, roots: Sequence[Path], fresh: Path, home: Path) -> None:
    """Put the files below ``fresh``, for a life in ``home``."""
    name, multiarch = python.name, python.platform.multiarch
    stdlib, library = _first(roots, f"usr/lib/{name}/os.py").parent, fresh / "lib" / name
    shutil.copytree(stdlib, library, ignore=_LEFT_OUT)
    for file, text in edits(stdlib).items():
        (library / file).write_text(text, encoding="utf-8")
    (library / "site-packages").mkdir()
    (library / "dist-packages").mkdir()
    (library / "dist-packages/site.pth").write_text("import _mended_site\n", encoding="utf-8")
    (library / "_mended_site.py").write_text(_MENDED_SITE, encoding="utf-8")
    described = f"usr/lib/{name}/_sysconfigdata_"
    variables = _first(roots, f"{described}_linux_{multiarch}.py", f"{described}_{multiarch}.py")
    (library / f"_sysconfigdata__linux_{multiarch}.py").write_text(
        _build_variables(variables.read_text(encoding="utf-8"), home, name, multiarch), encoding="utf-8"
    )
    include = fresh / "include" / name
    shutil.copytree(_first(roots, f"usr/include/{name}/Python.h").parent, include)
    shutil.copy(_first(roots, f"usr/include/{multiarch}/{name}/pyconfig.h"), include / "pyconfig.h")
    (fresh / "bin").mkdir()
    executable = fresh / "bin" / name
    shutil.copy(_first(roots, f"usr/bin/{name}"), executable)
    executable.chmod(0o755)
    _collect_libraries(
        [executable, *sorted((library / "lib-dynload").glob("*.so"))], roots, library / "shared", multiarch
    )
    for notice in sorted(roots[0].glob("usr/share/doc/*/copyright")):
        target = library / "shared/copyright" / notice.parent.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(notice, target)
    find_libraries(executable)


def find_libraries(executable: Path) -> None:
    """Make an interpreter look for shared libraries in its environment, and then among those brought with it.

    By DT_RPATH, as conda's own python has it, so that it holds for all that is loaded.

    Raises:
        MachineError: when patchelf is missing.
    """
    tool = shutil.which("patchelf")
    if tool is None:
        raise MachineError("patchelf is missing from the tools.", fix="Delete .pixi/tools and run again.")
    folders = ["$ORIGIN/../lib"]
    if (executable.parents[1] / "lib" / executable.name / "shared").is_dir():
        folders.append(f"$ORIGIN/../lib/{executable.name}/shared")
    subprocess.run([tool, "--force-rpath", "--set-rpath", ":".join(folders), executable], check=True)


def _collect_libraries(files: Iterable[Path], roots: Sequence[Path], target: Path, multiarch: str) -> None:
    """Copy the shared libraries that files need, and those that these need."""
    target.mkdir()
    todo = list(files)
    while todo:
        for name in elf.needed(todo.pop()):
            if name not in _OF_OTHERS and not (target / name).exists():
                library = _first(roots, f"usr/lib/{multiarch}/{name}", f"lib/{multiarch}/{name}")
                shutil.copy(library, target / name)
                todo.append(target / name)


def _first(roots: Sequence[Path], *names: str) -> Path:
    """The first file of these names below the first root that has one.

    Raises:
        BuildError: when no root has the file.
    """
    candidates: Iterator[Path] = (root / name for root in roots for name in names if (root / name).exists())
    path = next(candidates, None)
    if path is None:
        raise BuildError(
            f"Debian's Python has no {names[0]} (looked below {', '.join(map(str, roots))}).",
            fix="Name another Python with --python, e.g. one that 'uv python install 3.12' got.",
        )
    return path


def _build_variables(text: str, home: Path, name: str, multiarch: str) -> str:
    """What sysconfig answers: folders of the prefix, the compiler by its usual name, no shared libpython."""
    (node,) = (n for n in ast.parse(text).body if isinstance(n, ast.Assign))
    variables: dict[str, object] = ast.literal_eval(node.value)
    for key, value in variables.items():
        if isinstance(value, str) and not _OF_THE_MACHINE.match(key):
            value = re.sub(rf"\b{multiarch}-(gcc-)?(?=gcc\b|g\+\+|ar\b)", "", value)
            value = re.sub(rf"(?<![\w./])/usr/lib/{multiarch}\b", f"{home}/lib", value)
            variables[key] = re.sub(r"(?<![\w./])/usr(?![\w-])", str(home), value)
    variables |= {
        "WHEEL_PKG_DIR": str(home / "lib" / name / "ensurepip/_bundled"),
        "Py_ENABLE_SHARED": 0,
        "LDLIBRARY": variables["LIBRARY"],
    }
    return f"build_time_vars = {pprint.pformat(variables)}\n"


def _digest(debs: Sequence[Deb], *others: object) -> str:
    return hash_text(_LAYOUT, _MENDED_SITE, sorted(_EDITS.items()), *(deb.sha256 for deb in debs), *others)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def is_bundled(wheel: str, python: str) -> bool:
    """Whether ``ensurepip`` of a Python minor installs a wheel of that name into new virtual environments."""
    return wheel == "pip" or (wheel == "setuptools" and Version(python) < Version("3.12"))
