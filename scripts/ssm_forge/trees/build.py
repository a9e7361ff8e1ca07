"""Builds a source tree into a package of the channel, after checking what came out, and says what it was made from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rattler.package_streaming import extract

from ssm_forge.base import owners
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import BuildError, IntegrityError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import Log, note, open_log, say
from ssm_forge.build import finalize
from ssm_forge.build import provenance as materials
from ssm_forge.build import run as building
from ssm_forge.build.leftovers import staging_folder
from ssm_forge.build.origin import compiler_of
from ssm_forge.build.request import BuildRequest
from ssm_forge.build.schedule import Job
from ssm_forge.channel import folder as channels
from ssm_forge.flow.needs import with_needs
from ssm_forge.flow.pipeline import prepare
from ssm_forge.flow.plan import Plan, PlannedPackage
from ssm_forge.manifest import recipe
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.package import libraries as elf
from ssm_forge.package import read as inspection
from ssm_forge.package.write import repack
from ssm_forge.trees import source
from ssm_forge.trees.recipe import CARRIED, apply_known_patches, write
from ssm_forge.trees.source import Tree

# A file of a fork is about as large as the middle one of ours.
_BYTES_PER_COMPILER = 2_000_000_000
_SECONDS_PER_FILE = 60


@dataclass(frozen=True)
class Built:
    """A source tree's package.

    Attributes:
        tree: what it was built from; its folder is gone.
        patches: ours that fitted the tree.
        plan: what the build took, with this package for the only one.
        file: the package, in the channel.
    """

    tree: Tree
    patches: tuple[str, ...]
    plan: Plan
    file: Path

    @property
    def package(self) -> PlannedPackage:
        return self.plan.packages[0]


def build(address: str, target: Plan, jobs: int | None, workspace: Workspace) -> Built:
    """Build the tree at an address (see :func:`ssm_forge.trees.source.get`), and return its package in the channel.

    Args:
        target: the variant, Python and capabilities to build for; its packages count for nothing.
        jobs: parallel compilers, as the user asked for them; None for as many as fit.

    Raises:
        UsageError: for a tree that can't be built; nothing is changed then.
        MachineError: when the machine has too little memory or disk for it.
        IntegrityError: when a package that it is built with lacks what the trust policy asks for.
        BuildError: when compiling fails, it compiles nothing, or its kernels are not what was asked for.
    """
    with _unpacked(address, workspace) as (tree, patches):
        root = tree.folder.parent
        write(tree, patches, workspace, root)
        request = _request(tree, root, target, workspace)
        facts = {
            "recipe_sha256": recipe.digest(tree.name, replace(workspace, root=root)),
            "tree": as_record(tree, patches),
        }
        in_channel = channels.find(workspace.channel, request.filename)
        if in_channel is not None and _is_made_from(in_channel, facts):
            say(f"Nothing to build: the channel has {in_channel.name}.")
            plan = replace(target, packages=(PlannedPackage("in channel", request),))
            return Built(tree, tuple(patches), plan, in_channel)
        costs = [Job(name, _SECONDS_PER_FILE, _BYTES_PER_COMPILER) for name in tree.sources]
        to_build = replace(target, packages=(PlannedPackage("to build", request),))
        plan = with_needs(to_build, jobs, workspace, costs=costs)
        with open_log(workspace.logs, "build-tree") as log:
            file = _compile(plan, facts, workspace, log)
        return Built(tree, tuple(patches), plan, file)


def look(address: str, workspace: Workspace) -> tuple[Tree, list[str]]:
    """Say what would be built, and build nothing; returns the tree, whose folder is gone, and the patches that fit it.

    Raises:
        UsageError: as :func:`build`.
    """
    with _unpacked(address, workspace) as (tree, patches):
        return tree, patches


def as_record(tree: Tree, patches: list[str]) -> dict[str, Any]:
    """What a package says of the tree that it was made from: plain values."""
    return {"origin": tree.origin, "commit": tree.commit, "sha256": tree.sha256, "patches": patches}


@contextmanager
def _unpacked(address: str, workspace: Workspace) -> Iterator[tuple[Tree, list[str]]]:
    """The tree, with those of our patches that fit it, in a folder of its own for as long as this is open."""
    folder = staging_folder(workspace) / f"tree-{owners.mark()}"
    folder.mkdir(parents=True)
    try:
        tree = source.get(address, folder / "tree")
        _describe(tree)
        patches = apply_known_patches(tree, workspace)
        if patches:
            note(f"patches of ours that fit it, and are applied: {', '.join(patches)}")
        yield tree, patches
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _describe(tree: Tree) -> None:
    commit = f", commit {tree.commit}" if tree.commit else ""
    contents = f"{len(tree.sources)} CUDA files, tree {tree.sha256[:12]}"
    say(f"{tree.name} {tree.version} from {tree.origin}{commit}: {contents}")
    if tree.name in PROJECTS:
        note(
            f"this tree calls itself {tree.name}: in an environment it takes the place of the project of that name, "
            "PyPI's or ours."
        )
    missing = sorted({r.name for r in tree.requires} - {"torch", *CARRIED})
    if missing:
        note(f"it also requires {', '.join(missing)}, which the package does not bring; its wheel names them to pip.")


def _request(tree: Tree, root: Path, target: Plan, workspace: Workspace) -> BuildRequest:
    """How the tree is built, from the checkout ``root`` that holds its recipe."""
    major = None if target.parts is None else str(target.parts.compiler.major)
    key = target.variant.key(target.python, target.archs, compiler=major, platform=target.platform)
    rendered = recipe.render(tree.name, key, replace(workspace, root=root))
    compiler, compiler_lock = compiler_of(target.variant, target.parts, workspace)
    return BuildRequest(rendered, key, target.channels, compiler, compiler_lock, root=root)


def _is_made_from(package: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a package of the channel says the same facts of itself."""
    try:
        provenance = inspection.provenance(package)
    except IntegrityError:
        return False
    return provenance.get("format") == finalize.FORMAT and all(provenance.get(key) == facts[key] for key in facts)


def _compile(plan: Plan, facts: Mapping[str, Any], workspace: Workspace, log: Log) -> Path:
    """Build the one package of a plan, and return it in the channel."""
    prepare(plan, workspace, log)
    (package,) = plan.packages
    say(f"Building {package.name} {package.version} for {plan.archs} with {plan.jobs} jobs")

    def finish(built: Path) -> Path:
        return _finish(built, package.request, facts, workspace)

    request = replace(package.request, finish=finish)
    try:
        return building.build(request, channel=workspace.channel, jobs=plan.jobs, workspace=workspace, log=log)
    except BuildError as error:
        missing = source.missing_submodules(request.root / "tree") if request.root and not error.fix else []
        if missing:
            error.fix = f"Of its git submodules {', '.join(missing)} is not there: name a clone made with --recursive."
        raise


def _finish(package: Path, request: BuildRequest, facts: Mapping[str, Any], workspace: Workspace) -> Path:
    """As ``finalize.finalize`` does for the recipes: check the libraries, write down what they were made from."""
    key = request.key
    with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        extract(package, Path(scratch))
        solved = materials.solved(Path(scratch)) if key.source == "conda" else []
        libraries = sorted(Path(scratch).glob("lib/python*/site-packages/**/*.so"))
        finalize.check_machine(libraries, key.platform)
        checked = _check_libraries(libraries, request.project, key.archs)
    tree = facts["tree"]
    made_from = {"uri": tree["origin"], "sha256": tree["sha256"], "role": "source tree"}
    locks = materials.toolchain_locks(key, workspace, request.compiler_lock)
    provenance = {
        "format": finalize.FORMAT,
        "name": request.project,
        "variant": key.to_provenance(),
        "materials": sorted([made_from, *locks, *solved], key=lambda item: (item["role"], item["uri"])),
        **({"compiler": request.compiler} if request.compiler else {}),
        **facts,
        **checked,
    }
    finished = package.parent.parent / package.name
    repack(package, finished, lambda files: finalize.edited(files, provenance))
    return finished


def _check_libraries(libraries: list[Path], project: str, wanted: ArchList) -> dict[str, Any]:
    """What the libraries of a package were found to be for: capabilities and glibc.

    Raises:
        BuildError: when one has GPU code for something else than was asked for, or none has any.
    """
    kernels = 0
    for path in libraries:
        try:
            archs = elf.gpu_code(path)
        except IntegrityError:
            continue  # A library without GPU code.
        kernels += 1
        if archs != wanted:
            raise BuildError(
                f"{path.name} of {project} holds {archs.tag}, but {wanted.tag} was asked for.",
                fix="Its setup.py starts a compiler past the one that torch names (PYTORCH_NVCC).",
            )
    if not kernels:
        raise BuildError(f"{project} was built without any GPU code: its setup.py left its CUDA extension out.")
    return {"cuda_arch_list": str(wanted), "glibc": finalize.checked_glibc(libraries)}
