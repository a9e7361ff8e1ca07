"""What a package is made from, by digest; and whether a finished package was made from just that."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import Platform
from ssm_forge.build import finalize
from ssm_forge.build import origin as build_origin
from ssm_forge.build import provenance as materials
from ssm_forge.build.origin import Origin
from ssm_forge.build.request import BuildRequest
from ssm_forge.farm.cells import Cell
from ssm_forge.flow import planning
from ssm_forge.manifest import recipe, variants
from ssm_forge.package import read as inspection
from ssm_forge.package.read import Material


def request(cell: Cell, host_compiler: str, workspace: Workspace) -> BuildRequest:
    """The build that makes the cell's package.

    Raises:
        MachineError: when this machine has no Python or C++ compiler for it.
        UsageError: when the variant is not made for the cell's platform.
    """
    origin = origin_of(cell, host_compiler, workspace)
    parts = origin.parts
    major = None if parts is None else str(parts.compiler.major)
    key = cell.variant.key(cell.python, cell.archs, compiler=major, kernels=cell.kernels, platform=cell.platform)
    locked = planning.locked_environment(cell.variant, cell.python, workspace)
    sources = planning.locked_sources(cell.variant, key, workspace) if locked is not None else {}
    return BuildRequest(
        recipe.render(cell.project, key, workspace),
        key,
        origin.channels,
        *build_origin.compiler_of(cell.variant, parts, workspace),
        locked=sources.get(cell.project),
        beside=locked.records if locked is not None and sources else (),
    )


def origin_of(cell: Cell, host_compiler: str, workspace: Workspace) -> Origin:
    """Where the parts of a cell's environment come from; looked up once for both projects and all capabilities.

    Raises:
        MachineError: as :func:`request`.
    """
    return _origin(cell.variant.name, cell.variant.source, cell.python, host_compiler, workspace, cell.platform)


@functools.lru_cache
def _origin(
    variant: str, source: variants.Source, python: str, host_compiler: str, workspace: Workspace, platform: Platform
) -> Origin:
    row = variants.load(workspace.variants).get(variant, source)
    row.check_platform(platform)
    return build_origin.origin(row, python, host_compiler, workspace, platform)


def materials_of(request: BuildRequest, workspace: Workspace) -> list[Material]:
    """Sources, patches and locks of a build, and its tools where a lock has them; what is solved anew is not known."""
    locked = [] if request.locked is None else materials.locked(request.locked)
    return materials.collect(
        request.rendered, request.key, workspace, compiler_lock=request.compiler_lock, packages=locked
    )


def digest(request: BuildRequest, workspace: Workspace) -> str:
    """sha256 (hex) over everything that is known of a build before it runs."""
    made_by = [finalize.FORMAT, recipe.digest(request.project, workspace)]
    facts = [*made_by, request.filename, request.key.to_provenance(), materials_of(request, workspace)]
    return text_digest(facts)


def text_digest(values: Any) -> str:
    """sha256 (hex) over plain values, written as JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def made_from(package: Path, request: BuildRequest, workspace: Workspace) -> bool:
    """Whether a finished package was made from what ``request`` would be made from now."""
    try:
        provenance = inspection.provenance(package)
    except IntegrityError:
        return False
    recipe_now = (finalize.FORMAT, recipe.digest(request.project, workspace))
    if (provenance.get("format"), provenance.get("recipe_sha256")) != recipe_now:
        return False
    needed = {_identity(item) for item in materials_of(request, workspace)}
    return needed <= {_identity(item) for item in provenance.get("materials", ())}


def _identity(item: Material) -> tuple[str, str, str]:
    return (item["role"], item["uri"], inspection.material_digest(item)[1])
