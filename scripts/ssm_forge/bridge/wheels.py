"""Wheels as conda packages."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ssm_forge.base.errors import BuildError
from ssm_forge.base.fetch import checked
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.bridge.metadata import Distribution, conda_depends, conda_name, read
from ssm_forge.bridge.package import BridgePackage
from ssm_forge.bridge.pylock import LockedWheel

_PLACEHOLDER = "/ssm-forge-interpreter/bin/python"

# Starts the python beside the script, wherever the prefix is: sh runs line 2, Python sees a string.
_LAUNCHER = '#!/bin/sh\n\'\'\'exec\' "$(dirname "$(readlink -f "$0")")/python" "$0" "$@"\n\' \'\'\'\n'


def distributions(
    wheels: Sequence[LockedWheel], workspace: Workspace, platform: Platform = LINUX_64
) -> dict[str, Distribution]:
    """Read the METADATA of downloaded wheels, by canonical name."""
    by_name = {}
    for wheel in wheels:
        dist = read(workspace.downloads / wheel.artifact.sha256 / wheel.artifact.name, platform.machine)
        by_name[dist.name] = dist
    return by_name


def wheel_package(
    wheel: LockedWheel,
    dists: Mapping[str, Distribution],
    *,
    python: str,
    interpreter: Path,
    cuda: str,
    workspace: Workspace,
) -> BridgePackage:
    """Describe the conda package of one wheel.

    Args:
        dists: every distribution of the lock.
        python: the minor the package is for; libraries that need no particular Python serve all of them.
        interpreter: a Python of that minor, to compile bytecode with.
        cuda: CUDA release of the variant: with 11.8, Triton is called as pytorch.org calls it.
    """
    dist = dists[wheel.name]
    noarch = wheel.is_python_free
    tag = python.replace(".", "")
    depends = conda_depends(dist, dists, python)
    if noarch:
        depends.append("python")
    else:
        depends += [f"python {python}.*", f"python_abi {python}.* *_cp{tag}"]
    return BridgePackage(
        name="torchtriton" if (wheel.name, cuda) == ("triton", "11.8") else conda_name(wheel.name),
        version=dist.version.partition("+")[0],
        inputs=(wheel.artifact.sha256, "" if noarch else python),
        stage=lambda folder: _stage(wheel, folder, python, interpreter, workspace, noarch=noarch),
        depends=tuple(depends),
        build_prefix="" if noarch else f"py{tag}",
        noarch_python=noarch,
        license=dist.license,
        summary=dist.summary,
        size=wheel.artifact.size,
    )


def _stage(
    wheel: LockedWheel, folder: Path, python: str, interpreter: Path, workspace: Workspace, *, noarch: bool
) -> None:
    install_wheel(wheel, folder, python, workspace, noarch=noarch)
    if not noarch:
        compile_bytecode(interpreter, folder, folder / f"lib/python{python}/site-packages")


def install_wheel(
    wheel: LockedWheel,
    folder: Path,
    python: str,
    workspace: Workspace,
    *,
    noarch: bool = False,
    without: Callable[[str], bool] = lambda path: False,
) -> None:
    """Install a wheel below ``folder`` as pip does, with scripts that start the environment's Python.

    Args:
        without: which of the wheel's files are left out.
    """
    from installer import install
    from installer.destinations import SchemeDictionaryDestination
    from installer.sources import WheelContentElement, WheelFile

    class Part(WheelFile):
        def get_contents(self) -> Iterator[WheelContentElement]:
            # Bytecode in a wheel (numpy 1.26 has some) is never installed; installer would warn on the screen.
            contents = super().get_contents()
            return (e for e in contents if "__pycache__" not in e[0][0].split("/") and not without(e[0][0]))

    site = folder / ("site-packages" if noarch else f"lib/python{python}/site-packages")
    scripts = folder / ("python-scripts" if noarch else "bin")
    destination = SchemeDictionaryDestination(
        scheme_dict={
            "purelib": str(site),
            "platlib": str(site),
            "scripts": str(scripts),
            "headers": str(folder / f"include/python{python}/{wheel.name}"),
            "data": str(folder),
        },
        interpreter=_PLACEHOLDER,
        script_kind="posix",
    )
    with Part.open(checked(wheel.artifact, workspace)) as source:
        install(source=source, destination=destination, additional_metadata={"INSTALLER": b"ssm-forge\n"})
    _relocate_scripts(scripts)


def _relocate_scripts(scripts: Path) -> None:
    for script in scripts.glob("*"):
        data = script.read_bytes()
        first, _, rest = data.partition(b"\n")
        if first.startswith(b"#!") and _PLACEHOLDER.encode() in first:
            script.write_bytes(_LAUNCHER.encode() + rest)
        # Not every wheel records the permission to execute.
        script.chmod(0o755)


def compile_bytecode(interpreter: Path, root: Path, folder: Path) -> None:
    """Compile everything under ``folder``, once for all environments.

    Unchecked hashes instead of times, because the files' times change with packing; paths are those below
    the prefix. Files that don't compile (templates, other Pythons' syntax) are left to the importer.
    """
    command: list[str | Path] = [interpreter, "-I", "-m", "compileall", "-q", "-j", str(len(os.sched_getaffinity(0)))]
    command += ["--invalidation-mode", "unchecked-hash", "-s", root, "-p", "/", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise BuildError(f"{interpreter} could not compile the modules of {folder.name}: {done.stderr.strip()}")
