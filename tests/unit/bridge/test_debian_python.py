"""Debian's Python: what of it does, and that it is at home below any folder once it is laid out."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from front_door import assert_one_line_error, run
from ssm_forge.base import machine
from ssm_forge.base.errors import BuildError, MachineError
from ssm_forge.base.fetch import fetch_all
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.bridge import deb_file, debian, debian_python, pylock
from ssm_forge.bridge import interpreter as interpreters
from ssm_forge.bridge.debian_python import DebianPython
from ssm_forge.build import origin
from ssm_forge.manifest import variants
from ssm_forge.package import libraries as elf

_ROOT = Path(__file__).parents[3]
_MULTIARCH = "x86_64-linux-gnu"


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """This project's locks, and a cache of its own."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "recipes").symlink_to(_ROOT / "recipes")
    return Workspace(root=root, cache=tmp_path / "cache")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system that has nothing but Debian's Python 3.11.2 with its venv module, as far as is looked at."""
    root = tmp_path / "system"
    files = {
        "usr/lib/python3.11/os.py": "",
        "usr/lib/python3.11/site.py": "def getsitepackages(prefixes=None):\n    return ['dist-packages']\n",
        "usr/lib/python3.11/sysconfig.py": (
            "def _get_preferred_schemes():\n    return 'deb_system'\n\n"
            "def _get_sysconfigdata_name():\n    return 'debians'\n\nlast = True\n"
        ),
        "usr/lib/python3.11/ensurepip/__init__.py": (
            "def _ensurepip_is_disabled_in_debian_for_system():\n    raise SystemExit(1)\n"
        ),
        "usr/bin/python3.11": "#!/bin/sh\necho 3.11.2\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "usr/bin/python3.11").chmod(0o755)
    monkeypatch.setattr(debian_python, "SYSTEM", root)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "empty"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "empty"))
    return root


def say(path: Path, version: str) -> None:
    path.write_text(f"#!/bin/sh\necho {version}\n")


def test_the_systems_own_gets_headers_of_the_same_version(system: Path, place: Workspace) -> None:
    found = debian_python.of_system("3.11", place)
    assert isinstance(found, DebianPython)
    assert [deb.package for deb in found.debs] == ["libpython3.11-dev"]
    assert found.origin == f"{system}/usr/bin/python3.11, headers of Debian 12"
    assert found.system == system
    say(system / "usr/bin/python3.11", "3.11.9")
    assert debian_python.of_system("3.11", place) == (
        f"{system}/usr/bin/python3.11 has no headers ('apt install python3.11-dev')"
    )


def test_headers_that_are_installed_are_taken(system: Path, place: Workspace) -> None:
    (system / "usr/include/python3.11").mkdir(parents=True)
    (system / "usr/include/python3.11/Python.h").touch()
    say(system / "usr/bin/python3.11", "3.11.9")
    found = debian_python.of_system("3.11", place)
    assert isinstance(found, DebianPython)
    assert (found.version, found.debs, found.origin) == ("3.11.9", (), f"{system}/usr/bin/python3.11")


def test_another_interpreter_of_the_system_is_laid_out_anew(system: Path, place: Workspace) -> None:
    before = debian_python.of_system("3.11", place)
    (system / "usr/bin/python3.11").write_text("#!/bin/sh\n# updated\necho 3.11.2\n")
    after = debian_python.of_system("3.11", place)
    assert isinstance(before, DebianPython)
    assert isinstance(after, DebianPython)
    assert before.home(place) != after.home(place)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("usr/bin/python3.11", ""),
        ("usr/lib/python3.11/ensurepip/__init__.py", "has no venv module ('apt install python3.11-venv')"),
        ("usr/lib/python3.11/sysconfig.py", "is not laid out as Debian's (it has no sysconfig.py)"),
    ],
)
def test_a_system_python_that_lacks_something_is_named(
    system: Path, place: Workspace, missing: str, reason: str
) -> None:
    (system / missing).unlink()
    found = debian_python.of_system("3.11", place)
    assert found == (reason and f"{system}/usr/bin/python3.11 {reason}")


def test_a_system_python_of_another_distribution_is_not_touched(system: Path, place: Workspace) -> None:
    (system / "usr/lib/python3.11/site.py").write_text("import os\n")
    assert debian_python.of_system("3.11", place) == (
        f"{system}/usr/bin/python3.11 is not laid out as Debian's (its site.py has no getsitepackages)"
    )


def test_only_debians_functions_are_replaced(system: Path) -> None:
    text = debian_python.edits(system / "usr/lib/python3.11")["sysconfig.py"]
    assert "'deb_system'" not in text
    assert "'debians'" not in text
    assert text.endswith("\nlast = True\n")


def test_an_older_c_library_is_refused_with_both_versions(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "glibc", lambda: "2.31")
    assert debian_python.of_debs("3.11", place) == "that of Debian 12 needs glibc 2.36, and this machine has 2.31"
    assert interpreters.brought(place) == []
    monkeypatch.setattr(machine, "glibc", lambda: "2.36")
    assert interpreters.brought(place) == ["3.11"]
    monkeypatch.setattr(machine, "glibc", lambda: "2.100")
    assert interpreters.brought(place) == ["3.11", "3.13"]


def test_a_fresh_machine_gets_the_python_of_its_system(system: Path, place: Workspace) -> None:
    cu130 = variants.load(place.variants).get("cu130", "bridge")
    assert origin.default_python(cu130, place) == "3.11"
    chosen = interpreters.choose("3.11", place)
    assert (chosen.version, chosen.made_from and chosen.made_from.system) == ("3.11.2", system)
    assert chosen.executable == chosen.prefix / "bin/python3.11"
    assert not place.cache.exists()


def test_a_machine_without_any_gets_debians(system: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(system)
    monkeypatch.setattr(machine, "glibc", lambda: "2.41")
    matrix = variants.load(place.variants)
    assert origin.default_python(matrix.get("cu130", "bridge"), place) == "3.13"
    assert origin.default_python(matrix.get("cu124", "bridge"), place) == "3.11"
    chosen = interpreters.choose("3.13", place)
    assert chosen.origin == "Debian 13"
    assert {deb.suite for deb in chosen.debs} == {"trixie"}


def test_what_can_be_had_instead_is_named(system: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "glibc", lambda: "2.36")
    with pytest.raises(MachineError) as error:
        interpreters.choose("3.12", place)
    assert error.value.what == (
        "no Python 3.12 with headers was found on PATH, under pyenv or under uv, and Debian's does not do: its "
        "packages are locked for 3.11 (glibc 2.36) and 3.13 (glibc 2.38), and this machine has glibc 2.36."
    )
    assert error.value.fix == (
        "Install one without root, e.g. 'uv python install 3.12' or 'pyenv install 3.12', or choose another with "
        "--python (3.11 can be had here)."
    )
    with pytest.raises(MachineError, match=r"that of Debian 13 needs glibc 2\.38, and this machine has 2\.36"):
        interpreters.choose("3.13", place)


def test_the_newest_releases_python_is_said_to_need_a_newer_c_library_at_once(tmp_path: Path) -> None:
    libc = tuple(int(part) for part in machine.glibc().split("."))
    if libc >= (2, 38):
        pytest.skip(f"glibc {machine.glibc()} here runs each of Debian's Pythons")
    own = {"PYENV_ROOT": str(tmp_path), "UV_PYTHON_INSTALL_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    own |= {"SSM_FORGE_CACHE_DIR": str(tmp_path / "cache")}
    done = run("install-mamba", "--source", "bridge", "--python", "3.13", "--dry-run", timeout=300, **own)
    assert_one_line_error(done, 3, "needs glibc 2.38", "uv python install 3.13")
    assert not (tmp_path / "cache").exists()


def test_build_variables_name_the_prefix_and_the_usual_compiler() -> None:
    text = debian_python._build_variables(
        "# generated\nbuild_time_vars = {'prefix': '/usr', 'LIBDIR': '/usr/lib/x86_64-linux-gnu', 'LIBRARY': 'l.a',\n"
        " 'CC': 'x86_64-linux-gnu-gcc', 'LDCXXSHARED': 'x86_64-linux-gnu-g++ -shared',\n"
        " 'AR': 'x86_64-linux-gnu-gcc-ar',\n"
        " 'TZPATH': '/usr/share/zoneinfo', 'INSTALL': '/usr/bin/install -c', 'SOABI': 'cpython-311-x86_64-linux-gnu',\n"
        " 'LDLIBRARY': 'l.so', 'Py_ENABLE_SHARED': 1, 'SIZE': 8, 'A': '--prefix=/usr', 'B': './usr /usr-local'}\n",
        Path("/home/me/p"),
        "python3.11",
        "x86_64-linux-gnu",
    )
    space: dict[str, dict[str, object]] = {}
    exec(text, space)
    assert space["build_time_vars"] == {
        **{"prefix": "/home/me/p", "LIBDIR": "/home/me/p/lib", "LIBRARY": "l.a", "CC": "gcc", "AR": "ar"},
        **{"LDCXXSHARED": "g++ -shared", "TZPATH": "/usr/share/zoneinfo", "INSTALL": "/usr/bin/install -c"},
        **{"SOABI": "cpython-311-x86_64-linux-gnu", "LDLIBRARY": "l.a", "Py_ENABLE_SHARED": 0, "SIZE": 8},
        **{"A": "--prefix=/home/me/p", "B": "./usr /usr-local"},
        "WHEEL_PKG_DIR": "/home/me/p/lib/python3.11/ensurepip/_bundled",
    }


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_every_row_that_has_that_python_has_wheels_for_new_virtual_environments(python: str) -> None:
    place = workspace()
    for variant in variants.load(place.variants).variants:
        if variant.source == "bridge" and python in variant.pythons:
            wheels = pylock.read(pylock.lock_path(place, variant.name, f"py{python.replace('.', '')}"), python)
            bundled = {wheel.name for wheel in wheels if debian_python.is_bundled(wheel.name, python)}
            assert bundled == ({"pip", "setuptools"} if python == "3.11" else {"pip"}), variant.name


needs_patchelf = pytest.mark.skipif(
    shutil.which("patchelf") is None, reason="patchelf is not on PATH (the tools environment has it)"
)


@pytest.mark.slow
@needs_patchelf
@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_the_locked_packages_have_all_that_it_needs_and_need_no_newer_c_library(
    python: str, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "glibc", lambda: "2.99")
    found = debian_python.of_debs(python, replace(place, cache=workspace().cache))
    assert isinstance(found, DebianPython)
    place.cache.mkdir()
    (place.cache / "downloads").symlink_to(workspace().downloads)
    home = debian_python.make(found, place)
    assert debian_python.make(found, place) == home
    files = [home / f"bin/{found.name}", *home.rglob("*.so*")]
    newest = max((elf.read(file).glibc for file in files), key=lambda text: [int(n) for n in text.split(".")])
    assert newest == found.glibc
    assert (home / f"lib/{found.name}/shared/copyright/zlib1g").exists()


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python package made from Debian's packages alone, staged and then moved."""
    place = workspace()
    found = debian_python.of_debs("3.11", place)
    if isinstance(found, str):
        pytest.skip(f"Debian's Python does not run here: {found}")
    folder = tmp_path_factory.mktemp("debian")
    own = Workspace(root=place.root, cache=folder / "cache")
    own.cache.mkdir()
    place.downloads.mkdir(parents=True, exist_ok=True)
    own.downloads.symlink_to(place.downloads)
    chosen = interpreters._of_debian(found, own)
    interpreters.prepare(chosen, own)
    wheels = pylock.read(pylock.lock_path(place, "cu130", "py311"), "3.11")
    fetch_all([w.artifact for w in wheels if debian_python.is_bundled(w.name, "3.11")], own)
    stage = folder / "stage"
    stage.mkdir()
    interpreters.python_packages(chosen, wheels, own)[1].stage(stage)
    shutil.rmtree(own.cache)
    return stage.rename(folder / "moved")


def ask(prefix: Path, *arguments: str) -> str:
    command = [prefix / "bin/python", *arguments]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(prefix.parent), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@needs_patchelf
def test_it_is_at_home_where_it_is_with_libraries_of_its_own(moved: Path) -> None:
    modules = "ssl, sqlite3, ctypes, zlib, bz2, lzma, readline, hashlib, curses, uuid, decimal, crypt, pyexpat"
    script = (
        f"import json, os, site, sys, sysconfig, {modules}; "
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}; "
        "print(json.dumps([sys.prefix, sys.path, sysconfig.get_paths(), site.getsitepackages(), sorted(maps), "
        "sysconfig.get_config_var('INCLUDEPY'), sysconfig.get_scheme_names()]))"
    )
    prefix, search, paths, sites, libraries, include, schemes = json.loads(ask(moved, "-c", script))
    assert prefix == str(moved)
    assert sites == [paths["purelib"]] == [f"{moved}/lib/python3.11/site-packages"]
    assert sites[0] in search
    assert not [path for path in search if "dist-packages" in path]
    assert all(path.startswith(str(moved)) for path in [*paths.values(), include, *search[1:]])
    assert "deb_system" not in schemes
    strange = {Path(path).name for path in libraries if not path.startswith(str(moved))}
    assert strange <= {*elf.GLIBC_LIBRARIES}
    assert "SIZEOF_LONG 8" in Path(include, "pyconfig.h").read_text()
    assert Path(include, "Python.h").exists()


@pytest.mark.slow
@needs_patchelf
def test_links_look_for_libraries_in_the_environment_and_compilers_have_condas_names(moved: Path) -> None:
    script = (
        "import json, sysconfig, _sysconfigdata_x86_64_conda_linux_gnu as conda; own = conda.build_time_vars;"
        "print(json.dumps([sysconfig.get_config_var('LDSHARED'), own['LDSHARED'], own['CC'], own['CXX']]))"
    )
    default, conda, cc, cxx = json.loads(ask(moved, "-c", script))
    assert default.startswith("gcc -shared")
    assert default.count(f"-Wl,-rpath,{moved}/lib ") == 1
    assert conda.startswith("x86_64-conda-linux-gnu-gcc -shared")
    assert (cc, cxx) == ("x86_64-conda-linux-gnu-gcc", "x86_64-conda-linux-gnu-g++")


@pytest.mark.slow
@needs_patchelf
def test_pip_and_virtual_environments_work_and_nobody_else_manages_it(moved: Path, tmp_path: Path) -> None:
    ask(moved, "-m", "venv", str(tmp_path / "venv"))
    listed = ask(tmp_path / "venv", "-m", "pip", "list", "--format", "json")
    assert {package["name"] for package in json.loads(listed)} == {"pip", "setuptools"}
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "setuptools.build_meta"\n')
    (project / "setup.py").write_text("from setuptools import setup\nsetup(name='one', py_modules=['one'])\n")
    (project / "one.py").write_text("")
    target = tmp_path / "copy"
    shutil.copytree(moved, target, symlinks=True)
    ask(target, "-m", "ensurepip")
    ask(target, "-m", "pip", "install", "--no-index", "--no-build-isolation", str(project))
    assert ask(target, "-c", "import one; print(one.__file__)") == f"{target}/lib/python3.11/site-packages/one.py"


@pytest.mark.slow
@needs_patchelf
def test_the_systems_files_give_the_same_as_debians_packages(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debs = debian_python.locked("3.11", place)
    root = tmp_path / "system"
    for path in debian.fetch_debs(debs, workspace()).values():
        deb_file.unpack(path, root)
    place.cache.mkdir()
    (place.cache / "downloads").symlink_to(workspace().downloads)
    shutil.rmtree(root / "usr/include")
    monkeypatch.setattr(debian_python, "SYSTEM", root)
    system, whole = debian_python.of_system("3.11", place), debian_python.of_debs("3.11", place)
    if isinstance(whole, str):
        pytest.skip(f"Debian's Python does not run here: {whole}")
    assert isinstance(system, DebianPython)
    assert [deb.package for deb in system.debs] == ["libpython3.11-dev"]
    homes = [debian_python.make(python, place) for python in (system, whole)]
    found = [
        {str(path.relative_to(home)) for path in home.rglob("*") if "/copyright" not in str(path)} for home in homes
    ]
    assert found[0] == found[1]
    differ = filecmp.cmpfiles(*homes, sorted(n for n in found[0] if (homes[0] / n).is_file()), shallow=False)[1]
    assert differ == [f"lib/python3.11/_sysconfigdata__linux_{_MULTIARCH}.py"]


@pytest.mark.slow
def test_a_library_that_is_missing_is_named(place: Workspace) -> None:
    debs = tuple(deb for deb in debian_python.locked("3.11", place) if deb.package != "libffi8")
    place.cache.mkdir()
    (place.cache / "downloads").symlink_to(workspace().downloads)
    broken = DebianPython("3.11.2", debs, None, "2.36", "0" * 64)
    with pytest.raises(BuildError, match=f"Debian's Python has no usr/lib/{_MULTIARCH}/libffi.so.8"):
        debian_python.make(broken, place)
    assert os.listdir(place.cache / "tools") == []  # noqa: PTH208 - names
