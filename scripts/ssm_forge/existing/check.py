"""Verifies the kernels in an environment of wheels: the questions of ``verify``, asked of its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ssm_forge.base import platforms
from ssm_forge.base.paths import launcher
from ssm_forge.existing import install, torch
from ssm_forge.existing.reader import Distribution, Existing
from ssm_forge.manifest.recipe import EXTENSIONS
from ssm_forge.package import libraries as elf
from ssm_forge.package import wheel
from ssm_forge.verify import gpu
from ssm_forge.verify import installed as verify
from ssm_forge.verify.report import Check, Report

# Of the system, where an environment brings none.
_SYSTEMS = ("libstdc++.so.6", "libgcc_s.so.1")
_OWN = ("PYTHONPATH", "PYTHONHOME", "SSM_FORGE_LAUNCHER", "LD_LIBRARY_PATH", "PIXI_IN_SHELL", "INIT_CWD")


def run(existing: Existing) -> Report:
    """The report of every check of an environment that this machine can run; nothing is written into the environment.

    Raises:
        InstallError: when its torch can't be read.
    """
    env_torch = torch.read(existing)
    environment = activated(existing)
    packages = {project: install.installed(existing, project) for project in EXTENSIONS}
    imports = verify.imports(existing.python, existing.prefix, environment, existing.folders)
    checks = [_packages(existing, packages), *imports]
    for project, extension in EXTENSIONS.items():
        library = next(iter(sorted(existing.site.glob(f"{extension}.*.so"))), None)
        record = _record(packages[project])
        if library is None or not record:
            checks.append(Check(f"{extension}: library", "fail", f"{extension} of ours is not in {existing.site}"))
            continue
        checks += _library_checks(extension, library, record, existing, env_torch)
    checks += verify.gpu_checks(existing.python, environment)
    return Report(existing.prefix, tuple(checks))


def _library_checks(
    extension: str, library: Path, record: dict[str, Any], existing: Existing, env_torch: torch.Torch
) -> list[Check]:
    return [
        verify.checked(f"{extension}: libraries and symbols", lambda: _links(library, existing, env_torch)),
        verify.checked(f"{extension}: GPU code", lambda: verify.gpu_code(library, record["build"])),
        verify.checked(f"{extension}: glibc", lambda: verify.glibc(library, record["depends"])),
        verify.checked(f"{extension}: kernels", lambda: verify.whose_kernels(extension, library, record["build"])),
        verify.checked(f"{extension}: torch", lambda: _made_for(record, env_torch)),
    ]


def activated(existing: Existing) -> dict[str, str]:
    """The variables of a shell in which the environment is activated, and bytecode switched off."""
    kept = {key: value for key, value in os.environ.items() if key not in _OWN}
    path = os.pathsep.join((str(existing.prefix / "bin"), kept.get("PATH", "")))
    where = {"VIRTUAL_ENV": str(existing.prefix)} if existing.kind == "venv" else {}
    if existing.target is not None:
        where["PYTHONPATH"] = str(existing.target)
    return {**kept, **where, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}


def place(existing: Existing) -> gpu.Place:
    """The environment as the proofs that take a GPU run in it."""
    packages = {project: install.installed(existing, project) for project in EXTENSIONS}
    versions = {project: package.version for project, package in packages.items() if package is not None}
    has_pytest = "pytest" in existing.distributions
    return gpu.Place(existing.prefix, existing.python, activated(existing), versions, has_pytest)


def _record(distribution: Distribution | None) -> dict[str, Any]:
    """What conda's record of the package would say; empty where it is none of ours."""
    return wheel.read_origin(distribution.info) if distribution is not None else {}


def _packages(existing: Existing, packages: dict[str, Distribution | None]) -> Check:
    lacking = [project for project, package in packages.items() if not _record(package)]
    if lacking:
        how = f"run '{launcher()} install-mamba {existing.option}'"
        return Check("packages intact", "fail", f"{', '.join(lacking)} of ours not in {existing.site}; {how}")
    present = [package for package in packages.values() if package is not None]
    wrong = [path for package in present for path in install.changed(existing.site, package)]
    if wrong:
        return Check("packages intact", "fail", f"changed or missing: {', '.join(wrong[:5])}")
    return Check("packages intact", "pass", ", ".join(f"{d.name} {d.version} {_record(d)['build']}" for d in present))


def _made_for(record: dict[str, Any], env_torch: torch.Torch) -> tuple[bool, str]:
    torch_spec = next((spec for spec in record["depends"] if spec.startswith("pytorch ")), "")
    fits = env_torch.identity[:8] in torch_spec
    there = f"there is torch {env_torch.version} ({env_torch.identity[:8]})"
    return fits, f"made for {torch_spec.removeprefix('pytorch ')}, {there}"


def _links(path: Path, existing: Existing, env_torch: torch.Torch) -> tuple[bool, str]:
    """Everything that the library needs is in torch, beside it, in the interpreter, or the system's C++ runtime."""
    library = elf.read(path)
    folders = [env_torch.folder / "lib", *sorted(env_torch.folder.parent.glob("nvidia/*/lib")), existing.base / "lib"]
    loaded = [file for folder in folders for file in sorted(folder.glob("*.so*"))]
    loaded.sort(key=lambda file: not file.name.startswith(("libtorch", "libc10")))
    interpreter = [Path(os.path.realpath(existing.python)), *sorted((existing.base / "lib").glob("libpython3*.so.1.0"))]
    resolved = elf.resolve(library, existing.prefix, [*interpreter, *loaded, *_runtime()])
    problems = [
        *(f"rpath {rpath} is a path of the build machine" for rpath in library.foreign_rpaths),
        *(f"{name} is nowhere in the environment" for name in resolved.missing_libraries if name in library.needed),
        *(f"undefined symbol {name}" for name in resolved.missing_symbols[:5]),
    ]
    if problems:
        return False, "; ".join(problems)
    return True, f"{len(library.undefined)} symbols, all found in torch, the environment or the system's C++ runtime"


def _runtime() -> list[Path]:
    """The system's C++ runtime."""
    places = [Path(folder) for folder in (f"/usr/lib/{platforms.here().multiarch}", "/usr/lib64", "/lib64", "/usr/lib")]
    return [
        next((folder / name for folder in places if (folder / name).exists()), Path(name))
        for name in _SYSTEMS
        if any((folder / name).exists() for folder in places)
    ]
