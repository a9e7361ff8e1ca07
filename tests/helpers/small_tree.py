"""A small extension in the shape of the forks."""

from __future__ import annotations

from pathlib import Path

# As the forks write them: capabilities that nobody asked for, a standard that is too old for torch, threads of nvcc's
# own, a question for the GPU, a wheel that is downloaded where there is one.
SETUP = """\
import os, urllib.error, urllib.request
import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CUDAExtension
from wheel.bdist_wheel import bdist_wheel

major, minor = torch.cuda.get_device_capability(torch.device("cuda"))
flags = ["-O3", "-std=c++14", f"-arch=sm_{major}{minor}", "-gencode", "arch=compute_80,code=sm_80", "--threads", "4"]

class CachedWheel(bdist_wheel):
    def run(self):
FIRST
        super().run()

setup(
    name="small_scan",
    version="0.1",
    packages=["small_scan"],
    install_requires=["torch", "einops"],
    ext_modules=[
        CUDAExtension(
            "small_scan_cuda",
            ["csrc/scan.cpp", "csrc/scan_kernel.cu"],
            extra_compile_args={"cxx": ["-O3"], "nvcc": [*flags, "-lineinfo"]},
        )
    ],
    cmdclass={"bdist_wheel": CachedWheel, "build_ext": BuildExtension},
)
"""
KERNEL = """\
#include <ATen/ATen.h>
#include <cub/block/block_scan.cuh>
__global__ void scan_kernel(float *x, int n) {
    using Scan = cub::BlockScan<float, 256>;
    __shared__ typename Scan::TempStorage storage;
    float value = threadIdx.x < n ? x[threadIdx.x] : 0.f;
    Scan(storage).InclusiveSum(value, value);
    if (threadIdx.x < n) x[threadIdx.x] = value;
}
at::Tensor scan(at::Tensor x) {
    auto y = x.clone();
    scan_kernel<<<1, 256>>>(y.data_ptr<float>(), y.numel());
    return y;
}
"""
BINDING = """\
#include <torch/extension.h>
torch::Tensor scan(torch::Tensor x);
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("scan", &scan); }
"""


def small_tree(folder: Path, first: str = "pass") -> Path:
    """An extension with one kernel.

    Args:
        first: what its setup.py does before it compiles.
    """
    files = {
        "setup.py": SETUP.replace("FIRST", f"        {first}"),
        "small_scan/__init__.py": "",
        "csrc/scan.cpp": BINDING,
        "csrc/scan_kernel.cu": KERNEL,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
