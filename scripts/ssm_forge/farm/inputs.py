"""What a package is made from, by digest; and whether a finished package was made from just that."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.paths import Workspace
from ssm_forge.build import finalize
from ssm_forge.build import provenance as materials
from ssm_forge.build.run import BuildRequest
from ssm_forge.farm.cells import Cell
from ssm_forge.flow import plan
from ssm_forge.manifest import recipe, variants


def request(cell: Cell, host_compiler: str, workspace: Workspace) -> BuildRequest:
    """The build that makes the cell's package.

    Raises:
        MachineError: when this machine has no Python or C++ compiler for it.
    """
    origin = origin_of(cell, host_compiler, workspace)
    overrides = {}
    if origin.parts is not None:
        overrides = dict.fromkeys(variants.COMPILER_KEYS, str(origin.parts.compiler.major))
    values = cell.variant.render_values(cell.python, cell.archs, **overrides)
    locked = plan.locked_environment(cell.variant, cell.python, workspace)
    sources = plan.locked_sources(cell.variant, values, workspace) if locked is not None else {}
    made = BuildRequest(
        cell.project,
        values,
        "",
        origin.channels,
        *plan.compiler_of(cell.variant, origin.parts, workspace),
        locked=sources.get(cell.project),
        beside=locked.records if locked is not None and sources else (),
    )
    return replace(made, filename=recipe.render(cell.project, values, workspace).filename)


def origin_of(cell: Cell, host_compiler: str, workspace: Workspace) -> plan.Origin:
    """Where the parts of a cell's environment come from; looked up once for both projects and all capabilities."""
    return _origin(cell.variant.name, cell.variant.source, cell.python, host_compiler, workspace)


@functools.lru_cache
def _origin(
    variant: str, source: variants.Source, python: str, host_compiler: str, workspace: Workspace
) -> plan.Origin:
    options = plan.Options(
        variant=variant, python=python, source=source, host_compiler=host_compiler, for_this_machine=False
    )
    return plan.origin(options, workspace)


def materials_of(request: BuildRequest, workspace: Workspace) -> list[materials.Material]:
    """Sources, patches and locks of a build, and its tools where a lock has them; what is solved anew is not known."""
    locked = [] if request.locked is None else materials.locked(request.locked)
    return materials.collect(
        request.project, request.values, workspace, compiler_lock=request.compiler_lock, packages=locked
    )


def digest(request: BuildRequest, workspace: Workspace) -> str:
    """sha256 over everything that is known of a build before it runs."""
    known = [finalize.FORMAT, request.filename, recipe.digest(request.project, workspace), request.values]
    return text_digest([*known, materials_of(request, workspace)])


def text_digest(known: Any) -> str:
    """sha256 over plain values."""
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def made_from(package: Path, request: BuildRequest, workspace: Workspace) -> bool:
    """Whether a finished package was made from what ``request`` would be made from now."""
    try:
        told = finalize.provenance(package)
    except IntegrityError:
        return False
    recipe_now = (finalize.FORMAT, recipe.digest(request.project, workspace))
    if (told.get("format"), told.get("recipe_sha256")) != recipe_now:
        return False
    wanted = {_identity(item) for item in materials_of(request, workspace)}
    return wanted <= {_identity(item) for item in told.get("materials", ())}


def _identity(item: materials.Material) -> tuple[str, str, str]:
    return (item["role"], item["uri"], materials.digest(item)[1])
