"""Doctor as its users start it: the task, the one file, exit codes, JSON, the report, the document, the hooks."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import broken_environments as make
from broken_environments import SUFFIX, Source
from front_door import ROOT
from ssm_forge import cli
from ssm_forge.base.errors import BuildError
from ssm_forge.doctor import __main__ as doctor_main
from ssm_forge.doctor import app, docs, network, pyz, report, requirements, symbols
from ssm_forge.doctor.diagnosis import Diagnosis
from ssm_forge.doctor.findings import Target, finding
from ssm_forge.flow import advice
from ssm_forge.upkeep import symbols as bump_symbols

PACKAGE = ROOT / "scripts/ssm_forge/doctor"
KNOWN = "ImportError: selective_scan_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi\n"
SECRETS = ("hunter2", "s3cr3t", "hf_abcdefghijklmnopqrstuv", "mysecrettoken")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(scope="session")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("pyz") / "ssm-forge-doctor.pyz"
    pyz.write(target)
    return target


def pythons() -> list[str]:
    """Every interpreter from 3.8 on that this machine has, one of each release."""
    names = [f"python3.{minor}" for minor in range(8, 16)]
    found = [shutil.which(name) for name in names]
    found += [
        str(path)
        for path in Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin/python3")
    ]
    usable: dict[str, str] = {}
    for path in (sys.executable, *filter(None, found)):
        # Version managers leave shims on PATH for interpreters that are not there.
        done = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
        version = done.stdout.split()
        if done.returncode == 0 and (int(version[0]), int(version[1])) >= (3, 8):
            usable.setdefault(done.stdout, path)
    return list(usable.values())


def doctor(
    file: Path, *arguments: str, python: str = sys.executable, text: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8", **variables}
    return subprocess.run(
        [python, str(file), *arguments],
        input=text,
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        check=False,
    )


# The one file


def test_the_one_file_is_small_and_the_same_every_time(one_file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.pyz"
    pyz.write(again)
    assert again.read_bytes() == one_file.read_bytes()
    assert one_file.stat().st_size <= 300_000
    assert [path.name for path in tmp_path.iterdir()] == ["again.pyz"]


def test_every_python_on_this_machine_runs_it(one_file: Path) -> None:
    for python in pythons():
        done = doctor(one_file, "--log", "-", "--json", python=python, text=KNOWN)
        assert (done.returncode, done.stderr) == (app.BROKEN, ""), python
        assert [one["code"] for one in json.loads(done.stdout)["findings"]] == ["other-torch"]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_it_is_written_for_python_3_8_and_the_standard_library(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    assert "from __future__ import annotations" in path.read_text()
    for node in ast.walk(tree):
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in named:
            own = name == "ssm_forge" or name.startswith("ssm_forge.doctor")
            assert own or name.split(".")[0] in sys.stdlib_module_names, name


def test_an_older_python_is_told_so(one_file: Path) -> None:
    import zipfile

    with zipfile.ZipFile(one_file) as archive:
        start = archive.read("__main__.py").decode().split("from ssm_forge")[0]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.version_info = (3, 6, 9)\n{start}"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: ssm-forge-doctor needs Python 3.8 or newer, this is 3.6.\n"


def test_it_examines_the_environment_of_its_own_python(one_file: Path, tmp_path: Path, libraries: Path) -> None:
    made = make.healthy(tmp_path, libraries)
    done = doctor(one_file, "--wait", "120", python=str(made.python))
    assert (done.returncode, "Nothing wrong was found." in done.stdout) == (app.HEALTHY, True), done.stdout
    (made.site / f"selective_scan_cuda{SUFFIX}").unlink()
    done = doctor(one_file, "--wait", "120", python=str(made.python))
    assert (done.returncode, "1. error kernels-missing" in done.stdout) == (app.BROKEN, True)
    assert f"./run install-mamba --prefix {made.prefix}" in done.stdout


# Exit codes, languages, JSON


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        (KNOWN, app.BROKEN, "other-torch"),
        ("FooError: never seen\n", app.UNKNOWN, "not one that doctor knows"),
        ("all is well\n", app.HEALTHY, "no failure that doctor knows"),
        ("Precompiled wheel not found. Building from source...\n", app.HEALTHY, "warning source-build-slow"),
    ],
)
def test_a_log_gives_its_exit_code(text: str, code: int, expected: str, one_file: Path) -> None:
    done = doctor(one_file, "--log", "-", text=text)
    assert (done.returncode, expected in done.stdout) == (code, True), done.stdout


@pytest.mark.parametrize("name", ["/no/such/log", "/"])
def test_a_log_that_cannot_be_read_is_one_line(name: str, one_file: Path) -> None:
    done = doctor(one_file, "--log", name)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (app.USAGE, "", 1)
    assert done.stderr.startswith(f"error: {name} can't be read")


def test_a_bug_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor_main, "run", lambda **options: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["doctor", "--log", "-"])
    assert doctor_main.guarded() == 70
    said = capsys.readouterr().err
    assert said.startswith("error: ZeroDivisionError")
    assert said.count("\n") == 1


def test_a_folder_that_is_none_is_usage(one_file: Path, tmp_path: Path) -> None:
    done = doctor(one_file, str(tmp_path))
    assert (done.returncode, "not-an-environment" in done.stdout, done.stderr) == (app.USAGE, True, "")


def test_the_explanation_is_also_chinese(one_file: Path) -> None:
    for arguments, variables in (((), {"LANG": "zh_CN.UTF-8"}), (("--lang", "zh"), {})):
        done = doctor(one_file, "--log", "-", *arguments, text=KNOWN, **variables)
        assert "扩展模块是针对另一个torch版本编译的。" in "".join(done.stdout.split())
    plain = doctor(one_file, "--log", "-", "--lang", "zh", text=KNOWN, PYTHONIOENCODING="ascii", LANG="C")
    assert (plain.returncode, plain.stderr) == (app.BROKEN, "")


def test_a_reader_that_goes_away_is_no_error(one_file: Path) -> None:
    command = f"{sys.executable} {one_file} --log - < /dev/null | true"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_lines_fit_a_terminal_but_commands_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command_of = Target(Path("/a/b" + "/long" * 20), Path("/a/b/bin/python"))
    told = Diagnosis([finding("other-torch", "import x: " + "word " * 60, target=command_of, module="x")])
    lines = report.as_text(told, "en").splitlines()
    assert all(len(line) <= 80 or "install-mamba" in line for line in lines)
    assert any(line.strip() == f"./run install-mamba --prefix {command_of.prefix}" for line in lines)


@pytest.mark.parametrize("kind", ["conda-meta", "a venv"])
def test_what_lies_beside_a_log_is_what_commands_are_for(one_file: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / kind).mkdir()
    done = doctor(one_file, str(tmp_path), "--log", "-", text=KNOWN)
    assert f"./run install-mamba --prefix {tmp_path}" in done.stdout


def test_another_projects_extension_gets_another_command(one_file: Path) -> None:
    text = (
        "ImportError: flash_attn_2_cuda.cpython-310-x86_64-linux-gnu.so: undefined symbol: _ZN3c104cuda9SetDeviceEi\n"
    )
    done = doctor(one_file, "--log", "-", text=text)
    assert "other-torch" in done.stdout
    assert "mamba-ssm" not in done.stdout.split("Seen in")[0]


@pytest.fixture
def server() -> Iterator[str]:
    class Refuses(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_the_network_is_asked(
    server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("fine\n")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(network, "_SECONDS", 60)
    monkeypatch.setattr(network, "_ADDRESSES", {"mine": server, "other": "http://127.0.0.1:1/"})
    assert doctor_main.main(["--log", str(log), "--network", "--json"]) == app.HEALTHY
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["network"] == {"mine": "answers", "other": "[Errno 111] Connection refused"}
    assert told["notes"] == ["does not answer: other: [Errno 111] Connection refused"]
    monkeypatch.setattr(network, "_ADDRESSES", {"other": "http://127.0.0.1:1/"})
    assert doctor_main.main(["--log", str(log), "--network"]) == app.BROKEN
    assert "error network-unreachable" in capsys.readouterr().out


# The report


def test_a_report_has_neither_secrets_nor_names(one_file: Path, tmp_path: Path) -> None:
    home = tmp_path / "home/alice"
    home.mkdir(parents=True)
    log, target = home / "build.log", tmp_path / "report.json"
    log.write_text(
        f"Looking in indexes: https://alice:hunter2@pypi.lab/simple, https://lab/t/s3cr3t/main\n"
        f"{home}/env/selective_scan_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi "
        "HF_TOKEN=hf_abcdefghijklmnopqrstuv "
        "Authorization: Bearer mysecrettoken\nImportError: /home/bob/x.so\n"
    )
    done = doctor(one_file, "--log", str(log), "--report", str(target), HOME=str(home), USER="alice")
    written = target.read_text()
    assert done.returncode == app.BROKEN
    for secret in SECRETS:
        assert secret not in written + done.stdout
    assert "alice" not in written
    assert str(tmp_path / "home") not in written
    assert "/home/bob" not in written
    assert json.loads(written)["findings"][0]["code"] == "other-torch"
    assert "~/env/selective_scan_cuda.so" in written


def test_a_report_that_cannot_be_written_is_one_line(one_file: Path) -> None:
    done = doctor(one_file, "--log", "-", "--report", "/no/such/folder/report", text=KNOWN)
    assert (done.returncode, done.stderr.count("\n")) == (app.USAGE, 1)


# The task


def test_the_task_is_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text(KNOWN)
    monkeypatch.setattr(sys, "argv", ["run", "doctor", "--log", str(log), "--json"])
    assert cli.run() == app.BROKEN
    assert json.loads(capsys.readouterr().out)["findings"][0]["code"] == "other-torch"


def test_the_task_writes_the_one_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, one_file: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "doctor", "--write-pyz", str(tmp_path / "d.pyz")])
    assert cli.run() == 0
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (one_file, tmp_path / "d.pyz")}
    assert len(digests) == 1


def test_the_active_environment_is_examined(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "mine"))
    monkeypatch.setattr(sys, "argv", ["run", "doctor"])
    assert cli.run() == app.USAGE
    assert str(tmp_path / "mine") in capsys.readouterr().out


def test_the_tools_own_settings_are_not_the_users() -> None:
    tools = str(Path(sys.prefix) / "bin")
    outer = {
        "PATH": f"{tools}:/usr/bin",
        "PYTHONPATH": str(ROOT / "scripts"),
        "VIRTUAL_ENV": sys.prefix,
        "CUDA_HOME": "/c",
    }
    assert advice.users_variables(outer) == {"PATH": "/usr/bin", "CUDA_HOME": "/c"}
    assert advice.users_variables({"PATH": "/b", "PYTHONPATH": "/mine"})["PYTHONPATH"] == "/mine"


def test_the_document_is_in_step_with_the_rules() -> None:
    assert (ROOT / "docs/doctor.md").read_text(encoding="utf-8") == docs.text(), "run './run doctor --write-docs'"


# At the end of other tasks that fail


def test_a_failed_installation_ends_with_what_its_log_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from ssm_forge.flow import pipeline

    log = tmp_path / "install-mamba.log"

    def fail(*arguments: object, **options: object) -> None:
        raise BuildError("building mamba-ssm failed.", log=log)

    monkeypatch.setattr(pipeline, "install_mamba", fail)
    monkeypatch.setattr(sys, "argv", ["run", "install-mamba"])
    for text, expected in (("g++: fatal error: Killed signal terminated program cc1plus\n", 4), ("error: foo\n", 1)):
        log.write_text(text)
        assert cli.run() == BuildError.exit_code
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == f"error: building mamba-ssm failed. (full log: {log})"
        assert len(lines) == expected
    log.unlink()
    assert cli.run() == BuildError.exit_code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_advice_names_the_first_error_of_an_environment(
    tmp_path: Path, libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make.healthy(tmp_path, libraries)
    for name, value in made.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(advice, "_MOST_SECONDS", 120)
    monkeypatch.chdir(made.folder)
    assert advice.of_environment(made.prefix) == ""
    made.extension(Source(module="selective_scan_cuda", needs=(make.SET_DEVICE["2.9"],)))
    text = advice.of_environment(made.prefix)
    assert text.startswith("doctor: other-torch: The extension was compiled for another torch")
    assert text.count("\n") == 2
    (made.site / f"selective_scan_cuda{SUFFIX}").unlink()
    assert advice.of_environment(made.prefix, with_kernels=False) == ""


def test_advice_never_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(advice.diagnosis, "of_environment", fail)
    assert advice.of_environment(tmp_path) == ""
    assert advice.of_log(tmp_path / "missing") == ""


# Versions and symbols


@pytest.mark.parametrize(
    ("version", "specifiers", "expected"),
    [
        ("2.5.1+cu124", ">=2.1", True),
        ("2.5.1+cu124", "==2.5.1", True),
        ("2.5.1+cu124", "==2.5.1+cu121", False),
        ("2.5.1", "==2.5.*", True),
        ("2.15", "==2.1.*", False),
        ("3.2.0", ">=3.5.0", False),
        ("3.5", ">=3.5.0", True),
        ("2.0rc1", "<2.0", True),
        ("1.4.5", "~=1.4.2", True),
        ("1.5", "~=1.4.2", False),
        ("2.3.2.post1", ">2.3.2", True),
        ("1!1.0", ">5", True),
        ("1.0.dev3", "<1.0a1", True),
        ("weird", ">=1", None),
    ],
)
def test_versions_are_compared_as_pip_does(version: str, specifiers: str, expected: bool | None) -> None:
    assert requirements.satisfies(version, specifiers) is expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("torch (>=2.0)", ("torch", ">=2.0")),
        ("Typing_Extensions>=4 ; python_version >= '3.8'", ("typing-extensions", ">=4")),
        ("foo ; extra == 'dev'", None),
        ("foo ; python_version < '3.0'", None),
        ("foo ; platform_system == 'Windows'", None),
        ("foo @ https://x/y.whl", None),
        ("foo[bar]<2,>=1 ; sys_platform == 'linux'", ("foo", "<2,>=1")),
        ("foo ; python_version < '3' or os_name == 'posix'", None),
    ],
)
def test_requirement_lines_that_hold_here(line: str, expected: tuple[str, str] | None) -> None:
    assert requirements.parse(line, "3.11") == expected


def test_symbols_tell_the_torch_that_they_are_of() -> None:
    assert symbols.built_for(["_ZN3c104cuda9SetDeviceEa"]) == ("2.3", "2.4", "2.5", "2.6", "2.7")
    assert symbols.built_for(["_ZN3c104cuda9SetDeviceEab", "_ZN3c1013MessageLoggerC1EPKciib"]) == ("2.10",)
    assert symbols.built_for([make.FAIL_OLD, "_ZN3c104cuda9SetDeviceEa"]) == ("2.3", "2.4", "2.5", "2.6")
    assert symbols.built_for(["_ZN3c10NeverSeenE"]) == ()
    assert symbols.abi([make.FAIL_NEW]) == "new"
    assert symbols.abi([make.FAIL_OLD]) == "old"
    assert symbols.abi(["_ZN3c104cuda9SetDeviceEa", "_ZNSt7__cxx1112basic_stringIcE"]) == ""


def test_symbols_are_readable_also_without_a_demangler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbols, "_libstdcxx", lambda: None)
    assert symbols.demangle("_ZN3c104cuda9SetDeviceEi") == "c10::cuda::SetDevice"
    assert symbols.demangle("plain") == "plain"


def test_the_table_of_symbols_is_read_as_it_is_written() -> None:
    path = PACKAGE / "torch_symbols.json"
    known = bump_symbols.read_table(path)
    assert bump_symbols.table_text(known) == path.read_text()
    assert list(known) == list(symbols.minors())
    gap = {"2.0": frozenset({"a", "b"}), "2.1": frozenset({"a"}), "2.2": frozenset({"b"})}
    text = bump_symbols.table_text(gap)
    assert json.loads(text)["symbols"] == {"a": "2.0-2.1", "b": "2.0,2.2"}
    assert re.search(r"^_Z", next(iter(known["2.5"])))


def test_the_table_is_made_from_the_libraries_of_a_wheel(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    wheel = tmp_path / "torch.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("libc10.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cpu.so"):
            defines = ("_ZN3c104cuda9SetDeviceEa", make.FAIL_OLD, "main_of_nothing") if name == "libc10_cuda.so" else ()
            archive.write(make.library(Source(defines=defines), libraries), f"torch/lib/{name}")
    monkeypatch.setattr(bump_symbols, "RemoteFile", lambda url, client: open(url, "rb", buffering=0))  # noqa: SIM115, PTH123
    assert bump_symbols._symbols(str(wheel)) == {"_ZN3c104cuda9SetDeviceEa"}
