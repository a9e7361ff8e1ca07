"""From nothing to working CUDA 13 kernels, and everything a user may do after that."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from forge_run import ARCH, REBUILDS, ROOT, Forge, statuses
from ssm_forge.arch import ArchList

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

VARIANT = "cu130"


def _args(forge: Forge, *more: str) -> tuple[str, ...]:
    prefix = forge.folder / VARIANT
    base = ("install-mamba", "--variant", VARIANT, "--cuda-arch", ARCH, "--source", "bridge")
    return (*base, "--prefix", str(prefix), *more)


def _kill(forge: Forge, seconds: float, *args: str) -> None:
    process = forge.start(*args)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _listed(channel: Path) -> set[str]:
    index = channel / "linux-64/repodata.json"
    return set(json.loads(index.read_text())["packages.conda"]) if index.exists() else set()


def _kill_when_said(forge: Forge, words: str, *args: str) -> None:
    """Kill it half a minute after it said ``words``, however long what came before took."""
    process = forge.start(*args)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if words in line:
            break
    else:
        pytest.fail(f"'{words}' was never said: {''.join(said)[-3000:]}")
    time.sleep(30)
    assert process.poll() is None, "it was done before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_killed_while_building_nothing_reaches_the_channel(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    # With a warm compile cache there would be a package before anyone can kill its build.
    monkeypatch.setenv("SSM_FORGE_CCACHE", "off")
    _kill_when_said(forge, "Building causal-conv1d", *_args(forge))
    assert not list(forge.channel.glob("linux-64/*.conda"))
    assert not _listed(forge.channel)
    assert not (forge.folder / VARIANT).exists()


def test_one_command_ends_in_verified_kernels(forge: Forge) -> None:
    done = forge(*_args(forge, "--json"))
    assert done.returncode == 0, done.stderr[-3000:]
    report = done.json
    assert report["changed"]
    assert [p["name"] for p in report["packages"]] == ["causal-conv1d", "mamba-ssm"]
    found = statuses(report["verify"])
    assert found.pop("kernels on the GPU", "not-run") in ("not-run", "pass")
    assert len(found) >= 12
    assert set(found.values()) == {"pass"}, report["verify"]
    assert _listed(forge.channel) == {path.name for path in forge.channel.glob("linux-64/*.conda")}
    assert len(_listed(forge.channel)) == 2


def test_the_class_prints(forge: Forge) -> None:
    code = "import torch, causal_conv1d_cuda, selective_scan_cuda, mamba_ssm; print(mamba_ssm.Mamba)"
    done = forge("python", "--prefix", str(forge.folder / VARIANT), "-c", code)
    assert done.stdout.strip() == "<class 'mamba_ssm.modules.mamba_simple.Mamba'>", done.stderr


def test_again_it_does_nothing_and_says_so(forge: Forge) -> None:
    done = forge(*_args(forge))
    assert done.returncode == 0
    assert "Nothing to do" in done.stderr
    assert done.seconds < 5


def test_a_deleted_environment_comes_back_without_compiling(forge: Forge) -> None:
    shutil.rmtree(forge.folder / VARIANT)
    done = forge(*_args(forge, "--json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p["state"] for p in done.json["packages"]} == {"in channel"}
    assert "Building" not in done.stderr
    assert done.seconds < 60


@pytest.mark.parametrize("seconds", [2.0, 4.0, 6.0, 9.0])
def test_killed_while_installing_it_completes_when_started_again(forge: Forge, seconds: float) -> None:
    prefix = forge.folder / VARIANT
    shutil.rmtree(prefix, ignore_errors=True)
    _kill(forge, seconds, *_args(forge))
    if prefix.exists():
        # It is there whole, or not at all: never half.
        done = forge("verify", "--prefix", str(prefix), "--json")
        assert done.returncode == 0, done.stdout
    done = forge(*_args(forge))
    assert done.returncode == 0, done.stderr[-3000:]
    leftovers = [path for path in prefix.parent.glob(f".{VARIANT}.*") if path.suffix != ".lock"]
    assert not leftovers


def test_the_packages_work_elsewhere(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copied to another channel and installed under another prefix, by the engine alone."""
    from ssm_forge import install, ui
    from ssm_forge.paths import workspace

    elsewhere = forge.folder / "a longer way/to another channel"
    (elsewhere / "linux-64").mkdir(parents=True)
    for package in forge.channel.glob("linux-64/*.conda"):
        shutil.copy(package, elsewhere / "linux-64")
    from ssm_forge.channel import index

    index(elsewhere)
    moved = forge.channel.rename(forge.folder / "gone")
    gone = (forge.folder / VARIANT).rename(forge.folder / "gone-prefix")
    try:
        prefix = forge.folder / "another prefix"
        channels = (elsewhere.as_uri(), (workspace().bridge / VARIANT).as_uri())
        records = install.solve_for_prefix(
            ["mamba-ssm", "python 3.12.*", "pip"], channels, prefix=None, cuda="13.0", archs=ArchList.parse(ARCH)
        )
        marker = install.Installed(VARIANT, "3.12", "bridge", (), created=True)
        with ui.open_log(tmp_path_factory.mktemp("logs"), "elsewhere") as log:
            install.install(records, prefix, marker, workspace(), log)
        done = forge("verify", "--prefix", str(prefix), "--json")
        assert done.returncode == 0, done.stdout
    finally:
        moved.rename(forge.channel)
        gone.rename(forge.folder / VARIANT)


@pytest.mark.parametrize(
    ("beside", "named"),
    [("pytorch <2.11", "pytorch"), ("python 3.11.*", "python"), ("cuda-version <13", "cuda-version")],
)
def test_beside_a_wrong_torch_python_or_cuda_the_solver_refuses(forge: Forge, beside: str, named: str) -> None:
    from ssm_forge import install
    from ssm_forge.errors import SolveError
    from ssm_forge.paths import workspace

    channels = (forge.channel.as_uri(), (workspace().bridge / VARIANT).as_uri())
    with pytest.raises(SolveError, match=named):
        install.solve_for_prefix(["mamba-ssm", beside], channels, prefix=None, cuda="13.0", archs=ArchList.parse(ARCH))


@pytest.mark.parametrize(("project", "how"), REBUILDS)
def test_the_same_bytes_come_again_in_another_folder(forge: Forge, project: str, how: tuple[str, ...]) -> None:
    """With one job and what the compile cache has, and compiled anew."""
    forge.reproduces(project, *how)


def test_the_kernel_references_and_checks_hold_on_the_cpu(forge: Forge) -> None:
    """The references agree with each other, and every injected fault is caught, under the environment's torch."""
    python = forge.folder / VARIANT / "bin/python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(
        [python, "-m", "ssm_forge.kernels", "selftest"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_upstreams_flags_and_files_give_the_same_machine_code(forge: Forge, tmp_path: Path) -> None:
    """Of some files, one of them split here; `bench build --same-capability` compares all of them."""
    from ssm_forge import build_baseline, plan, sass, ui
    from ssm_forge.paths import workspace

    chosen = ("conv1d_fwd.cu", "conv1d_update.cu", "scan_fwd_fp32.cu", "scan_bwd_fp32_complex.cu")
    place = workspace()
    options = plan.Options(VARIANT, "3.12", ARCH, source="bridge", for_this_machine=False)
    with ui.open_log(tmp_path, "upstream") as log:
        prefix = build_baseline.environment(options, forge.folder / "toolchain", place, log)
        trees = build_baseline.sources(options, "same capability", forge.folder / "upstream", place)
        for tree in trees.values():
            lines = (tree / "setup.py").read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if '.cu",' not in line or any(f'{name}",' in line for name in chosen)]
            assert len(lines) - len(kept) >= 1
            (tree / "setup.py").write_text("".join(kept), encoding="utf-8")
        _, wheels = build_baseline.build(trees, prefix, ARCH, forge.folder / "wheels", log)
    for wheel in wheels:
        (ours,) = (forge.folder / VARIANT).glob(f"lib/python*/site-packages/{wheel.extension.name}")
        found = sass.compare_libraries(ours, wheel.extension)
        assert not found.different
        assert not found.only_theirs
        assert found.same_encodings == len(found.identical) >= 100


def test_a_changed_byte_fails_verification_by_name(forge: Forge) -> None:
    prefix = forge.folder / VARIANT
    library = next(prefix.glob("lib/python*/site-packages/selective_scan_cuda.*.so"))
    original = library.read_bytes()
    # A hard link into the package cache: replaced, not written through.
    library.unlink()
    library.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    done = forge("verify", "--prefix", str(prefix), "--json")
    assert done.returncode == 9
    failed = {c["name"]: c["detail"] for c in done.json["checks"] if c["status"] == "fail"}
    assert library.name in failed["packages intact"]
