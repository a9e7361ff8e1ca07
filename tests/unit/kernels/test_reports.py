"""Reading other tools' results: pytest's junit file and compute-sanitizer's output."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed here; ./run test runs this in an installed env")

from ssm_forge.kernels import __main__ as command
from ssm_forge.kernels import sanitizer, upstream

TESTS = textwrap.dedent("""
    import pytest, time
    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_numbers(n):
        if n == 2:
            pytest.skip("two is not supported")
        assert n != 3, "three is wrong"
    def test_good():
        pass
    def test_slow():
        open(__file__.replace("test_kernel.py", "slow"), "w").close()
        time.sleep(600)
""")


# Only turns a hang into a failure.
PATIENCE_SECONDS = 120.0


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def time_out_when(reached: Callable[[Any], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a limit run out when the process that was started has come so far, however long that takes."""
    communicate = subprocess.Popen.communicate

    def wait(process: Any, input: Any = None, timeout: float | None = None) -> Any:
        if timeout is None or getattr(process, "timed_out", False):
            return communicate(process, input, timeout)
        process.timed_out = True
        wait_until(lambda: reached(process))
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", wait)


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_kernel.py").write_text(TESTS)
    return folder


def test_upstream_tests_are_reported_one_by_one_and_summed_up_by_function(tests: Path) -> None:
    results, problem = upstream.run(tests, select="not slow")
    assert not problem
    assert [r.status for r in results] == ["pass", "not-run", "fail", "pass"]
    checks = {c.name.rpartition("::")[2]: c for c in upstream.summarize("p", results, problem, 1.0)}
    assert checks["test_numbers"].status == "fail"
    assert "1 passed, 1 failed, 1 skipped (two is not supported)" in checks["test_numbers"].detail
    assert "three is wrong" in checks["test_numbers"].detail
    assert checks["test_good"].status == "pass"


def test_every_file_of_every_project_is_run(tests: Path, tmp_path: Path) -> None:
    (tests / "more").mkdir()
    (tests / "more" / "test_other.py").write_text("def test_other(): pass\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    checks, every = upstream.run_projects({"one": tests, "two": empty}, select="not slow")
    assert [r.status for r in every["one"]] == ["pass", "pass", "not-run", "fail", "pass"]
    assert [c.status for c in checks if c.name.startswith("two")] == ["fail"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Whoever runs the tests in the background may have SIGINT ignored, which is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_keeps_what_ran_and_says_so(tests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "GRACE_SECONDS", PATIENCE_SECONDS)
    time_out_when(lambda process: (tests / "slow").exists(), monkeypatch)
    results, problem = upstream.run(tests, limit=6)
    assert problem == "interrupted after 6 s"
    assert [r.status for r in results][:4] == ["pass", "not-run", "fail", "pass"]
    assert upstream.summarize("p", results, problem, 1.0)[-1].status == "not-run"


def test_no_tests_at_all_is_a_failure(tmp_path: Path) -> None:
    results, problem = upstream.run(tmp_path)
    assert problem
    assert [c.status for c in upstream.summarize("p", results, problem, 1.0)] == ["fail"]


@pytest.mark.parametrize(
    ("status", "said", "wanted"),
    [
        (0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "pass"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "pass"),
        (77, "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 3 errors\n", "fail"),
        (1, "Traceback\nImportError: no module\n========= ERROR SUMMARY: 0 errors\n", "fail"),
        (1, "========= Error: Device not supported.\n", "not-run"),
        (139, "", "fail"),
    ],
)
def test_sanitizer_output_is_judged(status: int, said: str, wanted: str) -> None:
    assert sanitizer.judge("memcheck", status, said, 1.0).status == wanted


def test_a_sanitizer_that_hangs_is_stopped_with_what_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "compute-sanitizer"
    child = tmp_path / "child"
    fake.write_text(f"#!/bin/bash\nsleep 600 & echo $! > {child}.part; mv {child}.part {child}; wait\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sanitizer, "find", lambda: fake)
    time_out_when(lambda process: child.exists(), monkeypatch)
    check = sanitizer.run("memcheck", limit=7)
    assert (check.status, check.detail) == ("not-run", "not done after 7 s")
    wait_until(lambda: ended(int(child.read_text())))


def ended(pid: int) -> bool:
    """Gone, or a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_missing_sanitizer_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    assert {c.status for c in sanitizer.run_all()} == {"not-run"}


@pytest.mark.parametrize("arguments", [["check", "--quick"], ["bench"], ["sanitize"], ["models"], ["gpus"]])
def test_without_a_gpu_nothing_passes(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ssm_forge.kernels.machine.missing_gpu", lambda: "no GPU here")
    for extra, code in ((["--json"], 3), (["--json", "--allow-missing-gpu"], 0)):
        monkeypatch.setattr(sys, "argv", ["kernels", *arguments, *extra])
        assert command.main() == code
        said = capsys.readouterr().out
        assert "no GPU here" in said
        assert '"pass"' not in said
