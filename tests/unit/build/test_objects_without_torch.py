"""Our headers in the place of torch's, with a real nvcc and a real torch: the same types, the same code, one object."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from real_nvcc import toolkit, torch_headers
from ssm_forge.base import fetch
from ssm_forge.base.paths import workspace
from ssm_forge.build import compile_cache
from ssm_forge.manifest.patching import patched
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.package import gpu_code

pytestmark = pytest.mark.slow

COMMON = workspace().recipes / "common"
OWN = COMMON / "cu_headers"

# As the two projects' setup.py and torch's build give them.
_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"]

# What a program can find out about the types, printed; and functions whose names and arguments hold them.
_TELLS = """\
#include <cuda_runtime.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>
#include <cstddef>
#include <cstdio>
#include <type_traits>
#include <typeinfo>
template <typename T> void tell() {
    std::printf("%s %zu %zu %d%d%d\\n", typeid(T).name(), sizeof(T), alignof(T), std::is_trivially_copyable_v<T>,
                std::is_standard_layout_v<T>, std::is_trivially_default_constructible_v<T>);
}
int main() {
    tell<at::Half>(); tell<at::BFloat16>(); tell<c10::complex<float>>();
    tell<decltype(at::Half::x)>(); tell<decltype(at::BFloat16::x)>();
    std::printf("%zu %zu\\n", offsetof(c10::complex<float>, real_), offsetof(c10::complex<float>, imag_));
}
"""
_TAKES = """\
#include <cuda_runtime.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>
template <typename T> struct Of { T value; char after; };
float taken(c10::Half half, c10::BFloat16 brain, c10::complex<float> number, Of<c10::complex<float>> *held)
"""
_TAKEN = _TAKES + "{ return half.x + brain.x + number.real_ + number.imag_ + held[1].value.imag_ + held[1].after; }\n"
_GIVES = (
    _TAKES
    + """\
;
int main() {
    c10::Half half; half.x = 1;
    c10::BFloat16 brain; brain.x = 20;
    Of<c10::complex<float>> held[2] = {{{}, 0}, {{0.f, 300.f}, 4}};
    return taken(half, brain, {50.f, 600.f}, held) == 975.f ? 0 : 1;
}
"""
)
# All that the projects do with the types, on a GPU with bfloat16 and one without.
_PROBE = """\
#include <c10/cuda/CUDAException.h>
#include <ATen/cuda/Atomic.cuh>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>
using number = c10::complex<float>;
template <typename T> __global__ void converts(T *to, const T *from, float by) {
    to[threadIdx.x] = T(float(from[threadIdx.x]) * by);
}
__global__ void calculates(number *to, const number *a, const number *b, float by) {
    const number one = a[threadIdx.x], other = b[threadIdx.x];
    number sum = 0;
    sum += one * other - (by > 0 ? number(by) : one);
    sum += by * std::conj(one) * other + 2 * by * other;
    sum *= other;
    to[threadIdx.x] = sum + one * by;
}
__global__ void adds(number *to, float *also, const number *from) {
    gpuAtomicAdd(to, from[threadIdx.x]);
    gpuAtomicAdd(also, from[threadIdx.x].real_);
}
template <typename T> void launch(void *to, void *from) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(&converts<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, 1024));
    converts<<<1, 32>>>(static_cast<T *>(to), static_cast<const T *>(from), 2.f);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}
template void launch<at::Half>(void *, void *);
template void launch<at::BFloat16>(void *, void *);
"""


def _sources() -> list[tuple[str, dict[str, Any]]]:
    """Each source that the recipes build, with its project."""
    texts = {project: (workspace().recipes / project / "recipe.yaml").read_text("utf-8") for project in PROJECTS}
    return [(project, source["then"]) for project, text in texts.items() for source in yaml.safe_load(text)["source"]]


def _name(source: dict[str, Any]) -> str:
    return Path(source["url"]).name.removesuffix(".tar.gz")


def unpacked(project: str, source: dict[str, Any], folder: Path) -> Path:
    """The sources of a recipe with its patches."""
    url = source["url"]
    archive = fetch.Artifact(url, source["sha256"], 0, Path(url).name)
    with tarfile.open(fetch.fetch_all([archive], workspace())[archive]) as tar:
        tar.extractall(folder, filter="data")
    tree = folder / _name(source)
    # With the kernels of this project: all patches.
    listed = [name for entry in source["patches"] for name in ([entry] if isinstance(entry, str) else entry["then"])]
    files, hunks = patched([workspace().recipes / project / name for name in listed], tree)
    assert all(hunk.found is not None for hunk in hunks)
    for name, text in files.items():
        (tree / name).write_text(text, encoding="utf-8")
    return tree


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toolkit(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torch_headers(tmp_path_factory.mktemp("torch"))


@pytest.mark.parametrize(("project", "source"), [pytest.param(*found, id=_name(found[1])) for found in _sources()])
def test_every_cu_file_of_the_recipes_needs_no_header_of_torchs(
    project: str, source: dict[str, Any], tmp_path: Path
) -> None:
    uses_only = cast(Callable[..., bool], runpy.run_path(str(COMMON / "own_headers.py"))["uses_only"])
    tree = unpacked(project, source, tmp_path)
    folders = [tree / "csrc", tree / "csrc/selective_scan"]
    files = sorted((tree / "csrc").rglob("*.cu"))
    assert len(files) > 10
    assert [file.name for file in files if not uses_only(file, OWN, folders, [], [])] == []


def built(text: str, to: Path, *words: str) -> Path:
    """A program or, with ``-c``, an object of it."""
    source = to.with_suffix(".cpp")
    source.write_text(text)
    subprocess.run(["g++", "-std=c++17", source, *words, "-o", to], check=True)
    return to


def test_the_types_are_the_same_for_whoever_is_handed_one(cuda: Path, torch: Path, tmp_path: Path) -> None:
    ours, torchs = [f"-I{OWN}", f"-I{cuda}/include"], [f"-I{torch}", f"-I{cuda}/include"]
    told = [
        subprocess.run([built(_TELLS, tmp_path / name, *flags)], capture_output=True, text=True, check=True).stdout
        for name, flags in (("ours", ours), ("torchs", torchs))
    ]
    assert told[0] == told[1]
    assert told[0].splitlines()[:2] == ["N3c104HalfE 2 2 111", "N3c108BFloat16E 2 2 111"]
    for one, other in ((ours, torchs), (torchs, ours)):
        taken = built(_TAKEN, tmp_path / "taken.o", *one, "-c")
        subprocess.run([built(_GIVES, tmp_path / "gives", *other, str(taken))], check=True)


def compiled(cuda: Path, source: Path, to: Path, *flags: str) -> Path:
    nvcc = [cuda / "bin/nvcc", "-c", source, "-o", to, *flags, f"-I{cuda}/include", f"-I{cuda}/include/cccl", *_FLAGS]
    subprocess.run(nvcc, cwd=source.parent, check=True)
    return to


def test_what_the_projects_do_with_the_types_is_the_same_machine_code(cuda: Path, torch: Path, tmp_path: Path) -> None:
    """On GPUs with an instruction for bfloat16 and without."""
    source = tmp_path / "probe.cu"
    source.write_text(_PROBE)
    assert_same_code(cuda, torch, source, tmp_path, ("75", "80", "90"))


def test_a_whole_file_is_the_same_machine_code(cuda: Path, torch: Path, tmp_path: Path) -> None:
    """The shortest one of causal-conv1d; of all files, docs/builds.md says when they were compared."""
    tree = unpacked(*_sources()[0], tmp_path)
    assert_same_code(cuda, torch, tree / "csrc/causal_conv1d_update.cu", tmp_path, ("90",))


def assert_same_code(cuda: Path, torch: Path, source: Path, scratch: Path, archs: tuple[str, ...]) -> None:
    targets = [word for arch in archs for word in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    ours = compiled(cuda, source, scratch / "ours.o", f"-I{OWN}", *targets)
    torchs = compiled(cuda, source, scratch / "torchs.o", f"-I{torch}", *targets)
    found = gpu_code.compare_libraries(ours, torchs)
    assert found.different == found.only_ours == found.only_theirs == ()
    assert len(found.identical) >= len(archs)
    # The C++ file brings the one function of torch's that is called.
    names = subprocess.run(["nm", "-u", "-C", ours], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"c10::cuda|torch|__cxx11", names)
    assert "ssm_forge::cuda_check(cudaError, char const*, char const*, int)" in names


@pytest.fixture
def build(cuda: Path, tmp_path: Path) -> dict[str, str]:
    """A build's variables, with a compile cache of its own."""
    cache = compile_cache.environment(workspace())
    if not cache["SSM_FORGE_CCACHE"]:
        pytest.skip("not run: ccache can't be installed, because Debian's archive can't be reached")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/.build").symlink_to(cuda)
    (tmp_path / "work/.common").symlink_to(COMMON)
    return {
        **os.environ,
        "SRC_DIR": str(tmp_path / "work"),
        "PREFIX": str(tmp_path / "host_env"),
        "BUILD_PREFIX": str(cuda),
        "PY_VER": "3.12",
        "PYTHON": sys.executable,
        "CU_HEADERS": str(tmp_path / "work/.common/cu_headers"),
        "CCACHE": cache["SSM_FORGE_CCACHE"],
        "CCACHE_DIR": str(tmp_path / "ccache"),
        "CCACHE_COMPILERCHECK": "content",
        "CCACHE_NOHASHDIR": "1",
        # What this machine shares with others is none of this test's business.
        "CCACHE_REMOTE_STORAGE": "",
    }


def with_torch(build: dict[str, str], name: str, source: str) -> bytes:
    """The object of a file, compiled as in a build whose torch has other headers than all other torches."""
    work = Path(build["SRC_DIR"])
    site = Path(build["PREFIX"]).parent / name
    header = site / "torch/include/c10/util/Half.h"
    header.parent.mkdir(parents=True)
    shutil.copy(OWN / "c10/util/Half.h", header)
    with header.open("a") as file:
        file.write(f"inline int {name}() {{ return 1; }}\n")
    (header.parent / "only_torchs.h").write_text("#include <c10/util/Half.h>\n")
    (work / ".site").unlink(missing_ok=True)
    (work / ".site").symlink_to(site)
    (work / "a.cu").write_text(source)
    command = ["bash", COMMON / "compile.sh", Path(build["BUILD_PREFIX"]) / "bin/nvcc", "-objtemp"]
    # As torch before 2.11 asks for them.
    depends = ["--generate-dependencies-with-compile", "--dependency-output", work / "a.o.d"]
    words = [f"-I{site}/torch/include", *depends, "-c", work / "a.cu", "-o", "a.o", "-arch=sm_90", "-std=c++17"]
    subprocess.run([*command, *words], env={**build, "SP_DIR": str(site)}, check=True)
    return (work / "a.o").read_bytes()


def misses(build: dict[str, str]) -> int:
    told = subprocess.run(
        [build["CCACHE"], "--print-stats"], env=build, capture_output=True, text=True, check=True
    ).stdout
    return int(dict(line.split() for line in told.splitlines())["cache_miss"])


def test_the_compile_cache_has_one_object_for_all_torches(build: dict[str, str]) -> None:
    source = "#include <c10/util/Half.h>\n__global__ void f(c10::Half *x) { *x = float(*x) + 1.f; }\n"
    one = with_torch(build, "one", source)
    assert misses(build) == 1
    assert with_torch(build, "other", source) == one
    assert misses(build) == 1
    # A file that stays with torch's headers is compiled for each.
    with_torch(build, "third", f"#include <c10/util/only_torchs.h>\n{source}")
    with_torch(build, "fourth", f"#include <c10/util/only_torchs.h>\n{source}")
    assert misses(build) == 3
