"""Really broken environments: doctor names the right cause first, and healthy ones give nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import broken_environments as make
from broken_environments import SUFFIX, VERSION, Made, Source
from ssm_forge.doctor import diagnosis, system
from ssm_forge.doctor.diagnosis import Diagnosis
from ssm_forge.doctor.findings import Finding


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture
def env(tmp_path: Path, libraries: Path) -> Made:
    return make.healthy(tmp_path, libraries)


@pytest.fixture
def bare(tmp_path: Path, libraries: Path) -> Made:
    return make.bare(tmp_path, libraries)


def examine(made: Made, place: Path | None = None, seconds: float = 120) -> Diagnosis:
    told = diagnosis.of_environment(place or made.prefix, made.variables, made.folder, seconds=seconds)
    json.dumps([one.as_dict() for one in told.findings])
    return told


def codes(made: Made) -> list[str]:
    return [one.code for one in examine(made).findings]


def first(made: Made) -> Finding:
    return examine(made).findings[0]


def said(one: Finding) -> str:
    return " | ".join(one.evidence)


# The kernels


def test_a_pure_python_wheel_has_no_kernels(env: Made) -> None:
    (env.site / f"selective_scan_cuda{SUFFIX}").unlink()
    (env.site / "mamba_ssm-2.2.4.dist-info/WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
    (env.site / "mamba_ssm/ops/selective_scan_interface.py").write_text(
        "try:\n    import selective_scan_cuda\nexcept ImportError:\n    selective_scan_cuda = None\n"
        "def selective_scan_fn(*tensors): return None\n"
    )
    one = first(env)
    assert one.code == "kernels-missing"
    assert "SKIP_CUDA_BUILD" in said(one)
    assert "catches the ImportError" in said(one)
    assert [one.code for one in examine(env).findings if one.severity != "hint"] == ["kernels-missing"]


def test_kernels_for_another_python_are_named(env: Made) -> None:
    for module in ("causal_conv1d_cuda", "selective_scan_cuda"):
        (env.site / f"{module}{SUFFIX}").rename(env.site / f"{module}.cpython-27-x86_64-linux-gnu.so")
    one = first(env)
    assert one.code == "other-python"
    assert f"cpython-27-x86_64-linux-gnu.so; Python here is {VERSION}" in said(one)
    assert "kernels-missing" not in codes(env)


def test_what_is_not_installed_is_said(bare: Made) -> None:
    make.torch(bare)
    one = first(bare)
    assert one.code == "not-installed"
    assert "causal-conv1d: not in" in said(one)
    assert "mamba-ssm: not in" in said(one)


@pytest.mark.parametrize("keep", [0, 40, 900, 5000])
def test_a_library_cut_short_is_damaged(env: Made, keep: int) -> None:
    path = env.site / f"selective_scan_cuda{SUFFIX}"
    path.write_bytes(path.read_bytes()[:keep])
    one = first(env)
    assert one.code == "damaged-library"
    assert path.name in said(one)


def test_a_library_of_torch_that_is_no_library(env: Made) -> None:
    (env.site / "torch/lib/libc10.so").write_text("version https://git-lfs.github.com/spec/v1\n")
    one = first(env)
    assert (one.code, "libc10.so is no ELF file" in said(one)) == ("damaged-library", True)


def test_kernels_of_another_torch_are_named_with_that_torch(bare: Made) -> None:
    make.torch(bare)
    make.kernels(bare, (make.SET_DEVICE["2.2"], make.FAIL_OLD))
    one = first(bare)
    assert one.code == "other-torch"
    assert "undefined symbol _ZN3c104cuda9SetDeviceEi" in said(one)
    assert "c10::cuda::SetDevice" in said(one)
    assert "built for torch 2.1 to 2.2; installed is torch 2.5.1+cu124" in said(one)
    assert "import selective_scan_cuda: ImportError" in said(one)
    assert "cxx11-abi" not in codes(bare)


def test_another_abi_is_named(bare: Made) -> None:
    make.torch(bare)
    make.kernels(bare, (make.SET_DEVICE["2.5"], make.FAIL_NEW))
    one = first(bare)
    assert one.code == "cxx11-abi"
    assert "new C++11 ABI, torch 2.5.1+cu124 the old one" in said(one)
    assert "other-torch" not in codes(bare)


def test_a_newer_glibc_is_named(env: Made) -> None:
    libc = Source(defines=("from_a_newer_libc",), soname="libc.so.6", version="GLIBC_2.99")
    env.extension(Source(module="selective_scan_cuda", needs=("from_a_newer_libc",), against=(libc,)))
    one = first(env)
    assert one.code == "glibc-too-old"
    assert "needs GLIBC 2.99; this system has 2." in said(one)


def test_an_older_libstdcxx_first_is_named(env: Made) -> None:
    new, old = (
        Source(defines=("from_libstdcxx",), soname="libstdc++.so.6", version=f"GLIBCXX_{v}")
        for v in ("3.4.99", "3.4.1")
    )
    env.extension(Source(module="selective_scan_cuda", needs=("from_libstdcxx",), against=(new,)))
    folder = env.home / "old"
    folder.mkdir()
    shutil.copy(make.library(old, env.libraries), folder / "libstdc++.so.6")
    env.variables["LD_LIBRARY_PATH"] = str(folder)
    one = first(env)
    assert one.code == "libstdcxx-too-old"
    assert f"needs GLIBCXX_3.4.99; {folder}/libstdc++.so.6 offers 3.4.1" in said(one)


def test_another_cuda_major_is_named(env: Made) -> None:
    cudart = Source(defines=("cudaMalloc",), soname="libcudart.so.11.0")
    env.extension(Source(module="selective_scan_cuda", needs=("cudaMalloc",), against=(cudart,)))
    one = first(env)
    assert one.code == "cuda-runtime-missing"
    assert "needs libcudart.so.11.0; torch 2.5.1+cu124 brings CUDA 12.4" in said(one)


def test_a_source_checkout_in_front_is_named(env: Made) -> None:
    checkout = env.home / "mamba"
    shutil.copytree(env.site / "mamba_ssm", checkout / "mamba_ssm")
    env.variables["PYTHONPATH"] = str(checkout)
    one = first(env)
    assert one.code == "shadowed"
    assert f"import mamba_ssm takes {checkout}/mamba_ssm, installed is {env.site}/mamba_ssm (2.2.4)" in said(one)


def test_a_file_of_the_same_name_in_the_working_folder_is_named(env: Made) -> None:
    (env.folder / "mamba_ssm.py").write_text("from mamba_ssm import Mamba\n")
    assert first(env).code == "shadowed"


def test_a_fork_that_pypis_package_shadows_is_named(env: Made) -> None:
    (env.folder / "models").mkdir()
    (env.folder / "models/vim.py").write_text("layer = Mamba(d_model, bimamba_type='v2')\n")
    one = first(env)
    assert one.code == "fork-shadowed"
    assert "vim.py calls Mamba(bimamba_type=...)" in said(one)


def test_two_causes_are_both_named(env: Made) -> None:
    (env.site / f"selective_scan_cuda{SUFFIX}").write_bytes(b"\x7fELF")
    env.extension(Source(module="causal_conv1d_cuda", needs=(make.SET_DEVICE["2.9"],)))
    assert codes(env)[:2] == ["damaged-library", "other-torch"]


# torch and packages


def test_no_torch(bare: Made) -> None:
    make.kernels(bare)
    assert first(bare).code == "torch-missing"
    assert "other-torch" not in codes(bare)


def test_a_torch_without_cuda(bare: Made) -> None:
    make.torch(bare, "2.5.1+cpu", "")
    make.kernels(bare)
    assert codes(bare)[0] == "torch-cpu"


def test_pips_torch_over_condas(env: Made) -> None:
    (env.prefix / "conda-meta").mkdir()
    (env.prefix / "conda-meta/pytorch-2.4.0-cuda120_py311_0.json").write_text("{}")
    one = first(env)
    assert one.code == "torch-twice"
    assert "pytorch 2.4.0 (cuda120_py311_0) of conda" in said(one)


def test_a_second_torch_on_pythonpath(env: Made) -> None:
    other = env.home / "packages"
    make.write_distribution(other, "torch", "2.9.0")
    env.variables["PYTHONPATH"] = str(other)
    assert first(env).code == "torch-twice"


def test_functions_that_do_not_fit_are_named(env: Made) -> None:
    calls = "import causal_conv1d_cuda\ndef f(x, w): return causal_conv1d_cuda.causal_conv1d_fwd(x, w, None, True)\n"
    env.package("mamba_ssm", {"ops/old.py": calls})
    one = first(env)
    assert one.code == "kernel-signature"
    assert "causal_conv1d_cuda.causal_conv1d_fwd with 4 arguments, the installed causal_conv1d itself with 8" in said(
        one
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from causal_conv1d.cpp_functions import causal_conv1d_fwd_function\n", "imports causal_conv1d.cpp_functions"),
        ("from causal_conv1d import causal_conv1d_update\n", "imports causal_conv1d_update"),
        ("from causal_conv1d import causal_conv1d_fn\ncausal_conv1d_fn(1, 2, initial_states=3)\n", "initial_states="),
    ],
)
def test_names_that_the_installed_causal_conv1d_lacks_are_named(env: Made, source: str, expected: str) -> None:
    env.package("mamba_ssm", {"ops/new.py": source})
    one = first(env)
    assert one.code == "kernel-signature"
    assert expected in said(one)


def test_transformers_5_with_an_old_mamba(env: Made) -> None:
    env.package(
        "transformers", {"__init__.py": "", "generation/__init__.py": "class GenerateDecoderOnlyOutput: pass\n"}
    )
    env.distribution("transformers", "5.1.0")
    uses = "from transformers.generation import GreedySearchDecoderOnlyOutput\n"
    env.package("mamba_ssm", {"utils/generation.py": uses})
    one = first(env)
    assert one.code == "transformers-too-new"
    assert "which the installed transformers.generation lacks" in said(one)


def test_requirements_that_are_not_met_are_a_warning(env: Made) -> None:
    env.distribution("triton", "3.2.0")
    env.package("triton", {"__init__.py": ""})
    shutil.rmtree(env.site / "mamba_ssm-2.2.4.dist-info")
    env.distribution("mamba-ssm", "2.3.2.post1", requires=["torch>=2.1", "triton>=3.5.0", "foo>=9; extra == 'x'"])
    told = examine(env)
    assert [(one.code, one.severity) for one in told.findings] == [("requirement-conflict", "warning")]
    assert said(told.findings[0]) == "mamba-ssm 2.3.2.post1 requires triton>=3.5.0, installed is 3.2.0"
    assert not told.broken


def test_numpy_2_beside_an_old_torch(bare: Made) -> None:
    make.torch(bare, "2.2.2+cu121", "12.1")
    make.kernels(bare)
    bare.distribution("numpy", "2.1.0")
    assert codes(bare) == ["numpy-2"]


# GPU and driver


@pytest.mark.parametrize(
    ("code", "gpu", "expected"),
    [
        (
            [("sass", 80, (0, 0)), ("sass", 90, (0, 0))],
            ("NVIDIA GeForce RTX 5090", "12.0", "580.65"),
            "no-kernel-image",
        ),
        ([("sass", 86, (0, 0))], ("NVIDIA A100", "8.0", "580.65"), "no-kernel-image"),
        ([("sass", 80, (0, 0)), ("ptx", 80, (9, 0))], ("NVIDIA H100", "9.0", "535.183.01"), "ptx-too-new"),
    ],
)
def test_gpu_code_that_does_not_run_here(
    env: Made, code: list[tuple[str, int, tuple[int, int]]], gpu: tuple[str, str, str], expected: str
) -> None:
    env.extension(Source(module="selective_scan_cuda", fatbin=make.fatbin(*code)))
    env.gpu(*gpu)
    one = first(env)
    assert one.code == expected
    assert gpu[0] in said(one)


@pytest.mark.parametrize("code", [("sass", 80, (0, 0)), ("ptx", 80, (8, 4))])
def test_gpu_code_that_runs_here_is_fine(env: Made, code: tuple[str, int, tuple[int, int]]) -> None:
    env.extension(Source(module="selective_scan_cuda", fatbin=make.fatbin(code)))
    env.gpu("NVIDIA GeForce RTX 4090", "8.9", "580.65.06")
    assert codes(env) == []


def test_a_driver_that_is_too_old(bare: Made) -> None:
    make.torch(bare, "2.11.0+cu130", "13.0")
    make.kernels(bare)
    with (bare.site / "torch/__init__.py").open("a") as stream:
        stream.write(
            "def _old(): raise RuntimeError('The NVIDIA driver on your system is too old (found version 12020).')\n"
        )
        stream.write("cuda.is_available = staticmethod(lambda: False); cuda.init = staticmethod(_old)\n")
    bare.gpu("Tesla T4", "7.5", "550.90.07")
    told = examine(bare)
    assert told.findings[0].code == "driver-too-old"
    assert "driver 550.90.07 runs CUDA 12, torch 2.11.0+cu130 was built with CUDA 13.0 (Tesla T4)" in said(
        told.findings[0]
    )
    assert "cuda: RuntimeError: The NVIDIA driver" in said(told.findings[0])


def test_a_gpu_that_triton_does_not_take(env: Made) -> None:
    env.gpu("NVIDIA GeForce GTX 1080", "6.1", "580.65.06")
    assert first(env).code == "gpu-too-old"


def test_a_driver_whose_parts_do_not_fit(env: Made) -> None:
    env.tool("nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    one = first(env)
    assert (one.code, "Driver/library version mismatch" in said(one)) == ("driver-broken", True)


def test_a_hidden_libcuda(env: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    env.gpu()
    (env.home / "driver/libcuda.so.1").unlink()
    (env.site / "torch/__init__.py").write_text(
        (env.site / "torch/__init__.py")
        .read_text()
        .replace("init = staticmethod(lambda: None)", "init = staticmethod(lambda: 1 / 0)")
        .replace("lambda: True", "lambda: False")
    )
    monkeypatch.setattr(system.System, "loader_folders", lambda self: [])
    assert "no-libcuda" in codes(env)


def test_triton_needs_a_compiler_and_headers(env: Made) -> None:
    env.distribution("triton", "3.1.0")
    env.package("triton", {"__init__.py": ""})
    env.gpu()
    assert codes(env) == [] or not Path(examine(env).facts["python"]).exists()
    env.variables["PATH"] = f"{env.home / 'tools'}"
    env.tool("nvidia-smi", "printf 'NVIDIA A100, 8.0, 580.65.06\\n'")
    one = first(env)
    assert (one.code, said(one)) == ("no-c-compiler", "no cc, gcc or clang on PATH, and CC is not set")


def test_without_a_gpu_no_compiler_is_needed(env: Made) -> None:
    env.distribution("triton", "3.1.0")
    env.package("triton", {"__init__.py": ""})
    env.variables["PATH"] = "/nonexistent"
    assert codes(env) == []


# The machine around


@pytest.mark.parametrize(
    ("home", "code"),
    [(":/usr/local/cuda", "cuda-home-colon"), ("EMPTY", "cuda-home-elsewhere"), ("/no/such", "cuda-home-elsewhere")],
)
def test_cuda_home_is_looked_at(env: Made, home: str, code: str) -> None:
    empty = env.home / "cuda"
    empty.mkdir()
    env.variables["CUDA_HOME"] = home.replace("EMPTY", str(empty))
    told = examine(env)
    assert [(one.code, one.severity) for one in told.findings] == [(code, "warning")]
    assert env.variables["CUDA_HOME"] in said(told.findings[0])


def test_toolkits_are_told_beside_an_error_only(env: Made) -> None:
    for version in ("11.5", "12.4"):
        nvcc = env.home / f"cuda-{version}/bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.119'\n")
        nvcc.chmod(0o755)
        env.variables["PATH"] = f"{env.variables['PATH']}:{nvcc.parent}"
    header = env.home / "cuda-11.5/include/crt/host_config.h"
    header.parent.mkdir(parents=True)
    header.write_text("#if __GNUC__ > 5\n#error -- unsupported GNU version! gcc versions later than 5\n#endif\n")
    env.tool("g++", "echo 12.2.0")
    assert codes(env) == []
    (env.site / f"selective_scan_cuda{SUFFIX}").unlink()
    found = codes(env)
    assert found[0] == "kernels-missing"
    assert {"several-nvcc", "toolkit-mismatch", "host-compiler-too-new"} <= set(found)


def test_another_torchs_libraries_on_the_loaders_path(env: Made) -> None:
    folder = env.home / "libtorch/lib"
    folder.mkdir(parents=True)
    shutil.copy(env.site / "torch/lib/libtorch_cpu.so", folder / "libc10.so")
    env.variables["LD_LIBRARY_PATH"] = str(folder)
    one = first(env)
    assert (one.code, str(folder) in said(one)) == ("ld-library-path", True)


def test_a_preloaded_file_that_is_not_there(env: Made) -> None:
    env.variables["LD_PRELOAD"] = "/no/such/libcudart.so"
    one = first(env)
    assert (one.code, said(one)) == ("ld-preload", "LD_PRELOAD=/no/such/libcudart.so: there is no such file")


def test_a_ninja_that_does_not_run(env: Made) -> None:
    env.distribution("ninja", "1.11.1")
    assert codes(env) == ["ninja-broken"]
    ninja = env.prefix / "bin/ninja"
    ninja.write_text("#!/no/such/python\n")
    ninja.chmod(0o755)
    assert codes(env) == ["ninja-broken"]
    ninja.write_text("#!/bin/sh\necho 1.11.1\n")
    assert codes(env) == []


def test_too_many_jobs_for_the_memory(env: Made) -> None:
    env.variables["MAX_JOBS"] = "9999"
    assert codes(env) == ["too-little-memory"]


def test_a_damaged_triton_cache(env: Made) -> None:
    entry = env.home / ".triton/cache/3f9a/cuda_utils.so"
    entry.parent.mkdir(parents=True)
    entry.write_bytes(b"")
    assert codes(env) == ["triton-cache"]


def test_a_wheel_of_another_torch_in_pips_cache(bare: Made) -> None:
    import zipfile

    make.torch(bare)
    make.kernels(bare, (make.SET_DEVICE["2.9"],))
    wheel = bare.home / ".cache/pip/wheels/1/2/3/4/mamba_ssm-2.2.4-cp310-cp310-linux_x86_64.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(bare.site / f"selective_scan_cuda{SUFFIX}", f"selective_scan_cuda{SUFFIX}")
    found = examine(bare).findings
    (one,) = [one for one in found if one.code == "pip-cache"]
    assert found[0].code == "other-torch"
    assert f"{wheel} was built for torch 2.8 or 2.9" in said(one)


def test_a_file_system_without_locks_is_told(env: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    assert not system.lacks_file_locks(env.home)
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert system.lacks_file_locks(env.home)


# Imports that crash, hang or fail


def test_a_crash_while_importing_has_its_place(env: Made) -> None:
    env.extension(Source(module="selective_scan_cuda", first="*(volatile int *)0 = 1;"))
    one = first(env)
    assert one.code == "import-crashes"
    assert "import selective_scan_cuda: crashed: signal 11: Fatal Python error: Segmentation fault" in said(one)


def test_an_import_that_hangs_is_a_note(env: Made) -> None:
    (env.site / "mamba_ssm/__init__.py").write_text("import time\ntime.sleep(600)\n")
    told = examine(env, seconds=4)
    assert "--wait" in told.notes[0]
    assert [one.severity for one in told.findings if one.severity == "error"] == []


def test_an_import_that_fails_for_an_unknown_reason(env: Made) -> None:
    (env.site / "mamba_ssm/__init__.py").write_text("raise ValueError('never seen')\n")
    one = first(env)
    assert (one.code, said(one)) == ("import-fails", "import mamba_ssm: ValueError: never seen")


def test_a_guarded_import_does_not_hide_the_cause(env: Made) -> None:
    env.extension(Source(module="causal_conv1d_cuda", needs=("_ZN3c107not_thereEv",)))
    (env.site / "mamba_ssm/ops/selective_scan_interface.py").write_text(
        "try:\n    from causal_conv1d import causal_conv1d_fn\nexcept ImportError:\n    causal_conv1d_fn = None\n"
        "def selective_scan_fn(*a): pass\n"
    )
    assert first(env).code == "other-torch"
    assert "conv1d-hidden" not in codes(env)


# What is no environment


@pytest.mark.parametrize("kind", ["empty", "files", "missing"])
def test_a_folder_that_is_no_environment(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if kind != "missing":
        place.mkdir()
    if kind == "files":
        (place / "notes.txt").touch()
    told = diagnosis.of_environment(place, {"PATH": "/usr/bin"}, tmp_path, seconds=60)
    assert [one.code for one in told.findings] == ["not-an-environment"]
    assert str(place) in said(told.findings[0])


@pytest.mark.parametrize(
    "content", ["#!/no/such/python\n", "#!/bin/sh\nexit 3\n", "#!/bin/sh\necho hello\n", "#!/bin/sh\nyes\n", "\x7fELF"]
)
def test_an_interpreter_that_does_not_run(content: str, tmp_path: Path) -> None:
    python = tmp_path / "env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(content)
    python.chmod(0o755)
    told = diagnosis.of_environment(tmp_path / "env", {"PATH": "/usr/bin"}, tmp_path, seconds=60)
    assert [one.code for one in told.findings] == ["python-does-not-run"]


def test_a_dangling_interpreter(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to("/no/such/python3")
    told = diagnosis.of_environment(tmp_path, {"PATH": "/usr/bin"}, tmp_path, seconds=60)
    assert [one.code for one in told.findings] == ["python-does-not-run"]


# Healthy ones. The interpreter and the extensions are real, torch is a stand-in.


def _conda(made: Made) -> None:
    (made.prefix / "conda-meta").mkdir()
    (made.prefix / "conda-meta/pytorch-2.5.1-cuda124_py311_0.json").write_text("{}")
    (made.prefix / "conda-meta/mamba-ssm-2.2.4-cuda124_0.json").write_text("{}")
    for path in made.site.glob("*/INSTALLER"):
        path.write_text("conda\n")


def _system_site(made: Made) -> None:
    config = made.prefix / "pyvenv.cfg"
    config.write_text(config.read_text().replace("= false", "= true"))


def _uv(made: Made) -> None:
    with (made.prefix / "pyvenv.cfg").open("a") as stream:
        stream.write("uv = 0.9.1\n")
    for path in made.site.glob("*/INSTALLER"):
        path.write_text("uv")


def _notebook(made: Made) -> None:
    made.distribution("ipykernel", "6.29.5")
    (made.folder / "train.ipynb").write_text('{"cells": []}')
    made.variables.update(JPY_PARENT_PID="7", CLICOLOR="1", PYTHONPATH="")


def _editable(made: Made) -> None:
    source = made.home / "src"
    source.mkdir()
    (made.site / "mamba_ssm").rename(source / "mamba_ssm")
    (made.site / "__editable__.mamba_ssm-2.2.4.pth").write_text(f"{source}\n")
    (made.site / "mamba_ssm-2.2.4.dist-info/direct_url.json").write_text(
        '{"dir_info": {"editable": true}, "url": "file:///"}'
    )


def _cluster(made: Made) -> None:
    """A module system: a whole toolkit of another CUDA in the variables, and a preloaded allocator."""
    nvcc = made.home / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.2, V12.2.91'\n")
    nvcc.chmod(0o755)
    (made.home / "cuda/lib64").mkdir()
    (made.home / "cuda/lib64/libcudart.so.12").write_bytes(b"")
    made.variables.update(
        CUDA_HOME=str(made.home / "cuda"), LD_LIBRARY_PATH=str(made.home / "cuda/lib64"), MAX_JOBS="1"
    )


def _gpu(made: Made) -> None:
    made.extension(Source(module="selective_scan_cuda", fatbin=make.fatbin(("sass", 90, (0, 0)))))
    made.gpu("NVIDIA H100 80GB HBM3", "9.0", "570.124.06")


def _stable_abi(made: Made) -> None:
    for module in ("causal_conv1d_cuda", "selective_scan_cuda"):
        (made.site / f"{module}{SUFFIX}").rename(made.site / f"{module}.abi3.so")


HEALTHY: dict[str, Callable[[Made], None]] = {
    "venv": lambda made: None,
    "conda": _conda,
    "pixi": _conda,
    "uv": _uv,
    "system site-packages": _system_site,
    "notebook": _notebook,
    "editable": _editable,
    "cluster": _cluster,
    "GPU": _gpu,
    "stable ABI": _stable_abi,
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_environment_gives_nothing(kind: str, tmp_path: Path, libraries: Path) -> None:
    root = tmp_path / ".pixi/envs" if kind == "pixi" else tmp_path
    made = make.healthy(root, libraries)
    HEALTHY[kind](made)
    told = examine(made)
    assert [(one.code, one.evidence) for one in told.findings] == []
    assert told.notes == []
    assert told.facts["process"] == "whole"


def test_there_are_ten_kinds_of_healthy_environments() -> None:
    assert len(HEALTHY) == 10


def test_a_post_release_of_conda_forge_is_the_same_torch(env: Made) -> None:
    _conda(env)
    (env.site / "torch/version.py").write_text("__version__ = '2.5.1.post3'\ncuda = '12.4'\n")
    assert codes(env) == []


def test_a_huge_working_folder_is_only_looked_into(env: Made) -> None:
    for number in range(400):
        (env.folder / f"d{number:03}").mkdir()
        (env.folder / f"d{number:03}/a.py").write_text("x = 1\n")
    (env.folder / "d399/a.py").write_text("Mamba(bimamba_type='v2')\n")
    assert codes(env) == []


def test_nothing_is_written(env: Made) -> None:
    def state() -> dict[str, float]:
        return {str(path): path.lstat().st_mtime_ns for path in env.prefix.parent.rglob("*")}

    before = state()
    examine(env)
    assert state() == before


def test_the_interpreter_itself_may_be_named(env: Made) -> None:
    assert examine(env, env.python).findings == []
    assert os.access(sys.executable, os.X_OK)
