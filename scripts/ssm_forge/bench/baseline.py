"""Upstream's own build, to measure ours against: ``pip wheel`` of the sdist, in an environment of the same packages.

*default* is upstream's setup.py as released, with its list of compute capabilities. *same capability* is built from
the sources that we build, for one capability, with upstream's flags and without its backward kernels being split:
what its flags give for the same kernels.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssm_forge.base import platforms
from ssm_forge.base.activation import activated_environment
from ssm_forge.base.errors import BuildError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import Log, say
from ssm_forge.bench import process_tree
from ssm_forge.bench import tools as build_tools
from ssm_forge.bench.usage import Usage, join
from ssm_forge.channel import folder as channel
from ssm_forge.flow import plan, planning
from ssm_forge.install import marker
from ssm_forge.install import prefix as install
from ssm_forge.manifest import patching, recipe, sdists
from ssm_forge.package import write as archive
from ssm_forge.solve import prefix as solve_prefix
from ssm_forge.verify import toolchain

Kind = Literal["default", "same capability"]
KINDS: tuple[Kind, ...] = ("default", "same capability")

# What makes our build cheap and changes no kernel; upstream's flags are measured without.
_OURS = ("nvcc-options", "split-backward")
_OPTIONS = ("--no-deps", "--no-build-isolation", "--no-index", "-v")
_TOOLS = ("ninja", "packaging", "pip", "setuptools", "wheel")


@dataclass(frozen=True)
class Wheel:
    """What one project's build gave.

    Attributes:
        path: the wheel.
        extension: the extension that was in it.
    """

    project: str
    path: Path
    extension: Path


def environment(options: plan.Options, prefix: Path, workspace: Workspace, log: Log) -> Path:
    """Make an environment with the variant's toolchain, torch, and what upstream's setup.py needs."""
    origin = planning.origin(options, workspace)
    variant = origin.variant
    channel.ensure_indexed(workspace.channel)
    specs = [*toolchain.specs(variant), f"python {origin.python}.*", variant.torch_spec, *_TOOLS]
    records = solve_prefix.solve_for_prefix(specs, origin.channels, prefix=None, cuda=variant.cuda)
    names = tuple(sorted(record.file_name for record in records))
    installed = marker.Installed(variant.name, origin.python, variant.source, names, created=True)
    install.install(records, prefix, installed, workspace, log)
    return prefix


def sources(options: plan.Options, kind: Kind, folder: Path, workspace: Workspace) -> dict[str, Path]:
    """Unpack both sdists, patched as ``kind`` asks; project -> folder with its setup.py.

    Raises:
        BuildError: when a patch does not fit.
    """
    variant = planning.origin(options, workspace).variant
    trees = {}
    for project in recipe.PROJECTS:
        version = variant.projects[project]
        tree = sdists.unpack(sdists.find(project, version, workspace), folder / project, workspace)
        if kind == "same capability":
            _patch(tree, sorted((workspace.patches / project / version).glob("*.patch")))
        trees[project] = tree
    return trees


def _patch(tree: Path, patches: list[Path]) -> None:
    chosen = [path for path in patches if not path.stem.endswith(_OURS)]
    changed, results = patching.patched(chosen, tree)
    misfits = [str(result) for result in results if result.found is None]
    if misfits:
        raise BuildError(f"upstream's flags can't be measured: {misfits[0]}")
    for name, text in changed.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")


def build(trees: dict[str, Path], prefix: Path, archs: str, output: Path, log: Log) -> tuple[Usage, list[Wheel]]:
    """Build both wheels, one after the other, and measure.

    Raises:
        BuildError: when one fails.
    """
    usages, wheels = [], []
    for project, tree in trees.items():
        say(f"  {project}: pip wheel with upstream's flags")
        folder = output / project
        usage = process_tree.measure(
            [prefix / "bin/python", "-m", "pip", "wheel", ".", *_OPTIONS, "--wheel-dir", folder],
            describe=build_tools.describe,
            log=log.path,
            cwd=tree,
            environment=_environment(prefix, archs),
        )
        if usage.returncode:
            raise BuildError(f"upstream's own build of {project} failed.", log=log.path)
        usages.append(usage)
        wheels.append(_read(project, folder))
    return join(usages), wheels


def _environment(prefix: Path, archs: str) -> dict[str, str]:
    target = prefix / platforms.here().targets
    headers = [target / "include", target / "include/cccl", prefix / "include"]
    libraries = [prefix / "lib", target / "lib"]
    return {
        **activated_environment(prefix),
        # Without these it looks for a wheel on the network.
        "CAUSAL_CONV1D_FORCE_BUILD": "TRUE",
        "MAMBA_FORCE_BUILD": "TRUE",
        "CPATH": os.pathsep.join(map(str, headers)),
        "LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "TORCH_CUDA_ARCH_LIST": archs,
    }


def _read(project: str, folder: Path) -> Wheel:
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        extension = recipe.EXTENSIONS[project]
        names = [n for n in wheel.namelist() if n.startswith(extension) and n.endswith(".so")]
        if not names:
            raise BuildError(f"upstream's own build of {project} gave {path.name} without {extension}.")
        (name,) = names
        wheel.extract(name, folder)
    return Wheel(project, path, folder / name)


def size_as_package(ours: Path, wheel: Wheel, scratch: Path) -> int:
    """Bytes of the package ``ours`` if it held the wheel's extension: the same compression, the same rest."""
    (name,) = [
        e["_path"] for e in archive.read_json(ours, "paths.json")["paths"] if e["_path"].endswith(wheel.extension.name)
    ]
    target = scratch / ours.name
    archive.repack(ours, target, lambda info: info, {name: wheel.extension.read_bytes()})
    return target.stat().st_size
