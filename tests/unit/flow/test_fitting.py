"""What is chosen for a machine's driver and GPUs, and what is refused because nothing can help."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from front_door import assert_one_line_error, run_here
from ssm_forge.base import machine
from ssm_forge.base.arch import Capability, resolve
from ssm_forge.base.errors import MachineError
from ssm_forge.base.machine import Gpu
from ssm_forge.base.paths import workspace
from ssm_forge.flow import fitting
from ssm_forge.flow.plan import Options
from ssm_forge.manifest import variants

H100 = Gpu("NVIDIA H100 80GB HBM3", Capability(9, 0), "580.65.06")
A100 = Gpu("NVIDIA A100-SXM4-80GB", Capability(8, 0), "580.65.06")
V100 = Gpu("Tesla V100-SXM2-32GB", Capability(7, 0), "580.65.06")
P100 = Gpu("Tesla P100-PCIE-16GB", Capability(6, 0), "580.65.06")
B300 = Gpu("NVIDIA B300", Capability(10, 3), "580.95.05")


def with_driver(gpu: Gpu, driver: str) -> Gpu:
    return Gpu(gpu.name, gpu.capability, driver)


def chosen(*gpus: Gpu, conda: bool, options: Options | None = None) -> tuple[str, str]:
    matrix = variants.load(workspace().variants)
    found, why = fitting.default(options or Options(), gpus, matrix, lambda: conda)
    return found.variant, why


@pytest.mark.parametrize(
    ("gpus", "conda", "variant"),
    [
        ((), True, "cu130"),
        ((H100,), True, "cu130"),
        ((H100,), False, "cu130"),
        ((B300,), False, "cu130"),
        ((with_driver(A100, "535.183.01"),), True, "cu129"),
        ((with_driver(A100, "535.183.01"),), False, "cu124"),
        ((with_driver(A100, "470.82.01"),), False, "cu118"),
        ((V100,), True, "cu129"),
        ((V100,), False, "cu124"),
        ((V100, A100), False, "cu124"),
        # Blackwell with a driver of CUDA 12.
        ((with_driver(B300, "570.86.10"),), True, "cu129"),
    ],
)
def test_the_default_follows_driver_gpus_and_what_can_be_reached(
    gpus: tuple[Gpu, ...], conda: bool, variant: str
) -> None:
    found, why = chosen(*gpus, conda=conda)
    assert found == variant
    assert (why == "") == (variant == "cu130")
    assert not why or (f"{variant} is taken and not cu130" in why and gpus[0].driver in why)


def test_the_reason_is_the_driver_or_the_compiler() -> None:
    assert (
        "CUDA 13 needs driver 580, and there is 535.183.01" in chosen(with_driver(A100, "535.183.01"), conda=False)[1]
    )
    assert "nvcc 13.0 makes no code for 7.0" in chosen(V100, conda=False)[1]


def test_two_kinds_of_gpus_both_get_code_and_a_b300_that_of_100() -> None:
    matrix = variants.load(workspace().variants)
    for gpus, name, archs in (((V100, A100), "cu124", "7.0;8.0"), ((B300,), "cu130", "10.0")):
        row = matrix.get(name, "bridge")
        found = resolve(
            None, supported=row.supported_archs, upstream=(), default="9.0", gpus=[gpu.capability for gpu in gpus]
        )
        assert str(found) == archs


def test_a_source_or_a_python_that_is_named_limits_what_is_taken() -> None:
    old = with_driver(A100, "535.183.01")
    assert chosen(old, conda=True, options=Options(source="bridge"))[0] == "cu124"
    assert chosen(old, conda=False, options=Options(source="conda"))[0] == "cu129"
    with pytest.raises(MachineError, match="no variant to be had here"):
        chosen(old, conda=False, options=Options(python="3.13"))


def test_where_no_variant_runs_each_reason_is_told() -> None:
    with pytest.raises(MachineError, match=r"cu124: CUDA 12 needs driver 525, and there is 390.157") as refused:
        chosen(with_driver(V100, "390.157"), conda=False)
    assert "cu118: CUDA 11 needs driver 450" in refused.value.what


def test_a_gpu_that_no_build_can_help_is_refused_whatever_is_named() -> None:
    matrix = variants.load(workspace().variants)
    for attempt in (lambda: chosen(P100, conda=True), lambda: fitting.driver_note("cu118", (P100,), matrix)):
        with pytest.raises(MachineError, match=r"Tesla P100-PCIE-16GB \(6.0\) is older than 7.0 .* no build can help"):
            attempt()
    # Another one beside it may be what is meant.
    fitting.require_possible((P100, A100))


def test_a_variant_that_is_named_is_taken_and_the_driver_told_of() -> None:
    matrix = variants.load(workspace().variants)
    note = fitting.driver_note("cu130", (with_driver(A100, "535.183.01"),), matrix)
    assert note.startswith("CUDA 13 needs driver 580, and there is 535.183.01")
    assert fitting.driver_note("cu124", (with_driver(A100, "535.183.01"),), matrix) == ""


@pytest.mark.parametrize("words", [("install-mamba",), ("build",)])
def test_another_architecture_is_refused_before_anything_is_asked(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    told = "this machine is riscv64, and packages are made for x86-64 and aarch64"
    assert_one_line_error(run_here(*words), MachineError.exit_code, told)


def test_what_is_taken_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'Tesla P100-PCIE-16GB, 6.0, 535.183.01'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    machine.gpus.cache_clear()
    try:
        done = run_here("install-mamba", "--prefix", str(tmp_path / "new"), "--dry-run")
    finally:
        machine.gpus.cache_clear()
    assert_one_line_error(done, MachineError.exit_code, "no build can help")
