"""Which interpreters of a machine do, what is said of those that don't, and a copy that runs elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from front_door import assert_one_line_error, run
from ssm_forge.base.errors import MachineError
from ssm_forge.base.paths import workspace
from ssm_forge.bridge import debian_python
from ssm_forge.bridge import interpreter as interpreters
from ssm_forge.bridge.interpreter import Interpreter

GOOD = {
    "version": [3, 12, 1],
    "implementation": "cpython",
    "has_headers": True,
    "distribution_layout": False,
    "conda": False,
    "debug": False,
    "free_threaded": False,
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose PATH, pyenv and uv folders are empty, and whose system has no Python."""
    monkeypatch.setattr(debian_python, "SYSTEM", tmp_path / "system")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))
    return tmp_path


def fake(path: Path, **facts: object) -> Path:
    """An executable that answers the probe."""
    answer = {**GOOD, "prefix": str(path.parents[1]), "executable": str(path), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    path.chmod(0o755)
    return path


def test_nothing_at_all(machine: Path) -> None:
    with pytest.raises(MachineError, match=r"no Python 3\.12 with headers was found") as error:
        interpreters.find("3.12")
    assert "found, but unusable" not in error.value.what
    assert "uv python install 3.12" in error.value.fix
    assert interpreters.available(workspace()) == []


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"has_headers": False}, "has no headers (Python.h)"),
        ({"distribution_layout": True}, "is the system's own, which can't be copied as it is"),
        ({"conda": True}, "is conda's, which needs the libraries of its environment"),
        ({"debug": True}, "is a debug or free-threaded build"),
        ({"free_threaded": True}, "is a debug or free-threaded build"),
    ],
)
def test_what_was_found_and_why_it_does_not_do(machine: Path, facts: dict[str, object], reason: str) -> None:
    path = fake(machine / "bin/python3.12", **facts)
    with pytest.raises(MachineError) as error:
        interpreters.find("3.12")
    assert f"(found, but unusable: {path}: {reason})" in error.value.what


def test_one_that_does_not_run_is_named(machine: Path) -> None:
    path = fake(machine / "bin/python3.12")
    path.write_text("#!/nowhere/sh\n")
    with pytest.raises(MachineError, match="does not run"):
        interpreters.find("3.12")


def test_another_minor_is_offered(machine: Path) -> None:
    fake(machine / "bin/python3.11", version=[3, 11, 7])
    with pytest.raises(MachineError) as error:
        interpreters.choose("3.12", workspace())
    assert "or choose another with --python (3.11" in error.value.fix
    assert interpreters.available(workspace()) == ["3.11"]


def test_other_implementations_are_not_taken(machine: Path) -> None:
    fake(machine / "bin/python3.12", implementation="pypy")
    with pytest.raises(MachineError):
        interpreters.find("3.12")


def test_an_unusable_one_on_path_does_not_hide_pyenvs(machine: Path) -> None:
    fake(machine / "bin/python3.12", has_headers=False)
    fake(machine / "pyenv/shims/python3.12")
    good = fake(machine / "pyenv/versions/3.12.1/bin/python3.12")
    found = interpreters.find("3.12")
    assert found == Interpreter(good, good.parents[1], "3.12.1")
    assert found.minor == "3.12"


def test_the_newest_patch_release_is_taken(machine: Path) -> None:
    for version in ("3.12.9", "3.12.10", "3.12.1"):
        numbers = [int(part) for part in version.split(".")]
        fake(machine / f"uv/cpython-{version}-linux-x86_64-gnu/bin/python3.12", version=numbers)
    assert interpreters.find("3.12").version == "3.12.10"


def test_shims_of_version_managers_are_not_run(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(machine / "pyenv/shims/python3.12")
    monkeypatch.setenv("PATH", str(machine / "pyenv/shims"))
    with pytest.raises(MachineError):
        interpreters.find("3.12")


def test_the_command_line_says_so_in_one_line(tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("bash", "dirname", "env", "mkdir", "flock", "cat"):
        if (found := shutil.which(tool)) is not None:
            (bare / tool).symlink_to(found)
    # The tools need a Python, of another minor; pyenv and uv have nothing here, nor has the system or Debian.
    wanted = next(
        p for p in ("3.12", "3.10") if p != ".".join(map(str, sys.version_info[:2])) and not _of_the_system(p)
    )
    done = run(
        "install-mamba",
        "--source",
        "bridge",
        "--python",
        wanted,
        PATH=str(bare),
        SSM_FORGE_PYTHON=os.path.realpath(sys.executable),
        PYENV_ROOT=str(tmp_path),
        UV_PYTHON_INSTALL_DIR=str(tmp_path),
        SSM_FORGE_CACHE_DIR=str(tmp_path / "cache"),
        timeout=300,
    )
    assert_one_line_error(done, 3, f"no Python {wanted} with headers", f"uv python install {wanted}")
    assert not (tmp_path / "cache").exists()


def _of_the_system(python: str) -> bool:
    return Path(f"/usr/bin/python{python}").exists()


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python package of a real interpreter, staged and then moved."""
    usable = []
    for minor in ("3.12", "3.11", "3.10", "3.13"):
        with contextlib.suppress(MachineError):
            usable.append(interpreters.find(minor))
    if not usable:
        pytest.skip("no interpreter with headers on this machine that could be copied")
    if shutil.which("patchelf") is None:
        pytest.skip("patchelf is not on PATH (the tools environment has it)")
    python = interpreters.python_packages(usable[0], (), workspace())[1]
    stage = tmp_path_factory.mktemp("copy") / "stage"
    stage.mkdir()
    python.stage(stage)
    return stage.rename(stage.with_name("moved"))


def ask(prefix: Path, script: str) -> str:
    done = subprocess.run(
        [prefix / "bin/python", "-c", script],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_copied_python_is_at_home_where_it_is(copied: Path) -> None:
    facts = json.loads(
        ask(
            copied,
            "import json, sys, sysconfig, ssl, ctypes, zlib; print(json.dumps([sys.prefix, sysconfig.get_paths(),"
            " sysconfig.get_config_var('INCLUDEPY'), sysconfig.get_config_var('LIBDIR'), sys.path, json.__cached__]))",
        )
    )
    prefix, paths, include, libdir, search, cached = facts
    assert prefix == str(copied)
    assert all(path.startswith(str(copied)) for path in [*paths.values(), include, libdir, *search[1:]])
    assert Path(paths["include"], "Python.h").exists()
    assert Path(cached).exists()


def test_a_copied_python_has_no_packages_of_the_original(copied: Path) -> None:
    site = Path(ask(copied, "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    assert [path.name for path in site.iterdir()] == ["README.txt"]
    assert not list(copied.rglob("EXTERNALLY-MANAGED"))


def test_no_file_of_the_build_variables_names_the_original(copied: Path) -> None:
    for file in copied.rglob("_sysconfigdata*.py"):
        text = file.read_text()
        assert "@PREFIX@" in text or file.name == "_sysconfigdata_x86_64_conda_linux_gnu.py"
        assert ".pyenv" not in text or ".pyenv" in str(copied)


def test_what_it_links_looks_for_libraries_in_the_environment_as_with_condas_own(copied: Path) -> None:
    script = (
        "import json, sysconfig, _sysconfigdata_x86_64_conda_linux_gnu as conda; own = conda.build_time_vars;"
        "print(json.dumps([sysconfig.get_config_var('LDSHARED'), own['LDSHARED'], own['CC']]))"
    )
    default, conda, compiler = json.loads(ask(copied, script))
    assert f"-Wl,-rpath,{copied}/lib" in default
    assert f"-Wl,-rpath,{copied}/lib" in conda
    assert conda.startswith("x86_64-conda-linux-gnu-")
    assert compiler.startswith("x86_64-conda-linux-gnu-")


def test_packages_name_each_other_as_conda_forges_do() -> None:
    here = Interpreter(Path(sysconfig.get_config_var("BINDIR")) / "python3", Path("/p"), "3.12.1")
    abi, python = interpreters.python_packages(here, (), workspace())
    assert (abi.name, abi.version, abi.constrains) == ("python_abi", "3.12", ("python 3.12.*",))
    assert abi.build.endswith("1_cp312")
    assert python.depends == ("python_abi 3.12.* *_cp312",)
    assert python.build.endswith("_cpython")
    newer = interpreters.python_packages(Interpreter(here.executable, here.prefix, "3.13.0"), (), workspace())[1]
    assert newer.build.endswith("_cp313")
