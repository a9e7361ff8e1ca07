"""The bundle: what goes in, what the other machine must have, what it does there."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
import zstandard

from ssm_forge.base.errors import UsageError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.bundle import main as bundle_main
from ssm_forge.bundle import write as bundle
from ssm_forge.verify import gpu

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBRARY = {"causal-conv1d": "causal_conv1d_cuda", "mamba-ssm": "selective_scan_cuda"}


def _tar(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return zstandard.compress(packed.getvalue())


def _package(folder: Path, name: str, *, torch: str = "2.11", lie: bool = False) -> Path:
    site = f"lib/python{MINOR}/site-packages"
    files = {
        f"{site}/{name.replace('-', '_')}/__init__.py": b"x = 1\n",
        f"{site}/{LIBRARY[name]}.cpython.so": name.encode() * 1000,
    }
    paths = [
        {"_path": p, "path_type": "hardlink", "sha256": hashlib.sha256(b"" if lie else d).hexdigest()}
        for p, d in files.items()
    ]
    depends = [
        f"python_abi {MINOR}.* *_cp",
        f"pytorch {torch}.* *cuda*",
        "cuda-version >=13,<14",
        "__glibc >=2.17",
    ]
    index = {"name": name, "version": "1.0", "build": "0", "depends": depends}
    info = {
        "info/index.json": json.dumps(index).encode(),
        "info/paths.json": json.dumps({"paths": paths}).encode(),
    }
    path = folder / f"{name}-1.0-0.conda"
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("metadata.json", "{}")
        package.writestr(f"pkg-{name}-1.0-0.tar.zst", _tar(files))
        package.writestr(f"info-{name}-1.0-0.tar.zst", _tar(info))
    return path


@pytest.fixture(scope="module")
def lent_pytest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lent")
    return gpu.lend_pytest(Workspace(folder, folder))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lent_pytest: Path) -> None:
    monkeypatch.setattr(bundle.gpu, "lend_pytest", lambda place: lent_pytest)
    tests = tmp_path / "sdist" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_x.py").write_text("def test_x(): pass\n")
    monkeypatch.setattr(gpu, "upstream_tests", lambda versions, place: dict.fromkeys(versions, tests))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    packages = [_package(tmp_path, name) for name in LIBRARY]
    return bundle.make(packages, {"upstream": packages}, tmp_path, workspace())


def test_the_name_says_what_it_fits(made: Path) -> None:
    assert made.name == f"ssm-forge-py{MINOR.replace('.', '')}-torch2.11-cuda13.pyz"


def test_everything_is_unpacked_and_every_file_is_the_packages_own(made: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(made) as opened:
        manifest = bundle_main.unpack(opened, tmp_path / "there")
    assert (tmp_path / f"there/prefix/lib/python{MINOR}/site-packages/mamba_ssm/__init__.py").is_file()
    assert (tmp_path / "there/src/ssm_forge/kernels/__main__.py").is_file()
    assert (tmp_path / "there/tests/causal-conv1d/tests/test_x.py").is_file()
    names = {path.name for path in (tmp_path / "there/others/upstream").iterdir()}
    assert names == {f"{library}.cpython.so" for library in LIBRARY.values()}
    assert manifest["needs"] == {"python": MINOR, "torch": "2.11", "cuda": "13", "glibc": "2.17"}


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    packages = [_package(tmp_path, "causal-conv1d"), _package(tmp_path, "mamba-ssm", lie=True)]
    made = bundle.make(packages, {}, tmp_path, workspace())
    with zipfile.ZipFile(made) as opened, pytest.raises(bundle_main.UnfitError, match="damaged"):
        bundle_main.unpack(opened, tmp_path / "there")


def test_packages_for_different_torches_are_refused(tmp_path: Path) -> None:
    packages = [_package(tmp_path, "causal-conv1d"), _package(tmp_path, "mamba-ssm", torch="2.5")]
    with pytest.raises(UsageError, match=r"different torch versions: 2\.11, 2\.5"):
        bundle.make(packages, {}, tmp_path, workspace())


def test_one_package_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one package of each"):
        bundle.make([_package(tmp_path, "mamba-ssm")], {}, tmp_path, workspace())


def test_nothing_is_left_of_a_bundle_that_grew_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MOST_BUNDLE_BYTES", 1000)
    with pytest.raises(UsageError, match="more than"):
        bundle.make([_package(tmp_path, name) for name in LIBRARY], {}, tmp_path, workspace())
    assert not list(tmp_path.glob("*.pyz")) and not list(tmp_path.glob(".*part"))


@pytest.mark.parametrize("text", ["upstream", "upstream=/no/such/path", "two words=."])
def test_another_build_is_named_by_a_label_and_a_path(text: str) -> None:
    with pytest.raises(UsageError, match="--also"):
        bundle.parse_others([text])


def _needs(**changed: str) -> dict[str, str]:
    return {"python": MINOR, "torch": "2.11", "cuda": "13", "glibc": "2.17", **changed}


@pytest.fixture
def _torch(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.setattr(bundle_main, "MODULES", ("json",))
    fake = types.ModuleType("torch")
    fake.__version__ = "2.11.0+cu130"
    fake.version = types.SimpleNamespace(cuda="13.0")
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not a glibc machine")
def test_a_machine_that_fits_has_no_problems(_torch: types.ModuleType) -> None:
    assert bundle_main.problems(_needs()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"python": "3.9"}, "for Python 3.9, this is"),
        ({"torch": "2.5"}, "for torch 2.5, this is 2.11.0"),
        ({"cuda": "12"}, "for CUDA 12, this torch is built for 13.0"),
        ({"glibc": "2.99"}, "need glibc 2.99 or newer"),
        ({"machine": "riscv64"}, "for linux riscv64, this is linux"),
    ],
)
def test_each_misfit_is_named_with_what_was_found(_torch: types.ModuleType, changed: dict[str, str], said: str) -> None:
    found = bundle_main.problems(_needs(**changed))
    assert len(found) == 1 and said in found[0]


def test_missing_modules_are_named(_torch: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_main, "MODULES", ("json", "no_such_module"))
    found = bundle_main.problems(_needs())
    assert len(found) == 1 and "import no_such_module, not installed" in found[0]


def test_a_torch_without_cuda_is_named(_torch: types.ModuleType) -> None:
    _torch.version = types.SimpleNamespace(cuda=None)
    assert "without CUDA" in bundle_main.problems(_needs())[0]


def test_a_misfit_stops_the_bundle_with_one_sentence_and_no_traceback(made: Path, tmp_path: Path) -> None:
    empty = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-S", str(made)],
        capture_output=True,
        text=True,
        env=empty,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == bundle_main.EXIT_UNFIT
    assert "torch does not import" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_step_that_leaves_no_result_is_a_failure(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "import sys; sys.exit(1)", "--output", str(tmp_path / "check.json")]
    document = bundle_main.run_step("check", line, {}, 600)
    assert [c["status"] for c in document["checks"]] == ["fail"]


def test_a_step_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_main, "GRACE_SECONDS", 0.5)
    line = [sys.executable, "-c", "import time; time.sleep(600)", "--output", str(tmp_path / "check.json")]
    document = bundle_main.run_step("check", line, {}, 0.5)
    assert "was stopped after 1 s, and left no result" in document["checks"][0]["detail"]


def test_timing_has_the_machine_for_itself_and_the_rest_runs_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step waits until all of its own kind have begun; the one that is timed sees nobody else begin or end."""
    script = """\
import json, sys, time
from pathlib import Path
result, step, *others = sys.argv[2:]
folder = Path(result).parent
before = sorted(path.name for path in folder.glob("*.begun")), sorted(path.name for path in folder.glob("*.json"))
(folder / f"{step}.begun").touch()
for _ in range(6000):
    after = sorted(path.name for path in folder.glob("*.begun"))
    if step not in others or {f"{other}.begun" for other in others} <= set(after):
        break
    time.sleep(0.01)
Path(result).write_text(json.dumps({"checks": [], "device": [before, after]}))
"""
    others = sorted(set(bundle_main.STEPS) - {bundle_main.ALONE})

    def arguments(step: str, folder: Path, output: Path, manifest: object, seconds: float) -> list[str]:
        return [sys.executable, "-c", script, "--output", str(output / f"{step}.json"), step, *others]

    monkeypatch.setattr(bundle_main, "arguments", arguments)
    manifest = {"needs": _needs(), "packages": [], "others": [], "tests": []}
    bundle_main.run_steps(list(bundle_main.STEPS), tmp_path, tmp_path, manifest, 3600)
    seen = {step: json.loads((tmp_path / f"{step}.json").read_text())["device"] for step in bundle_main.STEPS}
    alone = f"{bundle_main.ALONE}.begun"
    assert seen[bundle_main.ALONE] == [[[], []], [alone]]
    for step in others:
        (begun, written), after = seen[step]
        assert alone in begun
        assert f"{bundle_main.ALONE}.json" in written
        assert after == sorted(f"{each}.begun" for each in bundle_main.STEPS)


def test_without_time_nothing_passes(tmp_path: Path) -> None:
    manifest = {"needs": _needs(), "packages": [], "others": [], "tests": []}
    summary = bundle_main.run_steps(list(bundle_main.STEPS), tmp_path, tmp_path, manifest, 1)
    assert {c["status"] for checks in summary["steps"].values() for c in checks} == {"not-run"}
    assert bundle_main.exit_code(summary, allow_missing_gpu=False) == bundle_main.EXIT_NOT_RUN
