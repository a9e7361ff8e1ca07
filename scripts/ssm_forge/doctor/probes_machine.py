"""Looks at the machine round the environment: driver, CUDA toolkits, compilers, variables, caches, disks."""

from __future__ import annotations

import io
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ssm_forge.doctor import binary, symbols
from ssm_forge.doctor.binary import DamagedError, numbers
from ssm_forge.doctor.environment import Environment, text_of
from ssm_forge.doctor.findings import Finding, Target, finding
from ssm_forge.doctor.processes import Clock, ask
from ssm_forge.doctor.system import (
    WSL_FOLDER,
    System,
    free_disk,
    free_memory,
    lacks_file_locks,
    nvcc_release,
)

# One compiler of these kernels takes up to that.
_BYTES_OF_A_JOB = 3_400_000_000
_SMALL_DISK_BYTES = 2_000_000_000
_TORCH_LIBRARIES = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libtorch_python.so")
_SHARED_LIBRARIES = re.compile(
    r"lib(cudart|cudnn|cublas|cublasLt|cusparse|cusolver|nvJitLink|nccl|nvrtc)\.so\.\d+$|libstdc\+\+\.so\.6$"
)
_PRELOAD_HARMS = re.compile(r"lib(cuda|cudart|c10|torch|nccl|cublas|cudnn|stdc\+\+)")
_MOST_CACHED = 200


def probe(env: Environment, system: System, target: Target, clock: Clock) -> Iterator[Finding]:
    """Findings about the machine: driver, toolkit, compilers, variables, caches, disks."""
    yield from _variables(env, system, target)
    yield from _driver(env, system, target)
    yield from _run_time_compiler(env, system, target)
    yield from _toolkit(env, system, target, clock)
    yield from _ninja(env, system, target, clock)
    yield from _memory(system, target)
    yield from _caches(env, system, target)
    yield from _disks(env, system, target)


def _variables(env: Environment, system: System, target: Target) -> Iterator[Finding]:
    for entry in re.split(r"[\s:]+", system.variables.get("LD_PRELOAD", "")):
        if entry and "/" in entry and not Path(entry).exists():
            yield finding("ld-preload", f"LD_PRELOAD={entry}: there is no such file", target=target, module="loader")
        elif _PRELOAD_HARMS.match(Path(entry).name):
            severity = "error" if Path(entry).name in _TORCH_LIBRARIES else "hint"
            yield finding("ld-preload", f"LD_PRELOAD={entry}", target=target, severity=severity, module="loader")
    own = {path.name: path for folder in env.library_folders() for path in folder.glob("lib*.so*")}
    for folder in system.path_of("LD_LIBRARY_PATH"):
        if not folder.is_dir() or folder.resolve() in {own_folder.resolve() for own_folder in env.library_folders()}:
            continue
        for path in sorted(folder.glob("lib*.so*")):
            if path.name in _TORCH_LIBRARIES:
                evidence = f"LD_LIBRARY_PATH has {folder}, with another torch's {path.name}"
                yield finding("ld-library-path", evidence, target=target, module="loader")
                break
            if _SHARED_LIBRARIES.match(path.name) and path.name in own:
                evidence = f"{folder} in LD_LIBRARY_PATH has {path.name}; the environment has {own[path.name]}"
                code = "cudnn-mixed" if path.name.startswith("libcudnn") else "ld-library-path"
                yield finding(code, evidence, target=target, severity="hint", module="loader")
                break


def _driver(env: Environment, system: System, target: Target) -> Iterator[Finding]:
    torch = env.torch
    if system.smi_error and not system.gpus:
        yield finding("driver-broken", f"nvidia-smi: {system.smi_error}", target=target, module="driver")
        return
    if not system.gpus:
        return
    if torch is not None and torch.cuda and system.driver_cuda and numbers(torch.cuda)[0] > system.driver_cuda:
        evidence = (
            f"driver {system.driver_text} runs CUDA {system.driver_cuda}, torch {torch.version} was built "
            f"with CUDA {torch.cuda} ({', '.join(sorted({gpu.name for gpu in system.gpus}))})"
        )
        yield finding("driver-too-old", evidence, target=target, module="driver")
    if any(gpu.capability[0] < 7 for gpu in system.gpus) and all(gpu.capability[0] < 7 for gpu in system.gpus):
        gpu = system.gpus[0]
        evidence = f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        yield finding("gpu-too-old", evidence, target=target, module="driver")
    folders = [*system.path_of("LD_LIBRARY_PATH"), *system.loader_folders()]
    if not any((folder / "libcuda.so.1").exists() for folder in folders):
        evidence = f"libcuda.so.1 is in none of {len(folders)} folders of the loader"
        if Path(WSL_FOLDER, "libcuda.so.1").exists():
            evidence += f"; WSL has it in {WSL_FOLDER}"
        yield finding("no-libcuda", evidence, target=target, module="driver")


def _run_time_compiler(env: Environment, system: System, target: Target) -> Iterator[Finding]:
    """What Triton needs when a kernel is first used: only where there is a GPU to use it on."""
    if not system.gpus or env.distribution("triton") is None:
        return
    named = system.variables.get("CC", "").split(" ")[0]
    if not any(system.which(name) for name in (named, "cc", "gcc", "clang") if name):
        evidence = f"CC={named}: no such program" if named else "no cc, gcc or clang on PATH, and CC is not set"
        yield finding("no-c-compiler", evidence, target=target, module="triton")
    if not (env.include / "Python.h").exists():
        yield finding("no-python-headers", f"{env.include}/Python.h is missing", target=target, module="triton")


def _toolkit(env: Environment, system: System, target: Target, clock: Clock) -> Iterator[Finding]:
    home = system.variables.get("CUDA_HOME", "")
    if home.startswith(":") or home.endswith(":") or (":" in home and not Path(home).exists()):
        yield finding("cuda-home-colon", f"CUDA_HOME={home}", target=target, severity="warning", module="toolkit")
    elif home and not (Path(home) / "bin/nvcc").exists():
        state = "is an empty folder" if Path(home).is_dir() and not any(Path(home).iterdir()) else "has no bin/nvcc"
        state = state if Path(home).is_dir() else "is no folder"
        evidence = f"CUDA_HOME={home} {state}"
        yield finding("cuda-home-elsewhere", evidence, target=target, severity="warning", module="toolkit")
    if not system.nvccs:
        yield finding(
            "no-nvcc",
            "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda",
            target=target,
            severity="hint",
            module="toolkit",
        )
        return
    first = system.nvccs[0]
    release = nvcc_release(first, system.variables, clock)
    if len(system.nvccs) > 1:
        yield finding("several-nvcc", ", ".join(map(str, system.nvccs[:4])), target=target, module="toolkit")
    if release and env.torch and env.torch.cuda and release[0] != numbers(env.torch.cuda)[0]:
        evidence = f"{first} is of CUDA {release[0]}.{release[1]}, torch {env.torch.version} of CUDA {env.torch.cuda}"
        yield finding("toolkit-mismatch", evidence, target=target, severity="hint", module="toolkit")
    yield from _host_compiler(first, system, target, clock)


def _host_compiler(nvcc: Path, system: System, target: Target, clock: Clock) -> Iterator[Finding]:
    compiler = system.which(system.variables.get("CXX", "").split(" ")[0] or "g++")
    if compiler is None:
        yield finding(
            "no-cxx-compiler", "no g++ on PATH, and CXX names none", target=target, severity="hint", module="toolkit"
        )
        return
    root = nvcc.resolve().parent.parent
    folders = ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include")
    header = next((text for folder in folders if (text := text_of(root / folder / "crt/host_config.h"))), "")
    highest = re.search(r"__GNUC__ > (\d+)", header)
    version_text = ask([compiler, "-dumpfullversion", "-dumpversion"], system.variables, clock.left(0.3)).output.strip()
    version = numbers(version_text)
    if version and highest and version[0] > int(highest.group(1)):
        evidence = f"{compiler} is {version_text}; {nvcc} takes g++ up to {highest.group(1)}"
        yield finding("host-compiler-too-new", evidence, target=target, severity="hint", module="toolkit")
    elif version and version[0] < 9:
        evidence = f"{compiler} is {version_text}; torch's headers take g++ from 9 on"
        yield finding("host-compiler-too-old", evidence, target=target, severity="hint", module="toolkit")


def _ninja(env: Environment, system: System, target: Target, clock: Clock) -> Iterator[Finding]:
    if env.distribution("ninja") is None:
        return
    program = env.prefix / "bin/ninja"
    if not program.exists():
        if env.kind == "venv":
            yield finding(
                "ninja-broken",
                f"ninja is installed, {program} is missing",
                target=target,
                severity="warning",
                module="ninja",
            )
        return
    answer = ask([str(program), "--version"], system.variables, clock.left(0.3))
    if answer.code not in (0, None):
        last_line = (answer.errors.strip().splitlines() or [f"exit status {answer.code}"])[-1][:200]
        yield finding("ninja-broken", f"{program}: {last_line}", target=target, severity="warning", module="ninja")


def _memory(system: System, target: Target) -> Iterator[Finding]:
    jobs, free = system.variables.get("MAX_JOBS", ""), free_memory()
    if jobs.isdigit() and free and int(jobs) > 1 and int(jobs) * _BYTES_OF_A_JOB > free:
        evidence = f"MAX_JOBS={jobs}, and {free / 1e9:.1f} GB of memory are free: enough for {free // _BYTES_OF_A_JOB}"
        yield finding("too-little-memory", evidence, target=target, module="memory")


def _caches(env: Environment, system: System, target: Target) -> Iterator[Finding]:
    home = Path(system.variables.get("HOME", "/nonexistent"))
    triton = Path(system.variables.get("TRITON_CACHE_DIR") or home / ".triton/cache")
    for number, path in enumerate(triton.glob("*/*.so")):
        if number >= _MOST_CACHED:
            break
        try:
            binary.read(path)
        except DamagedError as error:
            yield finding("triton-cache", str(error), target=target, severity="warning", module="triton")
            break
        except OSError:
            continue
    if env.torch is None:
        return
    cache = Path(system.variables.get("PIP_CACHE_DIR") or home / ".cache/pip")
    for number, wheel in enumerate((cache / "wheels").glob("*/*/*/*/*.whl")):
        if number >= _MOST_CACHED:
            break
        if re.match(r"(causal_conv1d|mamba_ssm)-", wheel.name):
            built = _torch_of_wheel(wheel)
            if built and env.torch.minor not in built:
                evidence = f"{wheel} was built for torch {' or '.join(built)}; installed is {env.torch.version}"
                yield finding("pip-cache", evidence, target=target, module="pip")


def _torch_of_wheel(wheel: Path) -> tuple[str, ...]:
    """The minor releases of torch that the extension in a wheel fits; empty where it can't be told."""
    try:
        with zipfile.ZipFile(str(wheel)) as archive:
            for name in archive.namelist():
                if re.match(r"(causal_conv1d|selective_scan)_cuda[^/]*\.so$", name):
                    if archive.getinfo(name).file_size > 1 << 30:
                        return ()
                    with tempfile.NamedTemporaryFile(suffix=".so") as copy:
                        with archive.open(name) as source:
                            for block in iter(lambda: source.read(io.DEFAULT_BUFFER_SIZE << 7), b""):
                                copy.write(block)
                        copy.flush()
                        return symbols.built_for(binary.read(Path(copy.name)).undefined)
    except (OSError, zipfile.BadZipFile, DamagedError, RuntimeError, ValueError):
        return ()
    return ()


def _disks(env: Environment, system: System, target: Target) -> Iterator[Finding]:
    home = Path(system.variables.get("HOME", "/"))
    temporary = Path(system.variables.get("TMPDIR") or "/tmp")
    for folder in (env.prefix, temporary, home):
        free = free_disk(folder)
        if free is not None and free < _SMALL_DISK_BYTES:
            evidence = f"{folder}: {free / 1e9:.1f} GB free"
            yield finding("disk-nearly-full", evidence, target=target, module="disk")
    cache = system.variables.get("SSM_FORGE_CACHE_DIR") or system.variables.get("XDG_CACHE_HOME") or str(home)
    if Path(cache).is_dir() and lacks_file_locks(Path(cache)):
        yield finding(
            "no-file-locks",
            f"{cache} is on a file system without file locks",
            target=target,
            severity="hint",
            module="disk",
        )
