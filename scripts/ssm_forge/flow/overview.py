"""The build matrix as this machine sees it: what can be had, what is built, what is installed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich.text import Text

from ssm_forge.base import platforms
from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import Platform
from ssm_forge.base.tables import FoldingTable
from ssm_forge.base.ui import out
from ssm_forge.bridge import interpreter, pylock
from ssm_forge.build import origin
from ssm_forge.install import marker as install_marker
from ssm_forge.install import registry
from ssm_forge.manifest import recipe, variants
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.variants import Source, Variant
from ssm_forge.package import kernels as package_kernels
from ssm_forge.package import read as inspection


@dataclass(frozen=True)
class Row:
    """One variant from one source, as this machine sees it.

    Attributes:
        platforms: what it is made for.
        pythons: Python minors that it exists for.
        available: those that can be made or fetched from here now.
        why_not: why the others can't; empty when all can.
        built: ``py3.12: 8.0;9.0+PTX`` for each whole set of packages in the channel; ``upstream`` after it for those
            with upstream's kernels.
        installed: the prefixes that hold it.
    """

    variant: str
    source: Source
    cuda: str
    torch: str
    triton: str
    gxx: str
    cudnn: str
    causal_conv1d: str
    mamba_ssm: str
    default_archs: str
    platforms: tuple[str, ...]
    pythons: tuple[str, ...]
    available: tuple[str, ...]
    why_not: str
    built: tuple[str, ...]
    installed: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, for --json."""
        return asdict(self)


def rows(workspace: Workspace, platform: Platform) -> list[Row]:
    """One row for each of ``variants.yaml``, for a platform; channels are asked once, built packages are read."""
    matrix = variants.load(workspace.variants)
    online = origin.conda_reachable()
    local_pythons = {*interpreter.available(workspace), *interpreter.brought(workspace)}
    if platform != platforms.known_here():
        # A build for another platform takes Debian's Python of that, and one of this machine's.
        local_pythons &= {*interpreter.brought(workspace, platform)}
    built = _built(workspace, platform)
    installed = _installed(workspace)
    table_rows = []
    for variant in matrix.variants:
        availability = _available(variant, online, local_pythons, workspace, platform)
        table_rows.append(
            Row(
                variant=variant.name,
                source=variant.source,
                cuda=variant.cuda,
                torch=variant.torch,
                triton=variant.row["triton"],
                gxx=variant.row["cxx_compiler_version"],
                cudnn=variant.row["cudnn"],
                causal_conv1d=variant.row["causal_conv1d"],
                mamba_ssm=variant.row["mamba_ssm"],
                default_archs=variant.default_archs,
                platforms=tuple(known.subdir for known in variant.platforms),
                pythons=variant.pythons,
                available=availability.pythons,
                why_not=availability.why_not,
                built=built[variant.name, variant.source],
                installed=installed[variant.name, variant.source],
            )
        )
    return table_rows


class _Availability(NamedTuple):
    """The Python minors that can be made or fetched from here, and why the others can't; empty when all can."""

    pythons: tuple[str, ...]
    why_not: str = ""


def _available(
    variant: Variant, online: bool, local_pythons: Collection[str], workspace: Workspace, platform: Platform
) -> _Availability:
    if platform not in variant.platforms:
        return _Availability((), f"not made for {platform.subdir}")
    if variant.source == "conda":
        return _Availability(variant.pythons) if online else _Availability((), "no conda channel can be reached")
    locks = {p: pylock.lock_path(workspace, variant.name, f"py{p.replace('.', '')}", platform) for p in variant.pythons}
    available = tuple(p for p in variant.pythons if p in local_pythons and locks[p].exists())
    reasons = []
    if absent := [p for p in variant.pythons if p not in local_pythons]:
        where = "on this machine" if platform == platforms.known_here() else f"for {platform.subdir} to be had here"
        reasons.append(f"no Python {', '.join(absent)} with headers {where}")
    if unlocked := [p for p in variant.pythons if not locks[p].exists()]:
        reasons.append(f"no lock for Python {', '.join(unlocked)}")
    return _Availability(available, "; ".join(reasons))


def _built(workspace: Workspace, platform: Platform) -> dict[tuple[str, str], tuple[str, ...]]:
    """What the channel holds of all projects for a platform, by variant and source."""
    projects: dict[tuple[str, str, str, str, str], set[str]] = defaultdict(set)
    for package in sorted((workspace.channel / platform.subdir).glob("*.conda")):
        try:
            provenance = inspection.provenance(package)
        except IntegrityError:
            continue  # `channel check` reports what is damaged.
        try:
            key = BuildKey.from_provenance(provenance)
        except ValueError:
            continue  # Not one of ours.
        whose = "" if key.kernels == package_kernels.DEFAULT else f" {key.kernels}"
        projects[key.variant, key.source, key.python, str(key.archs), whose].add(provenance["name"])
    sets: dict[tuple[str, str], tuple[str, ...]] = defaultdict(tuple)
    for (variant, source, python, archs, whose), names in sorted(projects.items()):
        if names >= set(recipe.PROJECTS):
            sets[variant, source] += (f"py{python}: {archs}{whose}",)
    return sets


def _installed(workspace: Workspace) -> dict[tuple[str, str], tuple[str, ...]]:
    prefixes: dict[tuple[str, str], tuple[str, ...]] = defaultdict(tuple)
    for prefix in registry.installed_prefixes(workspace):
        marker = install_marker.read_marker(prefix)
        if marker is not None and any(package.startswith(recipe.PROJECTS) for package in marker.packages):
            prefixes[marker.variant, marker.source] += (str(prefix),)
    return prefixes


def show(table_rows: list[Row], workspace: Workspace) -> None:
    """Print the matrix for people."""
    table = FoldingTable(
        *("variant", "source", "CUDA", "torch", "Triton", "g++", "cuDNN", "causal-conv1d", "mamba-ssm"),
        *("Python", "built", "installed"),
    )
    for row in table_rows:
        pythons = Text(" ").join(Text(p) if p in row.available else Text(f"({p})", style="dim") for p in row.pythons)
        prefixes = [prefix.replace(f"{workspace.root}/", "") for prefix in row.installed]
        table.add_row(
            *(row.variant, row.source, row.cuda, row.torch, row.triton, row.gxx, row.cudnn),
            *(row.causal_conv1d, row.mamba_ssm, pythons),
            *("\n".join(part) or "-" for part in (row.built, prefixes)),
        )
    out.print(table)
    for row in table_rows:
        if row.why_not:
            out.print(f"({row.variant} from {row.source}: {row.why_not})", markup=False)
