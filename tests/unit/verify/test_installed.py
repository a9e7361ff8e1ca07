"""Every check of an installed environment can fail, and says what it found."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from front_door import assert_one_line_error, run_here
from ssm_forge.base import machine
from ssm_forge.base.arch import Capability
from ssm_forge.base.errors import InstallError
from ssm_forge.base.machine import Gpu
from ssm_forge.install.marker import MARKER, Installed, write_marker
from ssm_forge.package import libraries as elf
from ssm_forge.package.installed import InstalledPath
from ssm_forge.verify import installed as verify
from ssm_forge.verify import report as verify_report

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"lib/python{PYTHON}/site-packages"
INCLUDE = Path(sysconfig.get_paths()["include"].replace(sys.prefix, sys.base_prefix))
EXTENSIONS = {"causal-conv1d": "causal_conv1d_cuda", "mamba-ssm": "selective_scan_cuda"}
BUILD = f"cuda130_py{PYTHON.replace('.', '')}_sm90_h0123456_0"

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or not (INCLUDE / "Python.h").exists(),
    reason="no gcc or no Python.h on this machine to make an extension with",
)


def compile_extension(prefix: Path, name: str, code: str = "", *options: str) -> Path:
    path = prefix / SITE / f"{name}.cpython-x.so"
    source = prefix / f"{name}.c"
    source.write_text(
        f'#include <Python.h>\n{code}\nstatic struct PyModuleDef m = {{PyModuleDef_HEAD_INIT, "{name}", 0, -1, 0}};\n'
        f"PyMODINIT_FUNC PyInit_{name}(void) {{ return PyModule_Create(&m); }}\n"
    )
    command: list[str | Path] = ["gcc", "-shared", "-fPIC", "-w", f"-I{INCLUDE}", source, "-o", path, *options]
    subprocess.run(command, check=True, capture_output=True)
    source.unlink()
    # The name that this Python imports.
    return path.rename(path.with_name(f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"))


def write_record(prefix: Path, name: str, files: list[str], **changes: object) -> None:
    paths = [
        {"_path": file, "path_type": "hardlink", "sha256": hashlib.sha256((prefix / file).read_bytes()).hexdigest()}
        for file in files
    ]
    record = {
        "name": name,
        "version": "1.0",
        "build": BUILD,
        "depends": ["__glibc >=2.30,<3.0.a0"],
        "paths_data": {"paths": paths},
        **changes,
    }
    (prefix / f"conda-meta/{name}-1.0-{BUILD}.json").write_text(json.dumps(record))


def record_all(prefix: Path, **changes: object) -> None:
    for project, extension in EXTENSIONS.items():
        library = next((prefix / SITE).glob(f"{extension}.*"))
        files = [f"{SITE}/{library.name}", f"{SITE}/{project.replace('-', '_')}/__init__.py"]
        write_record(prefix, project, files, **changes)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("verify") / "prefix"
    venv.create(prefix, symlinks=True)
    (prefix / "conda-meta").mkdir()
    for shared in Path(sys.base_prefix, "lib").glob("libpython3*.so.1.0"):
        shutil.copy(shared, prefix / "lib")
    for name in ("torch", "causal_conv1d", "mamba_ssm"):
        (prefix / SITE / name).mkdir()
        (prefix / SITE / name / "__init__.py").write_text("__version__ = '1.0'\n")
    for extension in EXTENSIONS.values():
        compile_extension(prefix, extension)
    record_all(prefix)
    write_marker(prefix, Installed("cu130", PYTHON, "bridge", (), created=True))
    return prefix


def holds(monkeypatch: pytest.MonkeyPatch, folder: Path, sass: str) -> None:
    """Make cuobjdump say that every library holds ``sass``."""
    tool = folder / "cuobjdump"
    tool.write_text(f'#!/bin/sh\n[ "$1" = --list-elf ] && echo "ELF file    1: x.1.sm_{sass}.cubin"\nexit 0\n')
    tool.chmod(0o755)
    monkeypatch.setattr(elf, "cuobjdump", lambda: tool)


@pytest.fixture
def prefix(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a sound environment, on a machine without a GPU."""
    copy = tmp_path / "prefix"
    shutil.copytree(pristine, copy, symlinks=True)
    monkeypatch.setattr(machine, "gpus", lambda: ())
    monkeypatch.delenv("PYTHONPATH", raising=False)
    holds(monkeypatch, tmp_path, "90")
    return copy


def failures(prefix: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify.verify(prefix).failed}


def test_a_sound_environment_passes_and_the_gpu_is_not_run(prefix: Path) -> None:
    report = verify.verify(prefix)
    assert report.failed == ()
    assert report.as_dict()["counts"] == {"pass": 14, "fail": 0, "not-run": 1}
    (gpu,) = [check for check in report.checks if check.status == "not-run"]
    assert gpu.name == "kernels on the GPU"
    assert "no NVIDIA GPU" in gpu.detail


def test_a_package_that_was_removed_names_the_command_that_brings_it_back(prefix: Path) -> None:
    next((prefix / "conda-meta").glob("mamba-ssm-*.json")).unlink()
    found = failures(prefix)
    assert "mamba-ssm not installed" in found["packages intact"]
    assert "something removed them since" in found["packages intact"]
    assert "install-mamba --variant cu130" in found["packages intact"]
    assert "selective_scan_cuda: library" in found


def test_a_prefix_that_is_not_ours_is_not_told_that_something_was_removed(prefix: Path) -> None:
    (prefix / MARKER).unlink()
    next((prefix / "conda-meta").glob("mamba-ssm-*.json")).unlink()
    assert "removed" not in failures(prefix)["packages intact"]


def test_a_changed_and_a_missing_file_are_named(prefix: Path) -> None:
    (prefix / SITE / "mamba_ssm/__init__.py").write_text("changed = 1\n")
    assert failures(prefix) == {"packages intact": f"changed or missing: {SITE}/mamba_ssm/__init__.py"}
    (prefix / SITE / "mamba_ssm/__init__.py").unlink()
    assert f"{SITE}/mamba_ssm/__init__.py" in failures(prefix)["packages intact"]


def test_a_file_with_the_prefix_in_it_is_compared_with_what_was_written(prefix: Path) -> None:
    file = prefix / "where.txt"
    file.write_text("/prefix\n")
    entry = InstalledPath("where.txt", "hardlink", "0" * 64, "", placeholder=True)
    assert verify._changed_files([entry], prefix) == []
    written = hashlib.sha256(file.read_bytes()).hexdigest()
    assert verify._changed_files([entry._replace(sha256_in_prefix=written)], prefix) == []
    file.write_text("/other\n")
    assert verify._changed_files([entry._replace(sha256_in_prefix=written)], prefix) == ["where.txt"]


def test_an_import_error_is_shown_and_the_others_still_run(prefix: Path) -> None:
    (prefix / SITE / "torch/__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    assert failures(prefix) == {"import torch": "ImportError: libcudart.so.13: cannot open"}


def test_a_crash_at_import_is_shown(prefix: Path) -> None:
    (prefix / SITE / "torch/__init__.py").write_text("import os; os.kill(os.getpid(), 11)\n")
    found = failures(prefix)
    assert found["import torch"] == "Python ended with -11: no output"
    assert len([name for name in found if name.startswith("import")]) == 5


def test_an_import_from_elsewhere_is_no_pass(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other/torch"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    (prefix / SITE / "other.pth").write_text(f"import sys; sys.path.insert(0, {str(other.parent)!r})\n")
    assert failures(prefix)["import torch"].startswith("imported from outside the environment")


def test_an_undefined_symbol_fails(prefix: Path) -> None:
    compile_extension(prefix, "causal_conv1d_cuda", "int gone(void); int f(void) { return gone(); }")
    record_all(prefix)
    found = failures(prefix)
    assert found["causal_conv1d_cuda: libraries and symbols"] == "undefined symbol gone"
    assert "undefined symbol: gone" in found["import causal_conv1d_cuda"]


def test_a_path_of_the_build_machine_fails(prefix: Path, tmp_path: Path) -> None:
    compile_extension(prefix, "causal_conv1d_cuda", "", f"-Wl,-rpath,{tmp_path}/build")
    record_all(prefix)
    found = failures(prefix)["causal_conv1d_cuda: libraries and symbols"]
    assert found == f"rpath {tmp_path}/build is a path of the build machine"


def test_a_library_outside_the_prefix_fails(prefix: Path, tmp_path: Path) -> None:
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", tmp_path / "libout.so"],
        input=b"int out(void) {return 1;}",
        check=True,
    )
    compile_extension(
        prefix,
        "causal_conv1d_cuda",
        "int out(void); int f(void) { return out(); }",
        f"-L{tmp_path}",
        "-lout",
        "-Wl,-rpath,$ORIGIN/../../../..",
    )
    record_all(prefix)
    # It imports: only the look at its libraries tells that this works on this machine alone.
    ((name, detail),) = failures(prefix).items()
    assert name == "causal_conv1d_cuda: libraries and symbols"
    said = re.fullmatch(r"libout\.so \((.+)\) is outside the prefix", detail)
    assert said, detail
    assert Path(said[1]).resolve() == tmp_path / "libout.so"


def test_other_gpu_code_than_claimed_fails(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(monkeypatch, tmp_path, "80")
    assert failures(prefix) == {
        "causal_conv1d_cuda: GPU code": "claimed sm90, found sm80",
        "selective_scan_cuda: GPU code": "claimed sm90, found sm80",
    }


@pytest.mark.parametrize(
    ("build", "ours", "status", "detail"),
    [
        ("cuda130_py312_sm90_h0000000_5", True, "pass", "this project's"),
        ("cuda130_py312_sm90_h0000000_5", False, "pass", "upstream's"),
        ("upstream_cuda130_py312_sm90_h0000000_5", False, "pass", "claimed upstream's as they are, found upstream's"),
        (
            "upstream_cuda130_py312_sm90_h0000000_5",
            True,
            "fail",
            "claimed upstream's as they are, found this project's",
        ),
    ],
)
def test_whose_kernels_a_package_has_is_shown_and_compared_with_its_name(
    prefix: Path, build: str, ours: bool, status: str, detail: str
) -> None:
    compile_extension(prefix, "selective_scan_cuda", 'const char *name = "SSM_FORGE_KERNELS";' if ours else "")
    record_all(prefix, build=build)
    found = next(check for check in verify.verify(prefix).checks if check.name == "selective_scan_cuda: kernels")
    assert (found.status, found.detail) == (status, detail)


def test_a_build_string_that_claims_nothing_fails(prefix: Path) -> None:
    record_all(prefix, build="py312_0")
    assert "names no compute capability; the binary has sm90" in failures(prefix)["causal_conv1d_cuda: GPU code"]


@pytest.mark.parametrize(
    ("depends", "expected"),
    [(["__glibc >=2.2,<3.0.a0"], "needs 2.2.5, declares 2.2"), ([], "needs 2.2.5, and the package declares nothing")],
)
def test_a_glibc_that_is_not_declared_fails(prefix: Path, depends: list[str], expected: str) -> None:
    record_all(prefix, depends=depends)
    assert failures(prefix)["causal_conv1d_cuda: glibc"].startswith(expected)


@pytest.mark.parametrize(
    ("answer", "status", "detail"),
    [
        ('{"checks": [{"name": "scan fp32", "status": "pass", "detail": "ok"}]}', "pass", "ok"),
        ('{"checks": [{"name": "scan fp32", "status": "fail", "detail": "off by 3"}]}', "fail", "off by 3"),
        ("no json", "fail", "no answer"),
        ("{}", "fail", "no answer"),
    ],
)
def test_with_a_gpu_the_kernels_own_answer_counts(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: str, detail: str
) -> None:
    (check,) = checks_of_a_gpu(prefix, monkeypatch, answer)
    assert (check.status, detail in check.detail) == (status, True)


def checks_of_a_gpu(prefix: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> list[verify.Check]:
    """On a machine with a GPU, in an environment whose Python answers that."""
    monkeypatch.setattr(machine, "gpus", lambda: (Gpu("H200", Capability(9, 0), "535.183.01"),))
    python = prefix / "bin/python"
    python.unlink()
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    return verify.gpu_checks(prefix / "bin/python", {})


_NOTHING_RAN = (
    '{"checks": [{"name": "scan fp32", "status": "not-run", "detail": "the NVIDIA driver is too old"}, '
    '{"name": "scan fp16", "status": "not-run", "detail": "the NVIDIA driver is too old"}]}'
)


def test_a_gpu_that_the_environments_torch_can_not_use_is_a_failure(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (check,) = checks_of_a_gpu(prefix, monkeypatch, _NOTHING_RAN)
    assert check.status == "fail"
    assert "nvidia-smi lists H200 (9.0, driver 535.183.01)" in check.detail
    assert "the NVIDIA driver is too old" in check.detail


def test_a_gpu_that_somebody_has_hidden_is_not_run(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (check,) = checks_of_a_gpu(prefix, monkeypatch, _NOTHING_RAN)
    assert (check.status, "CUDA_VISIBLE_DEVICES hides" in check.detail) == ("not-run", True)


def test_what_one_gpu_can_not_run_does_not_hide_what_ran(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = json.dumps({"checks": [{"name": s, "status": s, "detail": ""} for s in ("not-run", "pass")]})
    assert [check.status for check in checks_of_a_gpu(prefix, monkeypatch, ran)] == ["not-run", "pass"]


def test_a_python_that_can_not_be_started_fails_every_import(prefix: Path) -> None:
    (prefix / "bin/python").unlink()
    assert {f"import {name}" for name in verify._IMPORTS} <= set(failures(prefix))


def test_the_report_is_shown_without_reading_markup_in_it(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_report.show(verify_report.Report(Path("/[bold]x"), (verify_report.Check("a", "fail", "[/red] [b]"),)))
    said = capsys.readouterr().out
    assert "/[bold]x" in said
    assert "[/red] [b]" in said
    assert "0 passed, 1 failed, 0 not run" in said


def test_a_prefix_has_to_be_an_environment(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match="is not a conda environment"):
        verify.choose_prefix(tmp_path)


def test_the_command_line_fails_with_json_alone_on_stdout(prefix: Path) -> None:
    (prefix / SITE / "mamba_ssm/__init__.py").unlink()
    done = run_here("verify", "--prefix", str(prefix), "--json")
    assert done.returncode == 9
    report = json.loads(done.stdout)
    assert "packages intact" in [check["name"] for check in report["checks"] if check["status"] == "fail"]


def test_the_command_line_says_what_is_no_environment(tmp_path: Path) -> None:
    done = run_here("verify", "--prefix", str(tmp_path))
    assert_one_line_error(done, 8, "is not a conda environment", "install-mamba")
