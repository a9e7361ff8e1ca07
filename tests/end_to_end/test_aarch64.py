"""Both packages cross-compiled for aarch64 on x86-64, installed, and imported there under QEMU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forge_run import ROWS, Forge, fresh_forge, statuses
from ssm_forge.base import platforms
from ssm_forge.base.platforms import LINUX_64, LINUX_AARCH64
from ssm_forge.package import read
from ssm_forge.package.write import read_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(platforms.known_here() != LINUX_64, reason="this machine is not x86-64"),
]

ROW = replace(ROWS["cu130"], python="3.11")
FOR = ("--platform", "linux-aarch64", "--cuda-arch", "9.0")
IMPORTED = ("torch", "causal_conv1d_cuda", "selective_scan_cuda", "mamba_ssm")


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    with fresh_forge(ROW, tmp_path_factory.mktemp("logs")) as made:
        yield made


@pytest.fixture(scope="module")
def built(forge: Forge) -> dict[str, Path]:
    """The packages by project; neither variant nor Python is named, as in the manual."""
    done = forge("build", *FOR, timeout=6000)
    assert done.returncode == 0, done.stderr
    return {path.name.rsplit("-", 2)[0]: path for path in forge.channel.glob("linux-aarch64/*.conda")}


def test_packages_say_what_they_are_for_and_hold_it(forge: Forge, built: dict[str, Path]) -> None:
    assert set(built) == {"causal-conv1d", "mamba-ssm"}
    assert not forge.packages()
    for path in built.values():
        index = read_json(path, "index.json")
        assert (index["subdir"], index["arch"]) == ("linux-aarch64", "aarch64")
        assert "python_abi 3.11.* *_cp311" in index["depends"]
        assert any(spec.startswith("__glibc >=2.") for spec in index["depends"])
        assert any(spec.startswith("__cuda_arch >=9") for spec in index["depends"])
        # Refuses a module of another machine.
        assert read.inspect(path).subdir == "linux-aarch64"
        extensions = [e["_path"] for e in read_json(path, "paths.json")["paths"] if e["_path"].endswith(".so")]
        assert [name.rpartition(".cpython-")[2] for name in extensions] == ["311-aarch64-linux-gnu.so"]
        assert read.provenance(path)["variant"]["target_platform"] == LINUX_AARCH64.subdir


def test_the_environment_imports_all_of_it_under_emulation_and_the_report_says_so(
    forge: Forge, built: dict[str, Path], tmp_path: Path
) -> None:
    prefix = tmp_path / "env"
    done = forge("install-mamba", *FOR, "--prefix", str(prefix), "--json", timeout=3600)
    assert done.returncode == 0, done.stderr
    report = forge("verify", "--prefix", str(prefix), "--json", timeout=3600)
    assert report.returncode == 0, report.stdout
    found = statuses(report.json)
    assert {name: found[f"import {name}"] for name in IMPORTED} == dict.fromkeys(IMPORTED, "pass")
    assert found.pop("kernels on the GPU") == "not-run"
    assert set(found.values()) == {"pass"}, report.json
    emulated = next(check["detail"] for check in report.json["checks"] if check["name"] == "emulated")
    assert emulated.startswith("qemu-aarch64-static ")
    said = forge("python", "--prefix", str(prefix), "-c", "import platform; print(platform.machine())", timeout=600)
    assert said.stdout == "aarch64\n", said.stderr
    # Of x86-64 it is refused, at once.
    refused = forge("install-mamba", "--platform", "linux-64", "--cuda-arch", "9.0", "--prefix", str(prefix))
    assert refused.returncode != 0
    assert "is an environment for linux-aarch64, and the packages are for linux-64" in refused.stderr


def test_a_package_comes_out_again_byte_for_byte(forge: Forge, built: dict[str, Path]) -> None:
    done = forge("reproduce", str(built["mamba-ssm"]), "--json", timeout=6000)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.json["reproduced"]
