"""Which .cu files are compiled without torch's headers, and what of their command is left."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

COMMON = Path(__file__).parents[3] / "recipes/common"
OWN = COMMON / "cu_headers"

_rewritten = cast(
    Callable[[list[str], Path, dict[str, str]], list[str]],
    runpy.run_path(str(COMMON / "own_headers.py"))["rewritten"],
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def build(tmp_path: Path) -> dict[str, str]:
    """The folders of a build: torch is in site-packages, some of its headers with names of their own."""
    host = tmp_path / "host_env"
    site = host / "lib/python3.12/site-packages"
    for name in ("c10/util/Half.h", "c10/util/Exception.h", "ATen/ATen.h", "fp16.h"):
        write(site / "torch/include" / name, "")
    write(tmp_path / "build_env/include/cuda_fp16.h", "")
    (tmp_path / "work/csrc").mkdir(parents=True)
    return {
        **os.environ,
        "SRC_DIR": str(tmp_path / "work"),
        "PREFIX": str(host),
        "BUILD_PREFIX": str(tmp_path / "build_env"),
        "SP_DIR": str(site),
        "PY_VER": "3.12",
        "PYTHON": sys.executable,
        "CU_HEADERS": str(tmp_path / "work/.common/cu_headers"),
    }


def command(build: dict[str, str], *more: str) -> list[str]:
    """As torch's build writes it, shortened."""
    torch = f"{build['SP_DIR']}/torch/include"
    return [
        *("nvcc", "-MD", "-MF", "a.o.d", f"-I{build['SRC_DIR']}/csrc", f"-I{torch}", "-isystem"),
        *(f"{torch}/torch/csrc/api/include", f"-I{build['BUILD_PREFIX']}/include"),
        *(f"-I{build['PREFIX']}/include/python3.12", "-c", "-c", f"{build['SRC_DIR']}/csrc/a.cu", "-o", "a.o"),
        *("-O3", "-std=c++17", "-DTORCH_API_INCLUDE_EXTENSION_H", '-DPYBIND11_BUILD_ABI="_cxxabi1011"'),
        *("-D__CUDA_NO_HALF_OPERATORS__", "-DTORCH_EXTENSION_NAME=a", *more),
    ]


def rewritten(build: dict[str, str], source: str, *more: str) -> list[str]:
    write(Path(build["SRC_DIR"]) / "csrc/a.cu", source)
    return _rewritten(command(build, *more), OWN, build)


def test_nothing_of_torch_is_left_in_the_command_of_a_file_that_needs_no_more_than_our_headers(
    build: dict[str, str],
) -> None:
    left = rewritten(build, "#include <cub/cub.cuh>\n#include <cuda_fp16.h>\n#include <c10/util/Half.h>\n")
    assert left == [
        *("nvcc", f"-I{OWN}", "-MD", "-MF", "a.o.d"),
        *(f"-I{build['SRC_DIR']}/csrc", f"-I{build['BUILD_PREFIX']}/include"),
        *("-c", "-c", f"{build['SRC_DIR']}/csrc/a.cu", "-o", "a.o", "-O3", "-std=c++17"),
        *("-D__CUDA_NO_HALF_OPERATORS__", "-DTORCH_EXTENSION_NAME=a"),
    ]


@pytest.mark.parametrize(
    "source",
    [
        "#include <c10/util/Half.h>\n  #  include <c10/util/Exception.h>",
        '#include "ATen/ATen.h"',
        "#include <torch/not_even_there.h>",
        "#include <fp16.h>",
        "#define HEADER <ATen/ATen.h>\n#include HEADER",
        '#include "near.h"',
        "#include <far.h>",
    ],
)
def test_a_file_that_includes_more_of_torch_keeps_all_of_torchs(build: dict[str, str], source: str) -> None:
    work = Path(build["SRC_DIR"])
    write(work / "csrc/near.h", '#include "near.h"\n#include "deeper/next.h"')
    write(work / "csrc/deeper/next.h", "#include <ATen/ATen.h>")
    write(work / "csrc/far.h", "#include <ATen/ATen.h>")
    assert rewritten(build, source) == []


def test_what_a_project_includes_under_a_condition_of_another_gpu_is_no_header_of_torchs(build: dict[str, str]) -> None:
    assert rewritten(build, "#ifdef USE_ROCM\n#include <hip/hip_bf16.h>\n#endif\n")


@pytest.mark.parametrize(("abi", "stays"), [("1", False), ("0", True)])
def test_the_cxx_abi_is_named_only_where_it_is_not_the_compilers_own(
    build: dict[str, str], abi: str, stays: bool
) -> None:
    flag = f"-D_GLIBCXX_USE_CXX11_ABI={abi}"
    assert (flag in rewritten(build, "", flag)) is stays


def test_headers_of_a_conda_torch_are_in_the_host_environment_itself(build: dict[str, str]) -> None:
    """CUDA's may be there, too, and are no reason to keep torch's."""
    include = Path(build["PREFIX"]) / "include"
    write(include / "c10/util/Half.h", "")
    write(include / "cub/cub.cuh", "")
    write(include / "cuda_fp16.h", "")
    headers = f"-I{include}"
    left = rewritten(build, "#include <cub/cub.cuh>\n#include <cuda_fp16.h>\n#include <c10/util/Half.h>", headers)
    assert left and headers not in left


def compiled(build: dict[str, str], source: str, *words: str) -> list[str]:
    """What compile.sh hands to a compiler."""
    work = Path(build["SRC_DIR"])
    if not (work / ".common").is_symlink():
        (work / ".common").symlink_to(COMMON)
    write(work / "csrc/a.cu", source)
    compiler = write(work.parent / "compiler", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    compiler.chmod(0o755)
    script = ["bash", COMMON / "compile.sh", compiler, *words]
    return subprocess.run(script, env=build, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_same_command_reaches_nvcc_for_every_torch(build: dict[str, str]) -> None:
    """Another C++ is torch's wish, and a conda torch's headers are elsewhere."""
    source = "#include <c10/util/Half.h>"
    one = compiled(build, source, *command(build)[1:])
    include = f"{build['PREFIX']}/include"
    words = [f"-I{include}", f"-I{include}/torch/csrc/api/include", *command(build, "-D_GLIBCXX_USE_CXX11_ABI=1")[1:]]
    assert one == compiled({**build, "CXX_STANDARD": "20"}, source, *words)
    assert "-std=c++17" in one
    assert one[0] == "-I.common/cu_headers"
    assert not [word for word in one if word.startswith(("-I.site", "-I.host", "-I.python"))]


def test_with_torchs_headers_the_language_is_the_one_that_torch_takes(build: dict[str, str]) -> None:
    words = compiled({**build, "CXX_STANDARD": "20"}, "#include <ATen/ATen.h>", *command(build)[1:])
    assert "-std=c++20" in words
    assert "-I.site/torch/include" in words
    assert not [word for word in words if ".common" in word]


def test_a_cpp_file_has_torchs_headers_and_the_check_that_cu_files_call(build: dict[str, str]) -> None:
    words = ["-I.site/torch/include", "-c", "a.cpp", "-o", "a.o"]
    assert compiled(build, "", *words) == [*words, "-include", ".common/cuda_check.h"]
    assert compiled(build, "", "-shared", "a.o") == ["-shared", "a.o"]


def test_a_source_tree_is_compiled_as_it_is(build: dict[str, str]) -> None:
    """Only the build script of the two recipes names our headers."""
    del build["CU_HEADERS"]
    assert "-I.site/torch/include" in compiled(build, "#include <c10/util/Half.h>", *command(build)[1:])


def test_below_compute_capability_8_only_what_cuda_11_has_there_is_called() -> None:
    # Most functions for bfloat16 it has from 8.0 on: kernels for a Turing or Volta GPU did not compile.
    text = (OWN / "c10/util/BFloat16.h").read_text()
    below = re.sub(r"#if defined\(__CUDA_ARCH__\) && __CUDA_ARCH__ >= 800\n.*?#else\n", "", text, flags=re.DOTALL)
    assert below != text
    assert re.findall(r"__\w*bfloat16\w*\(", below) == ["__bfloat162float("]
