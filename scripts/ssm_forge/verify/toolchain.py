"""What a careful person checks by hand before compiling: C library, g++, nvcc, cuDNN, torch, and that they fit."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from packaging.version import Version

from ssm_forge.base import machine, platforms
from ssm_forge.base.activation import activated_environment
from ssm_forge.base.errors import BuildError, ForgeError, InstallError
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.ui import Log, say
from ssm_forge.bridge.torch_patch import read_host_config
from ssm_forge.build.origin import Origin
from ssm_forge.channel import folder as channel
from ssm_forge.install import marker
from ssm_forge.install import prefix as install
from ssm_forge.manifest.variants import Variant
from ssm_forge.package import installed as package_installed
from ssm_forge.solve import prefix as solve_prefix
from ssm_forge.verify.report import Check, Report

_TIMEOUT_SECONDS = 120

_KERNEL = """\
#include <cub/cub.cuh>
#include <cuda_bf16.h>
#include <vector>
__global__ void sum(float *x) {
    using Reduce = cub::BlockReduce<float, 128>;
    __shared__ typename Reduce::TempStorage storage;
    float total = Reduce(storage).Sum(expf(x[threadIdx.x]));
    if (threadIdx.x == 0) x[0] = __bfloat162float(__float2bfloat16(total));
}
extern "C" int release() {
    int version = static_cast<int>(std::vector<int>{0}.front());
    cudaRuntimeGetVersion(&version);
    sum<<<1, 128>>>(nullptr);
    return version;
}
"""

_CUDNN = "import torch; print(torch.backends.cudnn.version())"
_TORCH = "import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())"


def specs(variant: Variant) -> tuple[str, ...]:
    """Match specs of a variant's toolchain, for both sources of packages: conda's newest would be other releases."""
    classic = variant.cuda == "11.8"
    own = platforms.here().subdir
    names = ["cuda-nvcc" if classic else f"cuda-nvcc_{own}", "cuda-cudart-dev", "cuda-version"]
    # Of the bridge, the compiler is the machine's.
    compiler = f"gxx_{own}" if variant.source == "bridge" else f"gxx_{own} {variant.row['cxx_compiler_version']}.*"
    wanted = [*(f"{name} {variant.cuda}.*" for name in names), compiler]
    if classic:
        wanted += ["cuda-cccl", "cudnn 8.9.*"]
    elif variant.source == "bridge":
        # conda-forge has none for each CUDA.
        wanted.append("libcudnn-dev")
    return tuple(wanted)


def environment(origin: Origin, workspace: Workspace, log: Log) -> Path:
    """An environment with the toolchain and torch; made if it is not there yet.

    Raises:
        SolveError, InstallError: when it can't be made.
    """
    variant, python = origin.variant, origin.python
    channel.ensure_indexed(workspace.channel)
    # Not among the environments: those are what `verify` and `python` choose from.
    prefix = workspace.state / "toolchains" / f"{variant.name}-py{python.replace('.', '')}"
    wanted = (*specs(variant), f"python {python}.*", variant.torch_spec)
    records = solve_prefix.solve_for_prefix(wanted, origin.channels, prefix=None, cuda=variant.cuda)
    names = tuple(sorted(record.file_name for record in records))
    present = marker.read_marker(prefix)
    if present is None or present.packages != names:
        say(f"Making {prefix}")
        installed = marker.Installed(variant.name, python, variant.source, names, created=True)
        install.install(records, prefix, installed, workspace, log)
    return prefix


def check(prefix: Path, variant: Variant) -> Report:
    """Check the toolchain of an environment, activated as its user would have it.

    Raises:
        InstallError: when it can't be activated, or has no toolchain.
    """
    if not (prefix / "bin/nvcc").exists():
        raise InstallError(
            f"{prefix} has no nvcc.",
            fix=f"'{launcher()} check-toolchain --variant {variant.name}' without --prefix makes an environment "
            "that has one.",
        )
    env = activated_environment(prefix)
    questions: list[tuple[str, Callable[[], str]]] = [
        ("glibc", lambda: _glibc(prefix)),
        ("activation", lambda: _activation(env, prefix)),
        ("nvcc", lambda: _nvcc(env, prefix, variant)),
        ("g++", lambda: _gxx(env, prefix, variant)),
        ("cuDNN", lambda: _cudnn(env, prefix, variant)),
        ("torch", lambda: _torch(env, variant)),
        ("compiles", lambda: _compiles(env, prefix, variant)),
    ]
    return Report(prefix, tuple(_answer(name, ask) for name, ask in questions))


def _answer(name: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(name, "pass", ask())
    except ForgeError as error:
        return Check(name, "fail", error.what)


def _glibc(prefix: Path) -> str:
    running = machine.glibc()
    record = package_installed.records(prefix).get(f"sysroot_{platforms.here().subdir}")
    sysroot = record.version if record is not None else ""
    if not running:
        raise BuildError("this machine's C library does not tell its version")
    if sysroot and Version(sysroot).release[:2] > Version(running).release[:2]:
        raise BuildError(
            f"{running} here, but the compiler makes programs for {sysroot}; what is built may not run here"
        )
    return f"{running} here; programs are made for {sysroot or running}"


def _activation(env: Mapping[str, str], prefix: Path) -> str:
    """No package sets CUDA_HOME: torch finds the toolkit by the nvcc on PATH, unless someone else has set it."""
    home = env.get("CUDA_HOME", "")
    if home and Path(home) != prefix:
        raise BuildError(f"CUDA_HOME is '{home}', not {prefix}; unset it")
    first = env.get("PATH", "").split(":")[0]
    if Path(first) != prefix / "bin":
        raise BuildError(f"PATH begins with '{first}', not with {prefix}/bin")
    return f"PATH begins with {first}; CC={env.get('CC', '')}, CXX={env.get('CXX', '')}"


def _nvcc(env: Mapping[str, str], prefix: Path, variant: Variant) -> str:
    found_at = shutil.which("nvcc", path=env.get("PATH", ""))
    if found_at is None or not Path(found_at).resolve().is_relative_to(prefix.resolve()):
        raise BuildError(f"nvcc is {found_at or 'not on PATH'}, not the environment's")
    answer = _run(env, "nvcc", "-V")
    release = re.search(r"release (\d+\.\d+), V([\d.]+)", answer)
    if release is None:
        raise BuildError(f"nvcc -V answers '{answer.strip()[-200:]}'")
    if release.group(1) != variant.cuda:
        raise BuildError(f"release {release.group(1)}, not {variant.cuda}")
    if variant.cuda == "11.8" and release.group(2) != "11.8.89":
        raise BuildError(f"V{release.group(2)}, not V11.8.89")
    return release.group(0)


def _gxx(env: Mapping[str, str], prefix: Path, variant: Variant) -> str:
    compiler = env.get("CXX", "")
    if not compiler:
        raise BuildError("activation sets no CXX")
    version = _run(env, compiler, "-dumpfullversion").strip()
    folders = (prefix / platforms.here().targets / "include", prefix / "include")
    header = next((h for folder in folders if (h := folder / "crt/host_config.h").exists()), None)
    if header is None:
        raise BuildError(f"{prefix} has no crt/host_config.h")
    newest = read_host_config(header.read_text(encoding="utf-8"), variant.cuda).gcc
    if int(version.split(".")[0]) > newest:
        raise BuildError(f"{version} ({compiler}); this nvcc takes g++ up to {newest}")
    return f"{version} ({compiler}); this nvcc takes g++ up to {newest}"


def _cudnn(env: Mapping[str, str], prefix: Path, variant: Variant) -> str:
    """The cuDNN whose headers are there; without headers, for conda-forge has them not for each CUDA, torch's."""
    expected = variant.row["cudnn"].split(".")[:3]
    header = prefix / "include/cudnn_version.h"
    if header.exists():
        text = header.read_text(encoding="utf-8")
        version = ".".join(re.findall(r"^#define CUDNN_(?:MAJOR|MINOR|PATCHLEVEL) (\d+)", text, re.MULTILINE))
        where = str(header)
    elif variant.cuda == "11.8":
        raise BuildError(f"no {header}")
    else:
        number = int(_run(env, "python", "-W", "ignore", "-c", _CUDNN).split()[-1])
        version, where = f"{number // 10000}.{number // 100 % 100}.{number % 100}", "of torch; no headers are installed"
    if version.split(".")[: len(expected)] != expected:
        raise BuildError(f"{version} ({where}), not {'.'.join(expected)}")
    return f"{version} ({where})"


def _torch(env: Mapping[str, str], variant: Variant) -> str:
    version, cuda, cudnn = _run(env, "python", "-W", "ignore", "-c", _TORCH).split()[-3:]
    answer = f"torch {version}, torch.version.cuda {cuda}, its cuDNN {cudnn}"
    if not version.startswith(f"{variant.torch}."):
        raise BuildError(f"{answer}; the variant has torch {variant.torch}")
    if cuda.split(".")[0] != variant.cuda.split(".")[0]:
        raise BuildError(f"{answer}; the variant has CUDA {variant.cuda}")
    return answer


def _compiles(env: Mapping[str, str], prefix: Path, variant: Variant) -> str:
    """Compile a kernel with CUB, link it with the C++ compiler, load it and ask for the CUDA runtime."""
    capability = variant.supported_archs[0].sm
    with tempfile.TemporaryDirectory() as scratch:
        source, thing, library = (str(Path(scratch, name)) for name in ("k.cu", "k.o", "libk.so"))
        Path(source).write_text(_KERNEL, encoding="utf-8")
        # NVIDIA's own packages of 11.8 activate nothing.
        host = () if "-ccbin" in env.get("NVCC_PREPEND_FLAGS", "") else ("-ccbin", env["CXX"])
        _run(
            env, "nvcc", *host, "-std=c++17", f"-arch=sm_{capability}", "-Xcompiler", "-fPIC", "-c", source, "-o", thing
        )
        folders = [f"-L{prefix}/lib", f"-Wl,-rpath,{prefix}/lib"]
        _run(env, env["CXX"], "-shared", thing, "-o", library, *folders, "-lcudart")
        loaded = _run(env, "python", "-c", f"import ctypes; print(ctypes.CDLL({library!r}).release())")
    number = int(loaded.split()[-1])
    result = f"sm_{capability} kernel with CUB compiled, linked and loaded"
    # Without a driver the runtime answers 0 or its own release, depending on its own release.
    return f"{result}; runtime {number // 1000}.{number % 1000 // 10}" if number else result


def _run(env: Mapping[str, str], *command: str) -> str:
    try:
        done = subprocess.run(
            command, env=dict(env), capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise BuildError(f"{Path(command[0]).name} failed: {lines[-1] if lines else done.returncode}")
    return done.stdout
