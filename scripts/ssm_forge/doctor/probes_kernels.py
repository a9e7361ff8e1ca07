"""Looks at the kernels' own files: are they there, for this Python, this torch, this GPU, this C library?"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ssm_forge.doctor import binary, symbols
from ssm_forge.doctor.binary import DamagedError, Library, numbers
from ssm_forge.doctor.environment import PROJECTS, Distribution, Environment, text_of
from ssm_forge.doctor.findings import Finding, Target, finding
from ssm_forge.doctor.system import System

PACKAGES = {"causal-conv1d": "causal_conv1d", "mamba-ssm": "mamba_ssm"}
# Tegra's own: no other GPU of the same major runs code for them, and they run nobody else's.
_TEGRA = {53, 62, 72, 87, 101, 110}
# PTX version -> the CUDA release that writes it; the driver must be that new.
_PTX_CUDA = {
    **{78: (11, 8), 80: (12, 0), 81: (12, 1), 82: (12, 2), 83: (12, 3), 84: (12, 4), 85: (12, 5), 86: (12, 7)},
    **{87: (12, 8), 88: (12, 9), 90: (13, 0), 91: (13, 1), 92: (13, 2), 93: (13, 3)},
}
_DRIVER_CUDA = (
    *((590, (13, 1)), (580, (13, 0)), (575, (12, 9)), (570, (12, 8)), (565, (12, 7)), (560, (12, 6))),
    *((555, (12, 5)), (550, (12, 4)), (545, (12, 3)), (535, (12, 2)), (530, (12, 1)), (525, (12, 0))),
)
# Of the working folder.
_MOST_FILES, _MOST_FOLDERS, _MOST_DEPTH = 300, 100, 3
_NO_PROJECT = frozenset({"proc", "sys", "dev", "site-packages", "dist-packages", "node_modules", "__pycache__"})


def probe(env: Environment, system: System, target: Target) -> Iterator[Finding]:
    """Findings about the two extension modules and their packages."""
    for module, project in PROJECTS.items():
        distribution = env.distribution(project)
        files = env.extensions(module)
        fitting = [path for path in files if _fits_python(path.name, module, env)]
        if fitting:
            yield from _examine(fitting[0], module, env, system, target)
        elif files:
            names = ", ".join(path.name for path in files[:3])
            yield finding(
                "other-python",
                f"{files[0].parent} has {names}; Python here is {env.version}",
                target=target,
                module=module,
            )
        elif distribution is not None:
            yield _missing(module, distribution, env, target)
        else:
            origin = env.origins.get(PACKAGES[project])
            beside = f"; its source folder {origin.parent} has no {module}" if origin else ""
            evidence = f"{project}: not in {env.sites[0] if env.sites else env.prefix}{beside}"
            yield finding("not-installed", evidence, target=target, module=module)
    yield from _shadowed(env, target)
    yield from _fork(env, system, target)


def _fits_python(name: str, module: str, env: Environment) -> bool:
    tag = name[len(module) :]
    return tag in (env.suffix, ".so") or tag.startswith(".abi3")


def _missing(module: str, distribution: Distribution, env: Environment, target: Target) -> Finding:
    reasons = [f"{distribution.name} {distribution.version} in {distribution.folder} has no {module}"]
    if distribution.pure:
        reasons.append("its wheel is pure Python: built with *_SKIP_CUDA_BUILD, or without MAMBA_KEEP_CUDA_BUILD=TRUE")
    package = distribution.folder / PACKAGES[distribution.name]
    interface = text_of(package / "ops/selective_scan_interface.py")
    if re.search(r"try:\s+import selective_scan_cuda\s+except", interface):
        reasons.append("mamba_ssm catches the ImportError and goes on without it")
    if list(package.parent.glob("selective_scan_cuda_*.so")) and module == "selective_scan_cuda":
        reasons.append("there are VMamba's kernels, which do not replace it")
    return finding("kernels-missing", *reasons, target=target, module=module)


def _shadowed(env: Environment, target: Target) -> Iterator[Finding]:
    for project, package in PACKAGES.items():
        distribution, origin = env.distribution(project), env.origins.get(package)
        if distribution is None or origin is None or distribution.editable:
            continue
        installed = distribution.folder / package
        folder = origin.parent if origin.name == "__init__.py" else origin
        if installed.is_dir() and folder.resolve() != installed.resolve():
            evidence = f"import {package} takes {folder}, installed is {installed} ({distribution.version})"
            yield finding("shadowed", evidence, target=target, module=package)


def _fork(env: Environment, system: System, target: Target) -> Iterator[Finding]:
    """The code in the working folder calls a fork's Mamba, and PyPI's is installed."""
    origin = env.origins.get("mamba_ssm")
    if origin is None or "bimamba" in text_of(origin.parent / "modules/mamba_simple.py"):
        return
    for path in _python_files(system.folder):
        match = re.search(r"\bbimamba(_type)?\s*=", text_of(path))
        if match is not None and "site-packages" not in path.parts:
            evidence = f"{path} calls Mamba({match.group().strip()}...), and {origin.parent} has no bimamba"
            yield finding("fork-shadowed", evidence, target=target, module="mamba_ssm")
            return


def _python_files(folder: Path) -> list[Path]:
    """Some Python files of a project: a working folder may as well be a home, or the root of all."""
    paths: list[Path] = []
    for number, (folder_path, folders, files) in enumerate(os.walk(str(folder))):
        depth = len(Path(folder_path).relative_to(folder).parts)
        inside = sorted(name for name in folders if not name.startswith(".") and name not in _NO_PROJECT)
        folders[:] = inside if depth < _MOST_DEPTH else []
        paths += [Path(folder_path) / name for name in sorted(files) if name.endswith(".py")]
        if number >= _MOST_FOLDERS or len(paths) >= _MOST_FILES:
            break
    return paths[:_MOST_FILES]


def _examine(path: Path, module: str, env: Environment, system: System, target: Target) -> Iterator[Finding]:
    try:
        library = binary.read(path)
    except DamagedError as error:
        yield finding("damaged-library", str(error), target=target, module=module)
        return
    yield from _symbols(library, module, env, target)
    yield from _c_library(library, module, env, system, target)
    yield from _cuda_runtime(library, module, env, target)
    yield from _gpu_code(library, module, system, target)


def _symbols(library: Library, module: str, env: Environment, target: Target) -> Iterator[Finding]:
    if env.torch is None or not env.torch.libraries:
        return
    undefined = {symbol for symbol in library.undefined if symbols.OF_TORCH.match(symbol)}
    for path in env.torch.libraries:
        try:
            undefined -= binary.defines(path, undefined)
        except DamagedError as error:
            yield finding("damaged-library", str(error), target=target, module="torch")
            return
    names = {path.name for path in env.torch.libraries}
    if not undefined or not {"libc10.so", "libtorch_cpu.so"} <= names:
        return
    plain = sorted(symbol for symbol in undefined if not symbols.says_abi(symbol))
    shown = (plain or sorted(undefined))[0]
    evidence = [f"{library.path.name}: undefined symbol {shown}", f"that is {symbols.demangle(shown)}"]
    built = symbols.built_for(library.undefined)
    own_abi, torch_abi = symbols.abi(library.undefined), _torch_abi(env)
    if plain or not (own_abi and torch_abi and own_abi != torch_abi):
        built_for_text = f"torch {span(built)}" if built and env.torch.minor not in built else "another torch"
        evidence.append(
            f"it was built for {built_for_text}; installed is torch {env.torch.version} in {env.torch.folder}"
        )
        yield finding("other-torch", *evidence, target=target, module=module)
    else:
        evidence.append(f"it has the {own_abi} C++11 ABI, torch {env.torch.version} the {torch_abi} one")
        yield finding("cxx11-abi", *evidence, target=target, module=module)


def _torch_abi(env: Environment) -> str:
    probes = {
        "new": "_ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
        "old": "_ZN3c105ErrorC2ENS_14SourceLocationESs",
    }
    for path in env.torch.libraries if env.torch else ():
        if path.name == "libc10.so":
            defined = binary.defines(path, probes.values())
            return next((name for name, symbol in probes.items() if symbol in defined), "")
    return ""


def span(minors: tuple[str, ...]) -> str:
    """Minor releases in a row as text: ``2.3 to 2.7``."""
    return minors[0] if len(minors) == 1 else f"{minors[0]} to {minors[-1]}"


def _c_library(library: Library, module: str, env: Environment, system: System, target: Target) -> Iterator[Finding]:
    needed = library.highest("GLIBC")
    if system.glibc and needed > system.glibc:
        evidence = f"{library.path.name} needs GLIBC {_dotted(needed)}; this system has {_dotted(system.glibc)}"
        yield finding("glibc-too-old", evidence, target=target, module=module)
    for prefix in ("GLIBCXX", "CXXABI"):
        needed = library.highest(prefix)
        for folder in [*system.path_of("LD_LIBRARY_PATH"), env.prefix / "lib", *system.loader_folders()]:
            file = folder / "libstdc++.so.6"
            if needed and file.exists():
                offered = binary.version_texts(file, prefix)
                if offered and offered < needed:
                    evidence = f"{library.path.name} needs {prefix}_{_dotted(needed)}; {file} offers {_dotted(offered)}"
                    yield finding("libstdcxx-too-old", evidence, target=target, module=module)
                break


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _cuda_runtime(library: Library, module: str, env: Environment, target: Target) -> Iterator[Finding]:
    for name in library.needed:
        match = re.match(r"libcudart\.so\.(\d+)", name)
        if match is not None and env.torch and env.torch.cuda:
            torch_major = numbers(env.torch.cuda)[0]
            if int(match.group(1)) != torch_major:
                evidence = f"{library.path.name} needs {name}; torch {env.torch.version} brings CUDA {env.torch.cuda}"
                yield finding("cuda-runtime-missing", evidence, target=target, module=module)


def _gpu_code(library: Library, module: str, system: System, target: Target) -> Iterator[Finding]:
    if not library.sass and not library.ptx:
        return
    for gpu in system.gpus:
        number = gpu.capability[0] * 10 + gpu.capability[1]
        if any(_runs(code, number) for code in library.sass):
            continue
        usable = [version for code, version in library.ptx if code <= number]
        inside = ", ".join(
            [*(f"sm_{code}" for code in sorted(library.sass)), *(f"PTX for {code}" for code, _ in sorted(library.ptx))]
        )
        evidence = f"{library.path.name} holds {inside}; {gpu.name} is sm_{number}"
        if not usable:
            yield finding("no-kernel-image", evidence, target=target, module=module)
        elif system.driver and _driver_release(system.driver[0]) < _PTX_CUDA.get(min(usable), (0, 0)):
            release = _PTX_CUDA[min(usable)]
            evidence += f"; its PTX is of CUDA {_dotted(release)}, newer than driver {system.driver_text} compiles"
            yield finding("ptx-too-new", evidence, target=target, module=module)


def _runs(code: int, gpu: int) -> bool:
    """Machine code runs on later minors of its major; Tegra's only on itself."""
    return code == gpu or (code // 10 == gpu // 10 and code <= gpu and code not in _TEGRA and gpu not in _TEGRA)


def _driver_release(branch: int) -> tuple[int, int]:
    return next((release for first, release in _DRIVER_CUDA if branch >= first), (11, 8))
