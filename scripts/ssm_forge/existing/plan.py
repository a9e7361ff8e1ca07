"""What will be done for an environment that is there, worked out before anything is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.tags import Tag
from packaging.version import Version

from ssm_forge.base import machine, platforms
from ssm_forge.base.errors import UsageError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge import interpreter as interpreters
from ssm_forge.bridge import parts as bridge_parts
from ssm_forge.bridge import pylock, thin
from ssm_forge.bridge.toolkit_parts import ToolkitParts
from ssm_forge.build.origin import compiler_of
from ssm_forge.build.request import BuildRequest
from ssm_forge.channel import folder as channels
from ssm_forge.channel.folder import channel_urls
from ssm_forge.existing import install, needs, reader, rows, torch
from ssm_forge.existing.needs import Needs
from ssm_forge.existing.reader import Existing
from ssm_forge.existing.rows import Row
from ssm_forge.existing.torch import Torch
from ssm_forge.flow import fitting
from ssm_forge.flow.needs import choose_archs, with_needs
from ssm_forge.flow.plan import Options, Plan, PlannedPackage, State
from ssm_forge.flow.planning import is_current
from ssm_forge.install.marker import is_foreign as foreign_conda
from ssm_forge.manifest import recipe, variants
from ssm_forge.manifest.variants import Matrix


@dataclass(frozen=True)
class Work:
    """An installation into an environment that is there, ready to be carried out.

    Attributes:
        needs: what the kernels import beside torch.
        plan: the builds, as for an environment of our own.
    """

    existing: Existing
    torch: Torch
    row: Row
    needs: Needs
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return {
            **self.plan.as_dict(),
            "variant": None,
            "source": "environment",
            "kind": self.existing.kind,
            "target": str(self.existing.target) if self.existing.target else None,
            "python": self.existing.version,
            "torch": self.torch.version,
            "torch_cuda": self.torch.cuda,
            "cxx11_abi": self.torch.cxx11,
            "why": self.row.why,
            "notes": list(self.row.lacks),
            "lacks": list(self.needs.wanted),
        }


@dataclass(frozen=True)
class Wishes:
    """What the user asks for beside what a build of ours takes.

    Attributes:
        releases: project -> version, where another than the newest is wanted.
        with_deps: what the kernels import and is missing is installed.
        projects: those of ours that are wanted; none where something else is built, which counts its own needs, and
            what it imports is not known here.
    """

    releases: Mapping[str, str]
    with_deps: bool = False
    projects: tuple[str, ...] = recipe.PROJECTS


def applies(prefix: Path | None, workspace: Workspace, target: Path | None = None) -> Existing | None:
    """The environment that ``prefix`` names, where its torch is not a conda package; None for any other.

    Args:
        target: another folder to install into.

    Raises:
        InstallError, MachineError: when the environment is one for us, and nothing can be made for it.
    """
    folder = reader.find(prefix) if prefix is not None else None
    if folder is None:
        return None
    if (folder / "conda-meta").is_dir():
        pips = any(folder.glob("lib/python3*/site-packages/torch-*.dist-info"))
        # Of conda alone: it gets conda packages, and torch too where it has none.
        if not foreign_conda(folder) or not pips or torch.is_condas(folder):
            return None
    python = prefix.expanduser().absolute() if prefix is not None and prefix.is_file() else None
    return reader.read(folder, python=python, target=target)


def require_existing(existing: Existing | None, options: Mapping[str, object]) -> None:
    """Refuse options that are for an environment with a torch of its own where there is none.

    Raises:
        UsageError: when one of the options is given that are for an environment with a torch of pip's or uv's.
    """
    named = [name for name, value in options.items() if value]
    if existing is None and named:
        raise UsageError(
            f"{named[0]} is for an environment with a torch that pip or uv installed, and none is named.",
            fix="Name it with --prefix, or leave the option out.",
        )


def for_condas_torch(options: Options, workspace: Workspace) -> Options:
    """``options`` with the row of the matrix that fits the torch of a conda environment which somebody else has made.

    Raises:
        InstallError: when it has a torch that no row is for.
    """
    prefix = options.prefix
    if prefix is None or not foreign_conda(prefix):
        return options
    return rows.of_condas(prefix, reader.conda_records(prefix), options, variants.load(workspace.variants))


def make(existing: Existing, options: Options, wishes: Wishes, workspace: Workspace) -> Work:
    """The plan of an installation, from what the environment has and what the user asks for.

    Raises:
        InstallError: when the environment can't be written, or nothing can be made for its torch, or something that
            the kernels import is missing.
        UsageError: for architectures that the toolkit lacks, or a release that no recipe builds.
        MachineError: when the machine lacks Python headers, a compiler, memory or disk.
    """
    env_torch = torch.read(existing)
    matrix = variants.load(workspace.variants)
    row = rows.derive(existing, env_torch, matrix, workspace, wishes.releases)
    reader.check_writable(existing)
    env_needs = needs.look(existing, row.requires)
    if wishes.projects and not wishes.with_deps:
        needs.require(existing, env_needs)
    fitting.require_possible(machine.gpus())
    variant = row.variant
    variant.check_platform(platforms.here())
    archs = choose_archs(
        variant,
        options.cuda_arch,
        machine.gpus(),
        require=lambda archs: rows.check_archs(archs, row),
        instead="Use --cuda-arch native.",
    )
    newer = any(capability in row.newer for capability in archs.sass)
    toolkit = bridge_parts.find_toolkit(variant, existing.minor, workspace, newer_ptxas=newer)
    parts = _parts(existing, env_torch, row, env_needs, toolkit, options.host_compiler, matrix, workspace)
    channel_list = channel_urls([workspace.channel, bridge_parts.channel_dir(workspace, variant)])
    major = str(parts.compiler.major)
    key = variant.key(existing.minor, archs, compiler=major, kernels=options.kernels, platform=parts.platform)
    compiler = compiler_of(variant, parts, workspace)
    packages = tuple(
        _package(BuildRequest(recipe.render(name, key, workspace), key, channel_list, *compiler), existing, workspace)
        for name in wishes.projects
    )
    # What is installed lies in the root; with --target that is not the environment.
    plan = Plan(variant, existing.minor, archs, existing.root, channel_list, packages, parts)
    plan = replace(with_needs(plan, options.jobs, workspace, environment=False), prefix=existing.prefix)
    return Work(existing, env_torch, row, env_needs, plan)


def driver_note(work: Work) -> str:
    """What to tell a user whose driver is older than the environment's torch; empty where it is not."""
    old = fitting.too_old(work.torch.cuda, machine.gpus())
    if not old:
        return ""
    return f"{old}: neither torch {work.torch.version} nor the kernels can use the GPU before the driver is updated."


def _parts(
    existing: Existing,
    env_torch: Torch,
    row: Row,
    env_needs: Needs,
    toolkit: ToolkitParts,
    host_compiler: str,
    matrix: Matrix,
    workspace: Workspace,
) -> bridge_parts.Parts:
    variant = row.variant
    linked = tuple(
        thin.Linked(
            distribution.name,
            distribution.version,
            distribution.info.parent,
            thin.entries([path for path, _ in distribution.paths()]),
        )
        for distribution in env_needs.closure.values()
        if distribution.name not in needs.TOOLS
    )
    return bridge_parts.Parts(
        variant=variant,
        interpreter=interpreters.choose(existing.minor, workspace),
        compiler=bridge_parts.find_compiler(variant, host_compiler, workspace),
        wheels=_tools(existing.minor, env_torch, row.toolkit, matrix, workspace),
        toolkit=toolkit,
        there=thin.There(env_torch.release, rows.build_prefix(env_torch), existing.minor, linked, variant.cuda),
        platform=toolkit.runs_on,
    )


def _tools(
    python: str, env_torch: Torch, toolkit: str, matrix: Matrix, workspace: Workspace
) -> tuple[pylock.LockedWheel, ...]:
    """What a build needs beside torch, from the lock of the row's nearest Python: all of it runs on newer ones."""
    own = platforms.here()
    if Version(python) < Version("3.10") or Version(env_torch.minor) < Version("2.2"):
        return tuple(pylock.read(pylock.lock_path(workspace, "tools", "old", own), python, own))
    pythons = matrix.get(toolkit, "bridge").pythons
    nearest = python if python in pythons else pythons[-1] if Version(python) > Version(pythons[-1]) else pythons[0]
    lock = pylock.lock_path(workspace, toolkit, f"py{nearest.replace('.', '')}", own)
    wheels = pylock.read(lock, nearest, own)
    return tuple(wheel for wheel in wheels if wheel.name in needs.TOOLS and _runs_on_any(wheel.tags))


def _runs_on_any(tags: frozenset[Tag]) -> bool:
    return any(tag.interpreter.startswith("py3") or tag.interpreter == "py2.py3" for tag in tags)


def _package(request: BuildRequest, existing: Existing, workspace: Workspace) -> PlannedPackage:
    state: State = "to build"
    in_channel = channels.find(workspace.channel, request.filename)
    if in_channel is not None and is_current(in_channel, request.project, workspace):
        is_installed = install.is_installed(existing, request.project, in_channel.name, sha256_of(in_channel))
        state = "installed" if is_installed else "in channel"
    return PlannedPackage(state, request)
