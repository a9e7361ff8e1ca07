"""The front door: one line for every error, its exit code, no traceback; tasks and their help."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest

import fake_pixi
from front_door import ROOT, assert_one_line_error, run
from ssm_forge import cli
from ssm_forge.base import errors
from ssm_forge.base.errors import ForgeError
from ssm_forge.base.paths import Workspace
from ssm_forge.build import jobs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ForgeError)]


def perform(monkeypatch: pytest.MonkeyPatch, action: object, *args: str) -> int:
    """Run a task that only does ``action``; returns the exit code."""

    @click.command("fake")
    @click.option("--number", type=int)
    def fake(number: int | None) -> None:
        if isinstance(action, BaseException):
            raise action
        if callable(action):
            action()

    module = types.ModuleType("ssm_forge.commands.fake")
    module.fake = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake", "A task for tests."))
    monkeypatch.setattr(sys, "argv", ["run", "fake", *args])
    return cli.run()


def test_every_error_class_has_its_own_exit_code() -> None:
    codes = [kind.exit_code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_is_one_line_with_its_fix_and_log(
    kind: type[ForgeError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "x" * 300
    code = perform(monkeypatch, kind(f"it broke [/red] {long}.", fix="Mend it.", log="/logs/a.log"))
    said = capsys.readouterr()
    assert code == kind.exit_code
    assert said.err == f"error: it broke [/red] {long}. Mend it. (full log: /logs/a.log)\n"
    assert said.out == ""


def test_an_unexpected_exception_leaves_a_crash_log_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = Workspace(tmp_path, tmp_path / "cache")
    monkeypatch.setattr(cli, "workspace", lambda: place)
    assert perform(monkeypatch, ZeroDivisionError("two\nlines")) == 70
    said = capsys.readouterr().err
    (log,) = place.logs.iterdir()
    assert said == f"error: ZeroDivisionError: two lines This is a bug in ssm-forge; please report it with {log}.\n"
    assert "Traceback" in log.read_text()
    assert "command: run fake" in log.read_text()


def test_a_crash_where_no_log_can_be_written_is_still_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSM_FORGE_LOG_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(cli, "workspace", lambda: Workspace(tmp_path / "file", tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    assert perform(monkeypatch, ValueError("x")) == 70
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number", [13, 28, 30])
def test_missing_rights_and_a_full_disk_are_no_bug(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perform(monkeypatch, OSError(number, os.strerror(number), "/some/file")) == errors.MachineError.exit_code
    said = capsys.readouterr().err
    assert said.startswith(f"error: /some/file can't be written or read ({os.strerror(number)})")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("action", "code"), [(KeyboardInterrupt(), 130), (click.Abort(), 130)])
def test_ctrl_c_is_no_error(
    action: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perform(monkeypatch, action) == code
    assert capsys.readouterr().err.strip() == "stopped: run the same command again to go on where it was."


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (None, 0),
        (SystemExit(9), 9),
        (SystemExit(None), 0),
        (SystemExit("text"), 1),
        (lambda: click.get_current_context().exit(3), 3),
        (lambda: sys.exit(4), 4),
    ],
)
def test_exit_codes_arrive(action: object, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert perform(monkeypatch, action) == code


@pytest.mark.parametrize("args", [("--bad",), ("--number", "x"), ("extra",)])
def test_wrong_usage_is_one_line_that_names_the_help(
    args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perform(monkeypatch, None, *args) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "fake --help'" in said
    assert said.count("\n") == 1


def test_an_unknown_task_is_one_line() -> None:
    assert_one_line_error(run("instal-mamba"), 2, "instal-mamba", "--help")


def test_without_arguments_the_tasks_are_listed() -> None:
    done = run()
    for task in cli.COMMANDS:
        assert f"  {task} " in done.stdout + done.stderr


def test_tasks_are_those_of_pixi_one_to_one() -> None:
    tasks = tomllib.loads((ROOT / "pixi.toml").read_text())["tasks"]
    assert set(tasks) == set(cli.COMMANDS)
    for name, task in tasks.items():
        assert task["cmd"] == f"python -m ssm_forge {name}"
        assert f"{task['description']}." == cli.COMMANDS[name][1]


@pytest.mark.parametrize("task", list(cli.COMMANDS))
def test_every_task_explains_itself(
    task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", task, "--help"])
    assert cli.run() == 0
    said = capsys.readouterr().out
    assert f" {task} " in said
    assert len(said.splitlines()) > 3


def test_messages_name_only_tasks_that_exist() -> None:
    named = set()
    for file in (ROOT / "scripts/ssm_forge").rglob("*.py"):
        named |= set(re.findall(r"\{launcher\(\)\} ([a-z][a-z-]*)", file.read_text()))
    assert named
    assert not named - set(cli.COMMANDS)


def bare_path(folder: Path, *tools: str) -> str:
    folder.mkdir()
    for tool in tools:
        (folder / tool).symlink_to(shutil.which(tool) or "/nowhere")
    return str(folder)


def test_without_python_the_front_door_says_so(tmp_path: Path) -> None:
    done = run("verify", PATH=bare_path(tmp_path / "bin", "bash", "dirname", "env"), SSM_FORGE_PYTHON="")
    assert_one_line_error(done, 3, "no Python >= 3.10", "apt install python3", "SSM_FORGE_PYTHON")


def test_a_python_that_is_too_old_is_not_taken(tmp_path: Path) -> None:
    path = bare_path(tmp_path / "bin", "bash", "dirname", "env")
    old = tmp_path / "bin/python3"
    old.write_text("#!/bin/bash\nexit 1\n")
    old.chmod(0o755)
    assert_one_line_error(run("verify", PATH=path, SSM_FORGE_PYTHON=""), 3, "no Python >= 3.10")
    assert_one_line_error(run("verify", SSM_FORGE_PYTHON=str(old)), 3, f"SSM_FORGE_PYTHON={old}")


def test_settings_of_the_callers_python_do_not_reach_the_tools(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('wrong click')\n")
    done = run("verify", "--prefix", str(tmp_path), PYTHONPATH=str(tmp_path), PYTHONHOME="/nowhere")
    assert_one_line_error(done, 8, "is not a conda environment")


def caller(tmp_path: Path) -> Path:
    """A folder of the user's, with a fake environment in it whose python prints its arguments."""
    python = tmp_path / "an env/bin/python"
    python.parent.mkdir(parents=True)
    (tmp_path / "an env/conda-meta").mkdir()
    python.write_text('#!/bin/bash\nprintf "%s|" "$PWD" "$@"\n')
    python.chmod(0o755)
    return tmp_path


HOSTILE = ("it's", "a'; echo INJECTED; echo '", 'b"c', "$HOME `id` \\", "new\nline", "")


def test_with_pixi_arguments_and_folder_are_the_callers(tmp_path: Path, pixi_path: str) -> None:
    command = [str(ROOT / "run"), "python", "--prefix", "an env", *HOSTILE]
    env = {"PATH": pixi_path, "PYTHONHOME": "/nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=caller(tmp_path), check=False)
    assert done.stdout == "|".join([str(tmp_path), *HOSTILE, ""]), done.stderr
    assert done.returncode == 0


def test_a_task_of_pixi_finds_the_callers_folder(tmp_path: Path, pixi_path: str) -> None:
    command = ["pixi", "run", "--manifest-path", str(ROOT / "pixi.toml"), "python", "--prefix", "an env", "a b"]
    env = {"PATH": pixi_path}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=caller(tmp_path), check=False)
    assert done.stdout == f"{tmp_path}|a b|", done.stderr


def test_a_shell_that_a_task_of_pixi_opened_is_not_taken_for_the_task(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    env = {"PIXI_PROJECT_ROOT": str(ROOT), "INIT_CWD": str(tmp_path / "elsewhere"), "SSM_FORGE_NO_PIXI": "1"}
    command = [str(ROOT / "run"), "python", "--prefix", "an env"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, cwd=caller(tmp_path))
    assert done.stdout == f"{tmp_path}|", done.stderr


def test_no_setting_of_pixi_toml_reaches_more_than_its_task() -> None:
    data = tomllib.loads((ROOT / "pixi.toml").read_text())
    assert "activation" not in data
    scripts = {"PYTHONPATH": "$PIXI_PROJECT_ROOT/scripts"}
    assert [name for name, task in data["tasks"].items() if task["env"] != scripts] == []


@pytest.fixture
def pixi_path(tmp_path: Path) -> str:
    """PATH with a pixi that starts programs as pixi 0.77 does."""
    return f"{fake_pixi.put(tmp_path / 'path').parent}:/usr/bin:/bin"


def test_too_much_memory_is_refused_with_the_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine with 4 GB free; what fits there follows from the costs of the recipes' own files."""
    monkeypatch.setattr(jobs, "free_memory", lambda: 4_000_000_000)
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SSM_FORGE_CHANNEL", str(tmp_path / "channel"))
    monkeypatch.setattr(sys, "argv", ["run", "install-mamba", "--source", "bridge", "--dry-run", "--jobs", "16"])
    code = cli.run()
    done = subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())
    skip_where_parts_are_missing(done)
    assert_one_line_error(done, 3, "16 compile jobs need 800.0 MB + ", " for 12 more = ", "4.0 GB are free", "--jobs")


def skip_where_parts_are_missing(done: subprocess.CompletedProcess[str]) -> None:
    for lack in ("no Python", "no C++ compiler", "of disk"):
        if lack in done.stderr and "compile jobs" not in done.stderr:
            pytest.skip(f"this machine can't plan a build: {done.stderr.strip()}")


def install(cache: Path, mirror: str, prefix: Path) -> subprocess.CompletedProcess[str]:
    """A real installation whose every download is sent to ``mirror``."""
    done = run(
        "install-mamba",
        "--source",
        "bridge",
        "--prefix",
        str(prefix),
        SSM_FORGE_CACHE_DIR=str(cache),
        SSM_FORGE_CHANNEL=str(cache / "channel"),
        SSM_FORGE_MIRRORS=f"https://={mirror}/ http://={mirror}/",
    )
    skip_where_parts_are_missing(done)
    return done


def test_an_unreachable_registry_is_one_clear_error_soon(tmp_path: Path) -> None:
    done = install(tmp_path / "cache", "http://127.0.0.1:1", tmp_path / "prefix")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 4, done.stderr
    assert last.startswith("error: http://127.0.0.1:1/")
    assert "could not be downloaded" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "prefix").exists()


class Liar(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"wrong")


@pytest.fixture
def liar() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hash_mismatch_names_expected_found_and_where(liar: str, tmp_path: Path) -> None:
    done = install(tmp_path / "cache", liar, tmp_path / "prefix")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 5, done.stderr
    assert hashlib.sha256(b"wrong").hexdigest() in last
    assert re.search(r"the lock says [0-9a-f]{64}", last)
    assert f"sha256 of {liar}/" in last
    # Downloads that were stopped are gone on with, and checked then; no file has its final name.
    files = [path for path in (tmp_path / "cache/downloads").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix != ".part"]
    assert not (tmp_path / "prefix").exists()


@pytest.mark.parametrize(
    ("missing", "words"),
    [("starlette", ["test", "--fast"]), ("cyclonedx", ["export", "cu118", "--format", "cyclonedx"])],
)
def test_a_task_goes_on_with_our_own_tools_where_the_environment_lacks_what_it_needs(
    missing: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def execve(path: Path, line: list[str], environment: dict[str, str]) -> None:
        ran.append([*line, environment["SSM_FORGE_NO_PIXI"]])
        raise SystemExit(0)  # The real one does not come back.

    monkeypatch.delenv("SSM_FORGE_NO_PIXI", raising=False)
    # Whatever else this environment lacks is not what is asked about here.
    there = importlib.util.find_spec("pytest")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else there)
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["run", *words])
    assert cli.run() == 0
    assert ran == [[str(ROOT / "run"), *words, "1"]]
