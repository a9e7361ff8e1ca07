"""CUDA 12 from the bridge, on Python 3.12."""

from __future__ import annotations

import pytest

from forge_run import ARCH, Forge, statuses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

VARIANT = "cu124"


def _args(forge: Forge, *more: str) -> tuple[str, ...]:
    base = ("--variant", VARIANT, "--python", "3.12", "--source", "bridge")
    return (*base, "--prefix", str(forge.folder / VARIANT), *more)


def test_one_command_ends_in_verified_kernels(forge: Forge) -> None:
    done = forge("install-mamba", *_args(forge, "--cuda-arch", ARCH, "--json"))
    assert done.returncode == 0, done.stderr[-3000:]
    report = done.json
    assert {p["name"]: p["version"] for p in report["packages"]} == {"causal-conv1d": "1.7.0", "mamba-ssm": "2.3.1"}
    found = statuses(report["verify"])
    assert found.pop("kernels on the GPU", "not-run") in ("not-run", "pass")
    assert set(found.values()) == {"pass"}, report["verify"]


def test_everything_imports(forge: Forge) -> None:
    code = "import torch, causal_conv1d_cuda, selective_scan_cuda, causal_conv1d, mamba_ssm; print(mamba_ssm.Mamba)"
    done = forge("python", "--prefix", str(forge.folder / VARIANT), "-W", "ignore", "-c", code)
    assert done.stdout.strip() == "<class 'mamba_ssm.modules.mamba_simple.Mamba'>", done.stderr


def test_the_toolchain_fits_together(forge: Forge) -> None:
    done = forge("check-toolchain", *_args(forge, "--json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(statuses(done.json).values()) == {"pass"}
