"""Builds a source tree into a package of the channel, after checking what came out, and says what it was made from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
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
from ssm_forge.bridge.assemble import assemble
from ssm_forge.build import finalize
from ssm_forge.build import provenance as materials
from ssm_forge.build import run as building
from ssm_forge.build.jobs import choose_jobs
from ssm_forge.build.leftovers import staging_folder
from ssm_forge.build.request import BuildRequest
from ssm_forge.build.schedule import Job
from ssm_forge.channel import folder as channels
from ssm_forge.flow.needs import check_build_folder
from ssm_forge.flow.plan import Plan
from ssm_forge.manifest import recipe
from ssm_forge.manifest.recipe import PROJECTS, Rendered
from ssm_forge.package import libraries as elf
from ssm_forge.package import read as inspection
from ssm_forge.package.write import repack
from ssm_forge.solve.solver import require_reachable
from ssm_forge.trees import source
from ssm_forge.trees.recipe import CARRIED, apply_known_patches, write
from ssm_forge.trees.source import Tree

# A file of a fork is about as large as the middle one of ours.
_MEMORY_EACH = 2_000_000_000


@dataclass(frozen=True)
class Built:
    """A source tree's package.

    Attributes:
        file: in the channel.
        patches: ours that fitted it.
        new: whether it was compiled now.
    """

    tree: Tree
    rendered: Rendered
    request: BuildRequest
    file: Path
    patches: tuple[str, ...]
    new: bool


def build(where: str, work: Plan, jobs: int | None, workspace: Workspace) -> Built:
    """Build the tree that ``where`` names for the variant, Python and capabilities of ``work``.

    Args:
        jobs: parallel compilers, as the user asked for them.

    Raises:
        UsageError: for a tree that can't be built; nothing is changed then.
        BuildError: when compiling fails, it compiles nothing, or its kernels are not what was asked for.
    """
    with _got(where, workspace) as (tree, patches):
        folder = tree.folder.parent
        write(tree, workspace, folder)
        place = replace(workspace, root=folder)
        base = work.packages[-1].request
        rendered = recipe.render(tree.name, base.key, place)
        request = replace(base, rendered=rendered, locked=None, beside=(), root=folder)
        held = channels.find(workspace.channel, rendered.filename)
        told = {"recipe_sha256": recipe.digest(tree.name, place), "tree": _told(tree, patches)}
        if held is not None and _is_from(held, told):
            say(f"Nothing to build: the channel has {held.name}.")
            return Built(tree, rendered, request, held, tuple(patches), new=False)
        check_build_folder(workspace)
        chosen = choose_jobs(jobs, [Job(name, 60, _MEMORY_EACH) for name in tree.sources])
        with open_log(workspace.logs, "build-tree") as log:
            file = _compile(request, told, work, chosen, workspace, log)
        return Built(tree, rendered, request, file, tuple(patches), new=True)


def look(where: str, workspace: Workspace) -> None:
    """Say what would be built, and do nothing.

    Raises:
        UsageError: as :func:`build`.
    """
    with _got(where, workspace):
        pass


@contextmanager
def _got(where: str, workspace: Workspace) -> Iterator[tuple[Tree, list[str]]]:
    """The tree, with those of our patches that fit it, in a folder of its own for as long as this is open."""
    folder = staging_folder(workspace) / f"tree-{owners.mark()}"
    folder.mkdir(parents=True)
    try:
        tree = source.get(where, folder / "tree")
        _tell(tree)
        patches = apply_known_patches(tree, workspace)
        if patches:
            note(f"patches of ours that fit it, and are applied: {', '.join(patches)}")
        yield tree, patches
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tell(tree: Tree) -> None:
    at = f", commit {tree.commit}" if tree.commit else ""
    say(f"{tree.name} {tree.version} from {tree.origin}{at}: {len(tree.sources)} CUDA files, tree {tree.sha256[:12]}")
    if tree.name in PROJECTS:
        note(
            f"this tree calls itself {tree.name}: in an environment it takes the place of the project of that name, "
            "PyPI's or ours."
        )
    missing = sorted({r.name for r in tree.requires} - {"torch", *CARRIED})
    if missing:
        note(f"it also requires {', '.join(missing)}, which the package does not bring; its wheel names them to pip.")


def _told(tree: Tree, patches: list[str]) -> dict[str, Any]:
    """What the package says of the tree."""
    return {"origin": tree.origin, "commit": tree.commit, "sha256": tree.sha256, "patches": patches}


def _is_from(package: Path, told: dict[str, Any]) -> bool:
    try:
        found = inspection.provenance(package)
    except IntegrityError:
        return False
    return found.get("format") == finalize.FORMAT and all(found.get(key) == value for key, value in told.items())


def _compile(
    request: BuildRequest, told: dict[str, Any], work: Plan, jobs: int, workspace: Workspace, log: Log
) -> Path:
    say(f"Full log: {log.path}")
    if work.parts is not None:
        assemble(work.parts, workspace, log)
    channels.ensure_indexed(workspace.channel)
    require_reachable(request.channels)
    say(f"Building {request.filename} with {jobs} jobs")

    def finish(package: Path) -> Path:
        return _finish(package, request, told, workspace)

    ready = replace(request, finish=finish)
    try:
        return building.build(ready, channel=workspace.channel, jobs=jobs, workspace=workspace, log=log)
    except BuildError as error:
        missing = source.missing_submodules(request.root / "tree") if request.root and not error.fix else []
        if missing:
            error.fix = f"Of its git submodules {', '.join(missing)} is not there: name a clone made with --recursive."
        raise


def _finish(package: Path, request: BuildRequest, told: dict[str, Any], workspace: Workspace) -> Path:
    """As ``finalize.finalize`` does for the recipes: check the libraries, write down what they were made from."""
    key = request.key
    with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        extract(package, Path(scratch))
        solved = materials.solved(Path(scratch)) if key.source == "conda" else []
        facts = _facts(sorted(Path(scratch).glob("lib/python*/site-packages/**/*.so")), request.project, key.archs)
    tree = told["tree"]
    made_from = {"uri": tree["origin"], "sha256": tree["sha256"], "role": "source tree"}
    locks = materials.toolchain_locks(key, workspace, request.compiler_lock)
    provenance = {
        "format": finalize.FORMAT,
        "name": request.project,
        "variant": key.to_provenance(),
        "materials": sorted([made_from, *locks, *solved], key=lambda item: (item["role"], item["uri"])),
        **({"compiler": request.compiler} if request.compiler else {}),
        **told,
        **facts,
    }
    target = package.parent.parent / package.name
    repack(package, target, lambda files: finalize.edited(files, provenance))
    return target


def _facts(libraries: list[Path], project: str, wanted: ArchList) -> dict[str, Any]:
    kernels = 0
    for path in libraries:
        try:
            found = elf.gpu_code(path)
        except IntegrityError:
            continue  # A library without GPU code.
        kernels += 1
        if found != wanted:
            raise BuildError(
                f"{path.name} of {project} holds {found.tag}, but {wanted.tag} was asked for.",
                fix="Its setup.py starts a compiler past the one that torch names (PYTORCH_NVCC).",
            )
    if not kernels:
        raise BuildError(f"{project} was built without any GPU code: its setup.py left its CUDA extension out.")
    return {"cuda_arch_list": str(wanted), "glibc": finalize.checked_glibc(libraries)}
