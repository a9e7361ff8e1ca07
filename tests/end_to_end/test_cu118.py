"""The classic stack, CUDA 11.8 on Python 3.10, on a machine without a C++ compiler."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from forge_run import REBUILDS, Forge, statuses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

VARIANT = "cu118"
_COMPILERS = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|cpp|clang|clang\+\+|as|ld)(-\d+|\..*)?")


@dataclasses.dataclass(frozen=True)
class Bare(Forge):
    """A machine like this one, with every compiler taken off the PATH."""

    tools: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "PATH": str(self.tools)}


@pytest.fixture(scope="module")
def bare(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Bare:
    tools = tmp_path_factory.mktemp("bin")
    for folder in os.environ["PATH"].split(os.pathsep):
        for tool in sorted(Path(folder).glob("*")):
            if not _COMPILERS.fullmatch(tool.name) and not (tools / tool.name).is_symlink():
                (tools / tool.name).symlink_to(tool)
    return Bare(forge.folder, tools)


def _args(forge: Forge, *more: str) -> tuple[str, ...]:
    base = ("--variant", VARIANT, "--python", "3.10", "--source", "bridge")
    return (*base, "--prefix", str(forge.folder / VARIANT), *more)


def test_no_compiler_is_left(bare: Bare) -> None:
    left = {tool.name for tool in bare.tools.iterdir()}
    assert not left & {"gcc", "g++", "cc", "c++", "as", "ld", "g++-12"}
    assert {"bash", "env"} <= left


def test_one_command_ends_in_verified_kernels_without_a_compiler_on_the_machine(bare: Bare) -> None:
    done = bare("install-mamba", *_args(bare, "--cuda-arch", "8.0", "--json"))
    assert done.returncode == 0, done.stderr[-3000:]
    report = done.json
    assert report["host_compiler"].startswith("g++ of Debian")
    assert {p["name"]: p["version"] for p in report["packages"]} == {"causal-conv1d": "1.7.0", "mamba-ssm": "2.3.1"}
    found = statuses(report["verify"])
    assert found.pop("kernels on the GPU", "not-run") in ("not-run", "pass")
    assert set(found.values()) == {"pass"}, report["verify"]


def test_torchs_check_of_the_compiler_was_enforced_and_nothing_was_left_undefined(bare: Bare) -> None:
    from ssm_forge.paths import workspace

    log = max(workspace().logs.glob("install-mamba-*.log"), key=lambda path: path.stat().st_mtime)
    text = log.read_text(encoding="utf-8")
    if "torch: applied" not in text:
        pytest.skip("nothing was compiled: the packages were built before")
    assert "torch: applied 2.0.1/0001-cuda-compiler-bounds.patch" in text
    assert "version bounds defined" not in text


def test_everything_imports(bare: Bare) -> None:
    code = "import torch, causal_conv1d_cuda, selective_scan_cuda, causal_conv1d, mamba_ssm; print(mamba_ssm.Mamba)"
    done = bare("python", "--prefix", str(bare.folder / VARIANT), "-W", "ignore", "-c", code)
    assert done.stdout.strip() == "<class 'mamba_ssm.modules.mamba_simple.Mamba'>", done.stderr


def test_the_toolchain_is_the_classic_one_to_the_letter(bare: Bare) -> None:
    done = bare("check-toolchain", *_args(bare, "--json"))
    assert done.returncode == 0, done.stdout + done.stderr
    details = {check["name"]: check["detail"] for check in done.json["checks"]}
    assert details["nvcc"] == "release 11.8, V11.8.89"
    assert re.match(r"11\.\d+\.\d+ \(", details["g++"])
    assert re.match(r"8\.9\.\d+ \(.*/include/cudnn_version\.h\)", details["cuDNN"])
    assert set(statuses(done.json).values()) == {"pass"}


def test_the_installed_torch_is_pristine(bare: Bare) -> None:
    """The build's patch reached neither the package cache nor an environment made from it."""
    (file,) = (bare.folder / VARIANT).glob("lib/python3.10/site-packages/torch/utils/cpp_extension.py")
    assert "'11.8'" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(("project", "how"), REBUILDS)
def test_the_same_bytes_come_again_in_another_folder(bare: Bare, project: str, how: tuple[str, ...]) -> None:
    """With one job and what the compile cache has, and compiled anew."""
    bare.reproduces(project, *how)
