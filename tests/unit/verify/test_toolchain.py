"""What check-toolchain finds, on an environment of stand-ins for the compilers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssm_forge.base.errors import InstallError
from ssm_forge.manifest import variants
from ssm_forge.verify import toolchain
from ssm_forge.verify.report import Check

_ROOT = Path(__file__).parents[3]

_HOST_CONFIG = "#if __GNUC__ > 11\n#if (__clang_major__ >= 15) || (__clang_major__ < 3)\n"


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """An environment in which everything fits."""
    prefix = tmp_path / "env"
    (prefix / "conda-meta").mkdir(parents=True)
    set_nvcc(prefix, "11.8", "11.8.89")
    set_gxx(prefix, "11.3.0")
    set_cudnn(prefix, "8.9.6")
    set_torch(prefix, "2.0.1+cu117 11.7 8906")
    (prefix / "targets/x86_64-linux/include/crt").mkdir(parents=True)
    (prefix / "targets/x86_64-linux/include/crt/host_config.h").write_text(_HOST_CONFIG)
    activate = prefix / "etc/conda/activate.d/x.sh"
    activate.parent.mkdir(parents=True)
    activate.write_text('export CXX="$CONDA_PREFIX/bin/x-g++"\n')
    return prefix


def set_nvcc(prefix: Path, release: str, version: str) -> None:
    script(prefix / "bin/nvcc", f'[ "$1" != -V ] || echo "Cuda compilation tools, release {release}, V{version}"')


def set_gxx(prefix: Path, version: str) -> None:
    script(prefix / "bin/x-g++", f'[ "$1" != -dumpfullversion ] || echo {version}')


def set_torch(prefix: Path, answer: str) -> None:
    script(prefix / "bin/python", f'case "$*" in *ctypes*) echo 11080;; *) echo {answer};; esac')


def set_cudnn(prefix: Path, version: str) -> None:
    header = prefix / "include/cudnn_version.h"
    header.parent.mkdir(exist_ok=True)
    parts = zip(("MAJOR", "MINOR", "PATCHLEVEL"), version.split("."), strict=True)
    header.write_text("".join(f"#define CUDNN_{name} {value}\n" for name, value in parts))


def check(prefix: Path) -> dict[str, Check]:
    variant = variants.load(_ROOT / "recipes/variants.yaml").get("cu118", "bridge")
    return {found.name: found for found in toolchain.check(prefix, variant).checks}


def test_a_toolchain_that_fits_passes_everything(prefix: Path) -> None:
    found = check(prefix)
    assert {c.status for c in found.values()} == {"pass"}, found
    assert found["nvcc"].detail == "release 11.8, V11.8.89"
    assert found["compiles"].detail.endswith("runtime 11.8")


def test_another_cuda_release_fails(prefix: Path) -> None:
    set_nvcc(prefix, "12.4", "12.4.131")
    assert check(prefix)["nvcc"] == Check("nvcc", "fail", "release 12.4, not 11.8")


def test_another_build_of_11_8_fails(prefix: Path) -> None:
    set_nvcc(prefix, "11.8", "11.8.60")
    assert check(prefix)["nvcc"].detail == "V11.8.60, not V11.8.89"


def test_a_compiler_that_nvcc_does_not_take_fails(prefix: Path) -> None:
    set_gxx(prefix, "12.2.0")
    found = check(prefix)["g++"]
    assert found.status == "fail"
    assert "this nvcc takes g++ up to 11" in found.detail


def test_another_cudnn_fails(prefix: Path) -> None:
    set_cudnn(prefix, "8.5.0")
    found = check(prefix)["cuDNN"]
    assert found.status == "fail"
    assert found.detail.startswith("8.5.0 (")


def test_a_missing_cudnn_header_fails(prefix: Path) -> None:
    (prefix / "include/cudnn_version.h").unlink()
    assert check(prefix)["cuDNN"].status == "fail"


@pytest.mark.parametrize("answer", ["2.0.1 12.1 8906", "2.3.0 11.8 8700"])
def test_a_torch_of_another_cuda_major_or_minor_release_fails(prefix: Path, answer: str) -> None:
    set_torch(prefix, answer)
    assert check(prefix)["torch"].status == "fail"


def test_an_activation_that_points_elsewhere_fails(prefix: Path) -> None:
    (prefix / "etc/conda/activate.d/x.sh").write_text(
        'export CUDA_HOME=/usr/local/cuda CXX="$CONDA_PREFIX/bin/x-g++"\n'
    )
    assert check(prefix)["activation"].detail == f"CUDA_HOME is '/usr/local/cuda', not {prefix}; unset it"


def test_a_compiler_that_breaks_is_quoted(prefix: Path) -> None:
    script(prefix / "bin/nvcc", '[ "$1" = -V ] && echo "release 11.8, V11.8.89" && exit; echo "no cicc" >&2; exit 1')
    assert check(prefix)["compiles"] == Check("compiles", "fail", "nvcc failed: no cicc")


def test_an_environment_without_nvcc_is_refused_with_the_way_to_one(prefix: Path) -> None:
    (prefix / "bin/nvcc").unlink()
    with pytest.raises(InstallError, match=r"has no nvcc.*check-toolchain --variant cu118"):
        check(prefix)


def test_without_headers_of_cudnn_torchs_own_is_asked_for_from_12_on(prefix: Path) -> None:
    (prefix / "include/cudnn_version.h").unlink()
    set_nvcc(prefix, "13.0", "13.0.88")
    variant = variants.load(_ROOT / "recipes/variants.yaml").get("cu130", "conda")
    set_torch(prefix, "2.12.1 13.0 92301")
    found = {check.name: check for check in toolchain.check(prefix, variant).checks}["cuDNN"]
    assert (found.status, found.detail) == ("pass", "9.23.1 (of torch; no headers are installed)")
    set_torch(prefix, "2.12.1 13.0 8907")
    found = {check.name: check for check in toolchain.check(prefix, variant).checks}["cuDNN"]
    assert found.status == "fail"


def test_another_nvcc_than_the_environments_fails(prefix: Path, tmp_path: Path) -> None:
    script(tmp_path / "elsewhere/nvcc", 'echo "release 11.8, V11.8.89"')
    (prefix / "etc/conda/activate.d/y.sh").write_text(f'export PATH="{tmp_path}/elsewhere:$PATH"\n')
    found = check(prefix)
    assert found["nvcc"] == Check("nvcc", "fail", f"nvcc is {tmp_path}/elsewhere/nvcc, not the environment's")
    assert found["activation"].status == "fail"


def test_nvcc_gets_the_environments_compiler_where_no_activation_gives_it(prefix: Path, tmp_path: Path) -> None:
    log = tmp_path / "arguments"
    script(prefix / "bin/nvcc", f'[ "$1" = -V ] && echo "release 11.8, V11.8.89"; echo "$*" >>"{log}"')
    assert check(prefix)["compiles"].status == "pass"
    assert f"-ccbin {prefix}/bin/x-g++" in log.read_text()
    log.unlink()
    (prefix / "etc/conda/activate.d/y.sh").write_text('export NVCC_PREPEND_FLAGS="-ccbin=$CXX"\n')
    assert check(prefix)["compiles"].status == "pass"
    assert "-ccbin" not in log.read_text()


@pytest.mark.parametrize("row", ["cu118", "cu129", "cu130"])
def test_conda_gets_the_rows_releases_and_not_the_newest(row: str) -> None:
    variant = variants.load(_ROOT / "recipes/variants.yaml").get(row, "conda")
    wanted = set(toolchain.specs(variant))
    nvcc = "cuda-nvcc" if row == "cu118" else "cuda-nvcc_linux-64"
    assert {f"{nvcc} {variant.cuda}.*", f"cuda-version {variant.cuda}.*"} <= wanted
    assert f"gxx_linux-64 {variant.row['cxx_compiler_version']}.*" in wanted
