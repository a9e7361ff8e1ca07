"""From nothing to working kernels, and everything a user may do after that.

Every test asks for ``job``: a build killed at its first compiler, then the one command, cold. None needs another test.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from rattler import package_streaming

from conda_channel import holds
from forge_run import Forge, Outcome, Row, all_pass_but_the_gpu, pytest_for, require_sound_toolchain
from ssm_forge.base import ui
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import SolveError
from ssm_forge.bench import baseline
from ssm_forge.channel.folder import index
from ssm_forge.flow import plan
from ssm_forge.install import marker as install_marker
from ssm_forge.install import prefix as install
from ssm_forge.manifest.recipe import EXTENSIONS
from ssm_forge.package import gpu_code
from ssm_forge.package import installed as package_installed
from ssm_forge.package import libraries as elf
from ssm_forge.solve import lock
from ssm_forge.solve import prefix as solve_prefix

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# nvcc's compilers, as they are called while a build of ours runs.
_COMPILERS = {"cicc", "cicc.real", "cudafe++", "cudafe++.real", "ptxas"}
_IMPORTS = "import torch, causal_conv1d_cuda, selective_scan_cuda, causal_conv1d, mamba_ssm; print(mamba_ssm.Mamba)"
_CLASS = "<class 'mamba_ssm.modules.mamba_simple.Mamba'>"


@dataclass(frozen=True)
class Job:
    """What happened before the first test.

    Attributes:
        killed: processes of the build that was killed, its compilers among them.
        left: packages, listed packages and environments that the killed build left.
        first: the one command, with ``--json``.
    """

    killed: tuple[psutil.Process, ...]
    left: tuple[str, ...]
    first: Outcome
    prefix: Path


def _args(row: Row, *more: str) -> tuple[str, ...]:
    return ("install-mamba", *row.options, "--cuda-arch", row.arch, *more)


def _kill_when(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Kill a command, and only itself, as soon as ``happened``; what it started is left to fend for itself."""
    while not happened():
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.fail(f"it was done before it could be killed: {process.stderr.read()[-3000:]}")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def job(forge: Forge, row: Row) -> Job:
    process = forge.start(*_args(row))
    seen: list[psutil.Process] = []

    def compiles() -> bool:
        seen[:] = _descendants(process)
        return bool(_COMPILERS & {_name(child) for child in seen})

    _kill_when(process, compiles)
    envs = forge.workspace.envs
    left = (*forge.packages(), *forge.listed(), *(path.name for path in envs.glob("*")))
    first = forge(*_args(row, "--json"))
    assert first.returncode == 0, first.stderr[-3000:]
    return Job(tuple(seen), left, first, Path(first.json["prefix"]))


def test_a_build_killed_at_its_first_compiler_leaves_nothing_and_is_cleaned_up(job: Job) -> None:
    assert job.left == ()
    assert job.killed
    assert [process for process in job.killed if _runs(process)] == []


def test_one_command_ends_in_verified_kernels(job: Job, forge: Forge, row: Row) -> None:
    report = job.first.json
    assert report["changed"]
    made = {package["name"]: package["version"] for package in report["packages"]}
    assert made == {"causal-conv1d": "1.7.0", "mamba-ssm": row.mamba_ssm}
    all_pass_but_the_gpu(report["verify"])
    assert not row.bare or row.source == "conda" or report["host_compiler"].startswith("g++ of Debian")
    assert forge.listed() == forge.packages()
    assert len(forge.listed()) == 2


def test_the_class_prints(job: Job, forge: Forge, row: Row) -> None:
    done = forge("python", "--prefix", str(job.prefix), "-W", "ignore", "-c", _IMPORTS)
    assert done.stdout.strip() == _CLASS, done.stderr


@pytest.mark.variants("cu118")
def test_torchs_check_of_the_compiler_was_enforced_and_nothing_was_left_undefined(job: Job, forge: Forge) -> None:
    logs = sorted(forge.logs.glob("install-mamba-*.log"))
    text = "".join(log.read_text(encoding="utf-8") for log in logs)
    assert "torch: applied 2.0.1/0001-cuda-compiler-bounds.patch" in text
    assert "version bounds defined" not in text


@pytest.mark.variants("cu118")
def test_the_installed_torch_is_pristine(job: Job) -> None:
    """The build's patch reached neither the package cache nor an environment made from it."""
    (file,) = job.prefix.glob("lib/python3.10/site-packages/torch/utils/cpp_extension.py")
    assert "'11.8'" not in file.read_text(encoding="utf-8")


@pytest.mark.variants("cu118", "cu124", "cu130-conda")
def test_the_toolchain_fits_together(job: Job, forge: Forge, row: Row) -> None:
    require_sound_toolchain(forge("check-toolchain", *row.options, "--json"), row)


def _state(forge: Forge, job: Job) -> dict[str, int]:
    """What a command that does nothing leaves as it is."""
    files = [*forge.channel.rglob("*"), *forge.logs.iterdir(), *(job.prefix / "conda-meta").iterdir()]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_the_extensions_look_for_libraries_only_beside_themselves(job: Job) -> None:
    for name in EXTENSIONS.values():
        (extension,) = job.prefix.glob(f"lib/python*/site-packages/{name}.*.so")
        found = elf.rpaths(extension)
        assert found
        assert [path for entry in found for path in entry.split(":") if not path.startswith("$ORIGIN")] == []


def test_what_the_metadata_asks_for_is_there(job: Job) -> None:
    """As ``pip check`` finds it."""
    command = ["uv", "pip", "check", "--python", str(job.prefix / "bin/python")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.variants("cu118-conda", "cu130-conda")
def test_the_environment_is_the_locked_one_and_the_lock_fits(job: Job, forge: Forge, row: Row) -> None:
    done = forge("lock", "--check")
    assert done.returncode == 0, done.stderr
    locked = lock.environment(forge.workspace.lock, row.variant).records
    assert holds(job.prefix, locked)
    # Not one of conda-forge's own, which has another ABI than pytorch.org's.
    torch = package_installed.records(job.prefix)["pytorch"]
    assert torch.channel.rstrip("/").endswith("pytorch" if row.variant == "cu118" else "conda-forge")


@pytest.mark.nightly
@pytest.mark.variants("cu118-conda", "cu130-conda")
def test_the_bridge_gives_the_same_machine_code(job: Job, forge: Forge, row: Row, tmp_path: Path) -> None:
    bridge = Row(row.variant, row.python, row.arch, row.mamba_ssm, row.bare)
    before = {*forge.channel.glob("linux-64/*.conda")}
    done = forge("build", *bridge.options, "--cuda-arch", row.arch)
    assert done.returncode == 0, done.stderr[-3000:]
    for package in sorted({*forge.channel.glob("linux-64/*.conda")} - before):
        package_streaming.extract(package, tmp_path / package.name)
        (theirs,) = (tmp_path / package.name).glob("lib/python*/site-packages/*_cuda.*.so")
        found = gpu_code.compare_libraries(next(job.prefix.glob(f"lib/python*/site-packages/{theirs.name}")), theirs)
        assert not found.different
        assert not found.only_ours
        assert not found.only_theirs
        assert found.identical


def test_again_it_does_nothing_and_says_so(job: Job, forge: Forge, row: Row) -> None:
    before = _state(forge, job)
    done = forge(*_args(row))
    assert done.returncode == 0
    assert "Nothing to do" in done.stderr
    assert _state(forge, job) == before


def test_a_second_environment_comes_without_compiling(job: Job, forge: Forge, row: Row) -> None:
    prefix = forge.folder / "second"
    before = {path: path.stat().st_mtime_ns for path in forge.channel.rglob("*.conda")}
    done = forge(*_args(row, "--prefix", str(prefix), "--json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert {package["state"] for package in done.json["packages"]} == {"in channel"}
    assert "Building" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in forge.channel.rglob("*.conda")} == before
    shutil.rmtree(prefix)


def _linked(folder: Path) -> int:
    """Packages that an installation has linked so far; -1 before it began."""
    return max((len(list(half.glob("conda-meta/*.json"))) for half in folder.glob(".here.new-*")), default=-1)


@pytest.mark.parametrize(
    "packages",
    [1, *(pytest.param(n, marks=pytest.mark.nightly) for n in (0, 20, 55))],
)
def test_killed_while_installing_it_completes_when_started_again(
    job: Job, forge: Forge, row: Row, packages: int
) -> None:
    prefix = forge.folder / f"killed-{packages}" / "here"
    args = _args(row, "--prefix", str(prefix))
    _kill_when(forge.start(*args), lambda: _linked(prefix.parent) >= packages)
    assert not prefix.exists()
    done = forge(*args)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in prefix.parent.iterdir() if path.suffix != ".lock"] == ["here"]
    shutil.rmtree(prefix.parent)


def test_the_packages_work_elsewhere(job: Job, forge: Forge, row: Row, tmp_path: Path) -> None:
    """Copied to another channel and installed under another prefix, by the engine alone."""
    elsewhere = forge.folder / "a longer way/to another channel"
    (elsewhere / "linux-64").mkdir(parents=True)
    for package in forge.channel.glob("linux-64/*.conda"):
        shutil.copy(package, elsewhere / "linux-64")
    index(elsewhere)
    moved = forge.channel.rename(forge.folder / "gone")
    gone = job.prefix.rename(forge.folder / "gone-prefix")
    prefix = forge.folder / "another prefix"
    try:
        records = solve_prefix.solve_for_prefix(
            ["mamba-ssm", f"python {row.python}.*", "pip"],
            (elsewhere.as_uri(), *forge.channels),
            prefix=None,
            cuda=job.first.json["cuda"],
            archs=ArchList.parse(row.arch),
        )
        marker = install_marker.Installed(row.variant, row.python, row.source, (), created=True)
        with ui.open_log(tmp_path, "elsewhere") as log:
            install.install(records, prefix, marker, forge.workspace, log)
        done = forge("verify", "--prefix", str(prefix), "--json")
        assert done.returncode == 0, done.stdout
    finally:
        moved.rename(forge.channel)
        gone.rename(job.prefix)
        shutil.rmtree(prefix, ignore_errors=True)


@pytest.mark.parametrize("named", ["pytorch", "python", "cuda-version"])
def test_beside_a_wrong_torch_python_or_cuda_the_solver_refuses(job: Job, forge: Forge, row: Row, named: str) -> None:
    plan_of_it = job.first.json
    other = {"pytorch": f"<{plan_of_it['torch']}", "python": "3.9.*", "cuda-version": f"<{plan_of_it['cuda']}"}[named]
    channels = (forge.channel.as_uri(), *forge.channels)
    with pytest.raises(SolveError, match=named):
        solve_prefix.solve_for_prefix(
            ["mamba-ssm", f"{named} {other}"],
            channels,
            prefix=None,
            cuda=plan_of_it["cuda"],
            archs=ArchList.parse(row.arch),
        )


@pytest.mark.parametrize(
    ("project", "how"),
    [
        ("causal-conv1d", ("--no-cache",)),
        pytest.param("causal-conv1d", ("--jobs", "1"), marks=pytest.mark.nightly),
        pytest.param("mamba-ssm", ("--jobs", "1"), marks=pytest.mark.nightly),
    ],
    ids=["causal-conv1d compiled anew", "causal-conv1d with one job", "mamba-ssm with one job"],
)
def test_the_same_bytes_come_again_in_another_folder(
    job: Job, forge: Forge, project: str, how: tuple[str, ...]
) -> None:
    forge.reproduces(project, *how)


def test_the_kernel_references_and_checks_hold_on_the_cpu(job: Job, forge: Forge) -> None:
    """tests/unit/kernels, under the environment's own Python and torch; nothing of it is skipped."""
    tools = pytest_for(job.prefix, forge.folder / "pytest")
    environment = {k: v for k, v in os.environ.items() if k != "SSM_FORGE_TEST_SUMMARY"}
    done = subprocess.run(
        [job.prefix / "bin/python", "-m", "pytest", "tests/unit/kernels", "--strict-skips", "-p", "no:cacheprovider"],
        cwd=forge.root,
        # A tier of its own, in which no skip is expected.
        env={**environment, "PYTHONPATH": str(tools), "SSM_FORGE_TEST_TIER": "installed"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout.splitlines()[-1])
    assert re.search(r"\b\d\d+ passed", done.stdout)


@pytest.mark.nightly
@pytest.mark.variants("cu130")
def test_upstreams_flags_and_files_give_the_same_machine_code(job: Job, forge: Forge, row: Row, tmp_path: Path) -> None:
    """Of some files, one of them split here; `bench build --same-capability` compares all of them."""
    chosen = ("conv1d_fwd.cu", "conv1d_update.cu", "scan_fwd_fp32.cu", "scan_bwd_fp32_complex.cu")
    place = forge.workspace
    options = plan.Options(row.variant, row.python, row.arch, source=row.source, for_this_machine=False)
    with ui.open_log(tmp_path, "upstream") as log:
        prefix = baseline.environment(options, forge.folder / "toolchain", place, log)
        trees = baseline.sources(options, "same capability", forge.folder / "upstream", place)
        for tree in trees.values():
            lines = (tree / "setup.py").read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if '.cu",' not in line or any(f'{name}",' in line for name in chosen)]
            assert len(lines) - len(kept) >= 1
            (tree / "setup.py").write_text("".join(kept), encoding="utf-8")
        _, wheels = baseline.build(trees, prefix, row.arch, forge.folder / "wheels", log)
    assert len(wheels) == 2
    for wheel in wheels:
        (ours,) = job.prefix.glob(f"lib/python*/site-packages/{wheel.extension.name}")
        found = gpu_code.compare_libraries(ours, wheel.extension)
        assert not found.different
        assert not found.only_theirs
        assert found.same_encodings == len(found.identical) >= 100


def test_a_changed_byte_fails_verification_by_name(job: Job, forge: Forge) -> None:
    library = next(job.prefix.glob("lib/python*/site-packages/selective_scan_cuda.*.so"))
    original = library.read_bytes()
    # A hard link into the package cache: replaced, not written through.
    aside = library.rename(library.with_suffix(".aside"))
    library.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        done = forge("verify", "--prefix", str(job.prefix), "--json")
    finally:
        aside.replace(library)
    assert done.returncode == 9
    failed = {check["name"]: check["detail"] for check in done.json["checks"] if check["status"] == "fail"}
    assert library.name in failed["packages intact"]
