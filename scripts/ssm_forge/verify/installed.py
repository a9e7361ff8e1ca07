"""Proves that an installed environment works. Each check passes, fails, or says why it was not run."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

from ssm_forge.base import machine
from ssm_forge.base.activation import activated_environment
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import ForgeError, InstallError, MachineError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import launcher, workspace
from ssm_forge.base.platforms import Platform
from ssm_forge.install import marker as install_marker
from ssm_forge.install import registry
from ssm_forge.manifest.recipe import EXTENSIONS
from ssm_forge.package import kernels as package_kernels
from ssm_forge.package import libraries as elf
from ssm_forge.package.installed import InstalledPath, InstalledRecord
from ssm_forge.package.installed import records as installed_records
from ssm_forge.verify import emulator
from ssm_forge.verify.report import Check, Report

_IMPORT_TIMEOUT_SECONDS = 300
# Seen: what takes 5 s takes 2 min.
_EMULATED_TIMEOUT_SECONDS = 1800
_GPU_TIMEOUT_SECONDS = 900

# torch comes first in the same process, as upstream requires.
_IMPORTS = ("torch", "causal_conv1d_cuda", "selective_scan_cuda", "causal_conv1d", "mamba_ssm")
_IMPORT_SCRIPT = """
import importlib, json, os, sys
found = {}
folders = tuple(os.path.realpath(folder) + os.sep for folder in (sys.prefix, *json.loads(sys.argv[1])))
for name in sys.argv[2:]:
    try:
        module = importlib.import_module(name)
        file = getattr(module, "__file__", None) or ""
        # ~/.local and PYTHONPATH come before the environment's own packages.
        inside = os.path.realpath(file).startswith(folders)
        text = "%s %s" % (file, getattr(module, "__version__", ""))
        found[name] = [inside, text if inside else "imported from outside the environment: " + text]
    except BaseException as error:
        found[name] = [False, "%s: %s" % (type(error).__name__, error)]
print("\\n" + json.dumps(found))
"""


def choose_prefix(prefix: Path | None) -> Path:
    """The prefix named, or the one installed last.

    Raises:
        InstallError: when there is none, or it holds no environment.
    """
    if prefix is None:
        prefixes = registry.installed_prefixes(workspace())
        if not prefixes:
            raise InstallError(
                "nothing is installed yet in this workspace.", fix=f"Run '{launcher()} install-mamba' first."
            )
        return prefixes[0]
    prefix = prefix.expanduser().absolute()
    if not (prefix / "conda-meta").is_dir():
        raise InstallError(
            f"{prefix} is not a conda environment (it has no conda-meta folder).",
            fix=f"Name an environment with --prefix, or make one with '{launcher()} install-mamba'.",
        )
    return prefix


def verify(prefix: Path) -> Report:
    """Run every check that this machine can run.

    Args:
        prefix: a conda environment.
    """
    records = installed_records(prefix)
    checks = [_packages(records, prefix)]
    environment = activated_environment(prefix)
    platform = emulator.foreign(prefix)
    if platform is None:
        checks += imports(prefix / "bin/python", prefix, environment)
    else:
        checks += _emulated_imports(prefix, environment, platform)
    for project, extension in EXTENSIONS.items():
        library = next(iter(sorted(prefix.glob(f"lib/python*/site-packages/{extension}.*.so"))), None)
        record = records.get(project)
        if library is None or record is None:
            reason = f"{extension} is not in {prefix}"
            checks.append(Check(f"{extension}: library", "fail", reason))
            continue
        checks += _library_checks(extension, library, record, prefix)
    if platform is None:
        checks += gpu_checks(prefix / "bin/python", environment)
    else:
        checks.append(Check("kernels on the GPU", "not-run", f"this machine is not {platform.people}"))
    return Report(prefix, tuple(checks))


def _emulated_imports(prefix: Path, environment: dict[str, str], platform: Platform) -> list[Check]:
    """The imports of an environment of another platform, and what was emulated for them."""
    try:
        found = emulator.find(platform, workspace())
    except MachineError as error:
        return [Check(f"import {name}", "not-run", error.what) for name in _IMPORTS]
    said = f"{found.description} ran the imports: the environment is for {platform.people}, this machine is not"
    emulated = Check("emulated", "pass", f"{said}; the other checks read files")
    return [emulated, *imports(prefix / "bin/python", prefix, environment, emulated_by=found.command)]


class Answer(NamedTuple):
    """Whether it is as it should be, and what was found, in words."""

    good: bool
    detail: str


def checked(name: str, question: Callable[[], tuple[bool, str]]) -> Check:
    """The answer to a question as a check; an error of ours is a failed one."""
    try:
        good, detail = question()
    except ForgeError as error:
        return Check(name, "fail", str(error))
    return Check(name, "pass" if good else "fail", detail)


def _packages(records: Mapping[str, InstalledRecord], prefix: Path) -> Check:
    """The files of both packages are those that were installed, unchanged."""
    marker = install_marker.read_marker(prefix)
    missing = [project for project in EXTENSIONS if project not in records]
    if missing:
        detail = f"{', '.join(missing)} not installed in {prefix}"
        if marker is not None:
            # `pixi install` removes what its lock does not name.
            detail += f"; something removed them since: run '{launcher()} install-mamba --variant {marker.variant}'"
        return Check("packages intact", "fail", detail)
    wrong = [path for project in EXTENSIONS for path in _changed_files(records[project].paths, prefix)]
    if wrong:
        return Check("packages intact", "fail", f"changed or missing: {', '.join(wrong[:5])}")
    names = ", ".join(str(records[name]) for name in EXTENSIONS)
    return Check("packages intact", "pass", names)


def _changed_files(entries: Iterable[InstalledPath], prefix: Path) -> list[str]:
    wrong = []
    for entry in entries:
        path = prefix / entry.path
        # Where the prefix was written into a file, its hash is another one than in the package.
        expected = entry.sha256_in_prefix or ("" if entry.placeholder else entry.sha256)
        hashed = entry.kind == "hardlink" and expected != ""
        if not path.exists() or (hashed and not (path.is_file() and sha256_of(path) == expected)):
            wrong.append(entry.path)
    return wrong


def imports(
    python: Path,
    prefix: Path,
    environment: dict[str, str],
    folders: Sequence[Path] = (),
    emulated_by: Sequence[str] = (),
) -> list[Check]:
    """Whether an environment's Python imports what it should, from inside it.

    Args:
        environment: the variables of a shell in which it is activated.
        folders: outside of it, that are part of it all the same: of the system, or ``--target``'s.
        emulated_by: what its Python is started with, where it does not run here.
    """
    command = [
        *emulated_by,
        str(python),
        "-c",
        _IMPORT_SCRIPT,
        json.dumps([str(folder) for folder in folders]),
        *_IMPORTS,
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_EMULATED_TIMEOUT_SECONDS if emulated_by else _IMPORT_TIMEOUT_SECONDS,
            env=environment,
            check=False,
            cwd=prefix,
        )
        answers = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Check(f"import {name}", "fail", str(error)) for name in _IMPORTS]
    except (ValueError, IndexError):
        detail = f"Python ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
        return [Check(f"import {name}", "fail", detail) for name in _IMPORTS]
    return [Check(f"import {name}", "pass" if good else "fail", detail) for name, (good, detail) in answers.items()]


def _library_checks(extension: str, path: Path, record: InstalledRecord, prefix: Path) -> list[Check]:
    return [
        checked(f"{extension}: libraries and symbols", lambda: _links(path, prefix)),
        checked(f"{extension}: GPU code", lambda: gpu_code(path, record.build)),
        checked(f"{extension}: glibc", lambda: glibc(path, record.depends)),
        checked(f"{extension}: kernels", lambda: whose_kernels(extension, path, record.build)),
    ]


def _links(path: Path, prefix: Path) -> Answer:
    library = elf.read(path)
    resolution = elf.resolve(library, prefix, _preloaded(prefix))
    problems = [
        *(f"rpath {rpath} is a path of the build machine" for rpath in library.foreign_rpaths),
        *(f"{name} is not in the prefix" for name in resolution.missing_libraries),
        *(f"{name} is outside the prefix" for name in resolution.outside),
        *(f"undefined symbol {name}" for name in resolution.missing_symbols[:5]),
    ]
    if problems:
        return Answer(False, "; ".join(problems))
    return Answer(True, f"{len(library.undefined)} symbols, all found in the prefix or in glibc")


def _preloaded(prefix: Path) -> list[Path]:
    """What `import torch` has loaded before: the interpreter, torch's libraries, and NVIDIA's in the environment."""
    folders = [*prefix.glob("lib/python*/site-packages/torch/lib"), prefix / "lib"]
    libraries = [path for folder in folders for path in sorted(folder.glob("*.so*"))]
    interpreter = [*prefix.glob("lib/libpython3*.so.1.0"), (prefix / "bin/python").resolve()]
    return [*interpreter, *sorted(libraries, key=lambda path: not path.name.startswith(("libtorch", "libc10")))]


def gpu_code(path: Path, build: str) -> Answer:
    """Whether an extension holds the GPU code that its build string names, and both in words."""
    claimed = ArchList.from_tag(build)
    actual = elf.gpu_code(path)
    if not claimed.sass:
        return Answer(False, f"the build string {build} names no compute capability; the binary has {actual.tag}")
    return Answer(actual == claimed, f"claimed {claimed.tag}, found {actual.tag}")


def glibc(path: Path, depends: Sequence[str]) -> Answer:
    """Whether a package declares the C library that its extension needs, and all versions in words."""
    needed = elf.read(path).glibc
    declared = next((d.split(">=")[1].split(",")[0] for d in depends if d.startswith("__glibc >=")), None)
    if declared is None:
        return Answer(False, f"needs {needed}, and the package declares nothing")
    good = Version(needed) <= Version(declared)
    return Answer(good, f"needs {needed}, declares {declared}, this machine has {machine.glibc()}")


def whose_kernels(extension: str, path: Path, build: str) -> Answer:
    """Whether a package with upstream's kernels by its build string has none of ours, and whose it has in words."""
    claimed, there = package_kernels.claimed(build), package_kernels.found(path, extension)
    names = {"forge": "this project's", "upstream": "upstream's"}
    if claimed == "upstream":
        return Answer(there == claimed, f"claimed upstream's as they are, found {names[there]}")
    return Answer(True, names[there])


def gpu_checks(python: Path, activated: dict[str, str]) -> list[Check]:
    """Forward and backward against the float64 references, inside the environment.

    A GPU that nvidia-smi lists and the environment's torch can't use is a failure: nothing would run there.

    Args:
        activated: the variables of a shell in which it is activated.
    """
    if not machine.gpus():
        return [Check("kernels on the GPU", "not-run", "no NVIDIA GPU (nvidia-smi lists none on this machine)")]
    command = [str(python), "-m", "ssm_forge.kernels", "check", "--quick", "--json"]
    folders = [str(workspace().root / "scripts"), *filter(None, [activated.get("PYTHONPATH")])]
    environment = {**activated, "PYTHONPATH": os.pathsep.join(folders)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GPU_TIMEOUT_SECONDS, env=environment, check=False
        )
        answer = json.loads(done.stdout)
        checks = [Check(f"GPU: {c['name']}", c["status"], c["detail"]) for c in answer["checks"]]
        return checks if any(c.status != "not-run" for c in checks) else [_nothing_ran(checks)]
    except subprocess.TimeoutExpired:
        return [Check("kernels on the GPU", "fail", f"did not end within {_GPU_TIMEOUT_SECONDS} s")]
    except OSError as error:
        return [Check("kernels on the GPU", "fail", f"could not be started ({error})")]
    except (ValueError, KeyError, TypeError) as error:
        return [Check("kernels on the GPU", "fail", f"no answer ({error}): {done.stderr.strip()[-300:]}")]


def _nothing_ran(checks: Sequence[Check]) -> Check:
    """On a machine with a GPU: a failure, but where somebody has hidden it."""
    why = checks[0].detail if checks else "it names no check"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Check("kernels on the GPU", "not-run", f"CUDA_VISIBLE_DEVICES hides every GPU; {why}")
    listed = ", ".join(f"{g.name} ({g.capability}, driver {g.driver})" for g in machine.gpus())
    return Check("kernels on the GPU", "fail", f"nvidia-smi lists {listed}, and this environment can't use it: {why}")
