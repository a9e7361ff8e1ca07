"""Jobs that fit the machine; what killed builds leave is stopped and removed; failures are one clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ssm_forge.base import machine, owners
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import BuildError, MachineError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.base.ui import Log, open_log
from ssm_forge.build import jobs
from ssm_forge.build import run as builds
from ssm_forge.build.jobs import MEMORY_BASE_BYTES, MEMORY_MARGIN, choose_jobs, memory_needed
from ssm_forge.build.leftovers import sweep
from ssm_forge.build.request import BuildRequest
from ssm_forge.build.schedule import Job
from ssm_forge.manifest import variants
from ssm_forge.manifest.recipe import Rendered

GB = 1_000_000_000


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("SSM_FORGE_CCACHE", "off")
    return Workspace(root=tmp_path, cache=tmp_path / "cache")


@pytest.fixture
def log(tmp_path: Path):  # type: ignore[no-untyped-def]
    with open_log(tmp_path / "logs", "test") as opened:
        yield opened


def have(monkeypatch: pytest.MonkeyPatch, *, memory: int, cores: int) -> None:
    monkeypatch.setattr(jobs, "free_memory", lambda: memory)
    monkeypatch.setattr(jobs, "cores", lambda: cores)


# Four files; with the margin they take 3, 2, 1 and 1 GB.
COSTS = [Job(f"{i}.cu", 10.0, round(size * GB / MEMORY_MARGIN)) for i, size in enumerate((1, 3, 1, 2))]


@pytest.mark.parametrize(
    ("memory", "cores", "requested", "expected"),
    [
        (64 * GB, 2, None, 2),
        (64 * GB, 16, None, 4),
        (MEMORY_BASE_BYTES + 6 * GB, 16, None, 3),
        (MEMORY_BASE_BYTES + 6 * GB - 10, 16, None, 2),
        (MEMORY_BASE_BYTES + 3 * GB, 16, None, 1),
        (64 * GB, 2, 5, 5),
        (MEMORY_BASE_BYTES + 3 * GB, 1, 1, 1),
    ],
)
def test_as_many_jobs_as_cores_files_and_memory_allow(
    monkeypatch: pytest.MonkeyPatch, memory: int, cores: int, requested: int | None, expected: int
) -> None:
    have(monkeypatch, memory=memory, cores=cores)
    assert choose_jobs(requested, COSTS) == expected


def test_the_files_that_take_most_may_run_side_by_side() -> None:
    assert memory_needed(2, COSTS) == MEMORY_BASE_BYTES + 5 * GB
    assert memory_needed(9, COSTS) == MEMORY_BASE_BYTES + 7 * GB


def test_too_many_jobs_are_refused_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, memory=MEMORY_BASE_BYTES + 5 * GB, cores=16)
    with pytest.raises(MachineError) as error:
        choose_jobs(4, COSTS)
    sums = "800.0 MB + 3.0 GB + 2.0 GB + 1.0 GB + 1.0 GB = 7.8 GB"
    assert error.value.what == f"4 compile jobs need {sums} of memory, and 5.8 GB are free."
    assert error.value.fix == "Use --jobs 2."


def test_many_jobs_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, memory=GB, cores=16)
    with pytest.raises(MachineError, match=r"\+ 1\.0 GB \+ 2\.0 GB for 2 more = 9\.8 GB of memory") as error:
        choose_jobs(6, [*COSTS, *COSTS[:1], *COSTS[:1]])
    assert "Free memory" in error.value.fix


def test_too_little_for_one_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, memory=GB // 2, cores=16)
    with pytest.raises(MachineError, match=r"1 compile job need.* 500\.0 MB are free") as error:
        choose_jobs(None, COSTS)
    assert "--jobs" not in error.value.fix


def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    for name, text in files.items():
        (tmp_path / name.replace("_", ".", 1)).write_text(text)

    def inside(path: str) -> Path:
        return tmp_path / Path(path).name if path.startswith("/sys/fs/cgroup") else Path(path)

    monkeypatch.setattr(machine, "Path", inside)


def test_cached_files_of_a_container_are_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup(
        tmp_path,
        monkeypatch,
        memory_max=f"{8 * GB}\n",
        memory_current=f"{7 * GB}\n",
        memory_stat=f"anon {GB}\nfile {6 * GB}\nactive_file {2 * GB}\ninactive_file {4 * GB}\n",
    )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 100 * GB})())
    assert machine.free_memory() == 7 * GB


def test_a_containers_share_of_the_cores_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    cgroup(tmp_path, monkeypatch, cpu_max="300000 100000\n")
    assert machine.cores() == 3
    cgroup(tmp_path, monkeypatch, cpu_max="max 100000\n")
    assert machine.cores() == 16
    cgroup(tmp_path, monkeypatch, cpu_max="50000 100000\n")
    assert machine.cores() == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("NVIDIA H200, 9.0, 580.65.06\n", [("NVIDIA H200", "9.0")]),
        ("A, B, 8.6, 1.2\nX, [N/A], 1.2\nWarning: something\n\n", [("A, B", "8.6")]),
        ("", []),
    ],
)
def test_what_nvidia_smi_says_is_read_with_care(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, expected: list[tuple[str, str]]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '%s' '{answer}'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tool))
    machine.gpus.cache_clear()
    try:
        assert [(gpu.name, str(gpu.capability)) for gpu in machine.gpus()] == expected
    finally:
        machine.gpus.cache_clear()


def leftover(place: Workspace, owner: int, script: str = "import time; time.sleep(600)") -> tuple[Path, int]:
    """What a killed run leaves: a folder, and a worker in a process group of its own with a child."""
    staging = place.cache / f"build/demo-{owner}"
    staging.mkdir(parents=True)
    spec = staging / "spec.json"
    spec.write_text("{}")
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    begun = "print('started', flush=True); "
    command = [sys.executable, "-c", child + begun + script, str(spec)]
    worker = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
    (staging / "worker.pgid").write_text(str(worker.pid))
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"started\n"
    return staging, worker.pid


def alive(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def require_gone(group: int) -> None:
    """Whoever was killed is gone once it got to run; none of these ends by itself."""
    deadline = time.monotonic() + 120
    while alive(group):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended() -> str:
    """The mark of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return owners.mark(process.pid)


def test_a_killed_runs_processes_are_stopped_and_its_folder_removed(place: Workspace) -> None:
    staging, group = leftover(place, ended())
    assert len(alive(group)) == 2
    sweep(place)
    require_gone(group)
    assert not staging.exists()


def test_children_are_stopped_even_where_the_worker_is_gone(place: Workspace) -> None:
    _, group = leftover(place, ended())
    os.kill(group, signal.SIGKILL)
    os.waitpid(group, 0)
    assert len(alive(group)) == 1
    sweep(place)
    require_gone(group)


def test_a_compiler_in_a_process_group_of_its_own_is_stopped_too(place: Workspace) -> None:
    """As ninja starts them."""
    code = (
        "import os, subprocess, time\n"
        "subprocess.Popen(['sleep', '300'], preexec_fn=os.setpgrp)\n"
        "print('started', flush=True)\n"
        "time.sleep(300)"
    )
    staging = place.cache / f"build/demo-{ended()}"
    staging.mkdir(parents=True)
    worker = subprocess.Popen(
        [sys.executable, "-c", code, str(staging / "spec.json")],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    (staging / "worker.pgid").write_text(str(worker.pid))
    assert worker.stdout is not None
    worker.stdout.readline()
    child_group = os.getpgid(next(iter(psutil.Process(worker.pid).children())).pid)
    assert child_group != worker.pid
    sweep(place)
    worker.wait(600)
    require_gone(child_group)


def test_a_running_builds_folder_is_left_alone(place: Workspace) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        staging, group = leftover(place, owners.mark(other.pid))
        later = time.time() + 3600
        os.utime(staging, (later, later))
        try:
            sweep(place)
            assert staging.exists()
            assert len(alive(group)) == 2
        finally:
            os.killpg(group, signal.SIGKILL)
            other.kill()


def test_a_process_number_that_was_used_again_is_no_owner_and_is_not_killed(place: Workspace) -> None:
    """The owner's and the worker's numbers both belong to somebody else by now."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
        staging = place.cache / f"build/demo-{owners.mark(stranger.pid)}1"
        staging.mkdir(parents=True)
        (staging / "worker.pgid").write_text(str(stranger.pid))
        sweep(place)
        assert stranger.poll() is None
        stranger.kill()
    assert not staging.exists()


def test_our_own_number_on_a_leftover_does_not_stop_the_build(place: Workspace) -> None:
    staging = place.cache / f"build/demo-{owners.mark()}1"
    staging.mkdir(parents=True)
    sweep(place)
    assert not staging.exists()


@pytest.mark.parametrize("mark", ["0123456789ab-4000000-17", "4000000"], ids=["other machine", "older version"])
def test_a_build_of_another_machine_goes_on_in_a_cache_that_is_shared(place: Workspace, mark: str) -> None:
    """A process that is not to be seen here may live there; only what nobody has touched for a week is removed."""
    staging, group = leftover(place, mark)
    try:
        sweep(place)
        assert (staging / "spec.json").exists()
        os.utime(staging, (0, 0))
        sweep(place)
        assert not staging.exists()
        assert len(alive(group)) == 2, "a process number of another machine was killed here"
    finally:
        os.killpg(group, signal.SIGKILL)


KEY = variants.load(workspace().variants).get("cu130", "bridge").key("3.12", ArchList.parse("9.0"))
REQUEST = BuildRequest(Rendered("demo", "1", "0", engine=None), KEY, ())


def worker_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Replace the worker's module by a script; its first argument is the spec."""
    package = tmp_path / "fake/ssm_forge/build"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "worker.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))


# How a worker says what came of it.
TELL = """
import json, os, sys
def tell(**outcome): os.write(int(sys.argv[2]), json.dumps(outcome).encode())
"""


@pytest.mark.parametrize(
    ("script", "what", "fix"),
    [
        (TELL + "tell(error='the test failed'); raise SystemExit(1)", "building demo failed: the test failed", ""),
        (TELL + "tell(package='/x/demo-1-0.conda'); raise SystemExit(3)", "building demo failed: exit code 3", ""),
        (TELL + "tell(package='/x/demo-1-0.conda', error='no')", "building demo failed: no", ""),
        ("import os, sys; os.write(int(sys.argv[2]), b'{\"pack')", "building demo failed: exit code 0", ""),
        ('print(\'{"package": "/x/demo-1-0.conda"}\')', "building demo failed: exit code 0", ""),
        ('print(\'{"error": "not this"}\'); raise SystemExit(3)', "building demo failed: exit code 3", ""),
        ("print('nvcc: Killed'); raise SystemExit(3)", "building demo failed: exit code 3", "use --jobs 1"),
        ("print('x: No space left on device'); raise SystemExit(1)", "exit code 1", "SSM_FORGE_CACHE_DIR"),
        ("print('[1, 2]'); import os; os.kill(os.getpid(), 9)", "exit code -9", ""),
    ],
)
def test_a_failed_build_is_one_error_with_its_log_and_leaves_nothing(
    place: Workspace, log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, what: str, fix: str
) -> None:
    worker_that(monkeypatch, tmp_path, script)
    with pytest.raises(BuildError) as error:
        builds.build(REQUEST, channel=tmp_path / "channel", jobs=1, workspace=place, log=log)
    assert what in error.value.what
    assert fix in error.value.fix
    assert error.value.log == log.path
    assert list((place.cache / "build").iterdir()) == []
    assert not (tmp_path / "channel").exists()


REAL_WORKER = r"""
import subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from ssm_forge.build import worker as build_worker

class Engine:
    def run_build(self, *, progress_callback, **_):
        progress_callback.on_log(SimpleNamespace(message="[1/2] caf\u00e9.cu"))
        tool = "echo '{\"package\": \"evil.conda\"}'; ls -l /proc/self/fd"
        subprocess.run(["sh", "-c", tool], close_fds=False, check=True)
        return SimpleNamespace(packages=["made.conda"])

build_worker.render = lambda *_: SimpleNamespace(engine=Engine())
sys.exit(build_worker.main(Path(sys.argv[1]), int(sys.argv[2])))
"""


def test_what_the_tools_of_a_recipe_print_is_not_the_outcome(tmp_path: Path, log: Log) -> None:
    spec = {"project": "demo", "root": "", "values": KEY.to_renderer(), "output_dir": "", "channels": []}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    answer = os.memfd_create("outcome")
    process = subprocess.Popen(
        [sys.executable, "-c", REAL_WORKER, tmp_path / "spec.json", str(answer)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        pass_fds=(answer,),
    )
    tail = builds._follow(process, "demo", log)
    assert process.wait() == 0, tail
    assert builds._read_outcome(answer) == {"package": "made.conda"}
    os.close(answer)
    assert '{"package": "evil.conda"}' in tail
    assert "caf\u00e9.cu" in tail
    assert "memfd:outcome" not in tail


def test_the_worker_knows_the_tokens_of_the_environment(
    place: Workspace, log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "import os; print('knows', open(os.environ['RATTLER_AUTH_FILE']).read()); raise SystemExit(1)"
    worker_that(monkeypatch, tmp_path, script)
    monkeypatch.delenv("RATTLER_AUTH_FILE", raising=False)
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", "lab.example=known")
    with pytest.raises(BuildError):
        builds.build(REQUEST, channel=tmp_path / "channel", jobs=1, workspace=place, log=log)
    assert 'knows {"lab.example"' in log.path.read_text()


def test_everything_the_worker_prints_is_in_the_log(
    place: Workspace, log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker_that(
        monkeypatch,
        tmp_path,
        "print('plain'); print('[1/2] nvcc a.cu'); print('{\"package\": 1}'); raise SystemExit(1)",
    )
    with pytest.raises(BuildError):
        builds.build(REQUEST, channel=tmp_path / "channel", jobs=1, workspace=place, log=log)
    text = log.path.read_text()
    assert "plain" in text
    assert "[1/2] nvcc a.cu" in text
    assert '{"package": 1}' in text


def test_ctrl_c_stops_the_compilers(
    place: Workspace, log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker_that(
        monkeypatch,
        tmp_path,
        "import os, subprocess, time; subprocess.Popen(['sleep', '600']);"
        " print(os.getpid(), flush=True); time.sleep(600)",
    )
    groups = []

    def interrupted(process: subprocess.Popen[str], project: str, log: Log) -> str:
        assert process.stdout is not None
        groups.append(int(process.stdout.readline()))
        raise KeyboardInterrupt

    monkeypatch.setattr(builds, "_follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builds.build(REQUEST, channel=tmp_path / "channel", jobs=1, workspace=place, log=log)
    require_gone(groups[0])
    assert list((place.cache / "build").iterdir()) == []


def test_a_recipe_that_changed_during_the_build_gives_no_package(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "demo-1-1.conda"
    other.write_bytes(b"")
    monkeypatch.setattr("ssm_forge.build.run._run_worker", lambda *args: other)
    with open_log(tmp_path, "build") as log, pytest.raises(BuildError, match=r"demo-1-0\.conda was planned"):
        builds.build(REQUEST, channel=tmp_path / "channel", jobs=1, workspace=place, log=log)
    assert not (tmp_path / "channel").exists()
