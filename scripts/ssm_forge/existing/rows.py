"""The row of the build matrix for a torch that is there: toolkit, releases, requirements (recipes/torches.yaml)."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ssm_forge.base.arch import ArchList, Capability
from ssm_forge.base.errors import InstallError, UsageError, did_you_mean
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge.package import hash_text
from ssm_forge.existing.reader import Existing
from ssm_forge.existing.torch import Torch
from ssm_forge.flow.plan import Options
from ssm_forge.manifest.variants import Matrix, Variant

# Keys of a cell that say what the environment is to have.
_REQUIREMENTS = ("transformers", "numpy")


@dataclass(frozen=True)
class Row:
    """What is made for one environment.

    Attributes:
        variant: as the builds take it; its name is that of the environment's own bridge channel.
        toolkit: the row of the matrix whose toolkit and locks it has, ``cu124``.
        requires: project -> version range, of what the kernels import beside torch.
        why: why these releases.
        lacks: what the newest releases have and these do not, a sentence for each that was named and is older.
        newer: what the toolkit's nvcc does not know, and a newer ptxas makes machine code for.
    """

    variant: Variant
    toolkit: str
    requires: dict[str, str]
    why: str
    newer: tuple[Capability, ...] = ()
    lacks: tuple[str, ...] = ()

    @property
    def of_nvcc(self) -> tuple[Capability, ...]:
        """What nvcc itself knows."""
        return tuple(c for c in self.variant.supported_archs if c not in self.newer)


@functools.lru_cache
def _table(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return table


def derive(
    existing: Existing, torch: Torch, matrix: Matrix, workspace: Workspace, releases: Mapping[str, str] | None = None
) -> Row:
    """The row of the build matrix that fits an environment's torch.

    Args:
        releases: project -> version, where another than the newest that fits is asked for.

    Raises:
        InstallError: when nothing can be made for this torch; names the nearest that works.
        UsageError: when no recipe builds a release that is asked for.
    """
    # Long: one row, column after column.
    table = _table(workspace.recipes / "torches.yaml")
    _check_release(torch, existing, table)
    major = torch.cuda.split(".")[0]
    toolkit = table["toolkits"].get(major)
    if toolkit is None:
        majors = ", ".join(table["toolkits"])
        raise InstallError(
            f"the torch {torch.version} of {existing.prefix} was built with CUDA {torch.cuda}, and there are compilers "
            f"for CUDA {majors}.",
            fix="Install a torch of one of these.",
        )
    triton = existing.distributions.get("triton") or existing.distributions.get("pytorch-triton")
    cell = _cell(table["cells"], torch, triton.version if triton else "0")
    lacks = []
    for project, release in (releases or {}).items():
        facts = _facts_of_named(project, release, existing, torch, cell, table)
        cell = _with_named(project, release, facts, cell)
        lacks += [f"{project} {release} lacks {_one_line(facts['lacks'])}"] if "lacks" in facts else []
    base = matrix.get(toolkit, "bridge")
    newer = table["newer_ptxas"].get(major, "")
    archs_of_nvcc = base.row["cuda_arch_supported"]
    oldest, newest = (int(bound) for bound in base.row["host_compiler_range"].split("-"))
    row = {
        **base.row,
        "pytorch": torch.minor,
        "pytorch_host": torch.minor,
        "pytorch_build": f"{build_prefix(torch)}_*",
        "triton": _minor_of(triton.version) if triton else base.row["triton"],
        "cuda_arch_supported": f"{archs_of_nvcc};{newer}" if newer else archs_of_nvcc,
        "host_compiler_range": f"{max(oldest, int(cell.get('oldest_gcc', oldest)))}-{newest}",
        "python_min": existing.minor,
        "python_max": existing.minor,
        "causal_conv1d": str(cell["causal_conv1d"]),
        "mamba_ssm": str(cell["mamba_ssm"]),
    }
    name = f"env-{hash_text(existing.prefix.resolve(), torch.identity)[:12]}"
    variant = replace(base, name=name, row=row, python_specs={existing.minor: _spec(existing.minor)})
    requires = {"einops": "", "packaging": "", "transformers": "", "triton": ""}
    requires |= {key: str(cell[key]) for key in _REQUIREMENTS if key in cell}
    if triton and _contains(table["triton_with_setuptools"], triton.version):
        requires["setuptools"] = ""
    machine_code_only = ArchList.parse(newer).sass if newer else ()
    return Row(variant, toolkit, requires, _one_line(cell["why"]), machine_code_only, tuple(lacks))


def of_condas(prefix: Path, records: Mapping[str, tuple[str, str]], options: Options, matrix: Matrix) -> Options:
    """``options`` with the row that is for conda's torch in an environment; as they are where it has none.

    Args:
        records: name -> (version, build) of the environment's conda packages.

    Raises:
        InstallError: when no row is for that torch.
    """
    if "pytorch" not in records:
        return options
    version, build = records["pytorch"]
    python = _minor_of(records["python"][0]) if "python" in records else options.python
    for variant in matrix.variants:
        fits = version.startswith(f"{variant.torch}.") and fnmatch.fnmatchcase(build, variant.row["pytorch_build"])
        if fits and python in variant.pythons:
            return replace(options, variant=variant.name, source=variant.source, python=python)
    offered = [f"{v.torch} with {v.row['pytorch_build']} ({v.source})" for v in matrix.variants]
    raise InstallError(
        f"{prefix} has conda's pytorch {version} ({build}) with Python {python}, and there are conda packages for "
        f"pytorch {', '.join(offered)}.",
        fix="Install one of these with conda, or use a venv with pip's torch, for which any release from 2.0 on does.",
    )


def build_prefix(torch: Torch) -> str:
    """Start of the build string of the torch that kernels are made for: no other torch's may be beside them."""
    return f"there_cuda{torch.cuda.replace('.', '')}_{torch.identity[:8]}"


def check_archs(archs: ArchList, row: Row) -> None:
    """Refuse GPUs that a row's toolkit can't compile for.

    Raises:
        UsageError: when the toolkit lacks a capability, or has only machine code for one whose PTX is wanted.
    """
    variant = row.variant
    if wanted := [c for c in archs.ptx if c in row.newer]:
        raise UsageError(
            f"nvcc {variant.cuda} makes PTX for at most {row.of_nvcc[-1]}, and machine code for {wanted[0]} from it.",
            fix=f"Use --cuda-arch '{row.of_nvcc[-1]}+PTX;{wanted[0]}'.",
        )
    missing = [c for c in archs.sass if c not in variant.supported_archs]
    if missing:
        newest = row.of_nvcc[-1]
        raise UsageError(
            f"the newest compiler of CUDA {variant.cuda.split('.')[0]} to be had is nvcc {variant.cuda}, which can't "
            f"target {', '.join(map(str, missing))}; it can target {', '.join(map(str, variant.supported_archs))}.",
            fix=f"Use --cuda-arch {newest}+PTX, which a newer GPU compiles at first use (minutes), "
            "or a torch of CUDA 13.",
        )


def _check_release(torch: Torch, existing: Existing, table: dict[str, Any]) -> None:
    oldest, newest = Version(table["oldest"]), Version(table["newest"])
    minor = Version(torch.minor)
    if minor < oldest:
        raise InstallError(
            f"{existing.prefix} has torch {torch.version}, and the kernels need {oldest} or newer.",
            fix=f"The nearest that works is torch {oldest}.",
        )
    if minor > newest:
        raise InstallError(
            f"{existing.prefix} has torch {torch.version}, and the newest that is known here is {newest}.",
            fix=f"The nearest that works is torch {newest}; a newer ssm-forge may know more.",
        )


def _cell(cells: list[dict[str, Any]], torch: Torch, triton: str) -> dict[str, Any]:
    for cell in cells:
        fits_torch = SpecifierSet(cell.get("torch", "")).contains(torch.release, prereleases=True)
        if fits_torch and _contains(cell.get("triton", ""), triton):
            return cell
    raise InstallError(
        f"recipes/torches.yaml has no cell for torch {torch.version} with Triton {triton}.",
        fix="Install the Triton that this torch requires.",
    )


def _facts_of_named(
    project: str, release: str, existing: Existing, torch: Torch, cell: dict[str, Any], table: dict[str, Any]
) -> dict[str, Any]:
    """What the table says of a release that was asked for.

    Raises:
        UsageError: when no recipe builds that release.
        InstallError: when it does not work with the environment's Triton, or the CUDA of its torch.
    """
    releases = table["releases"][project.replace("-", "_")]
    if release not in releases:
        raise UsageError(
            f"no recipe here builds {project} {release}; they build {', '.join(releases)}.",
            fix=f"{did_you_mean(release, releases)}Name one of these, or leave --{project} out; of another, name the "
            "sources with --source-tree (docs/forks.md).",
        )
    facts: dict[str, Any] = releases[release] or {}
    triton = existing.distributions.get("triton") or existing.distributions.get("pytorch-triton")
    versions = {"Triton": triton.version if triton else "", "CUDA": torch.cuda}
    for what, version in versions.items():
        wanted = facts.get(what.lower(), "")
        if not _contains(wanted, version or "0"):
            raise InstallError(
                f"{project} {release} needs {what} {wanted}, and {existing.prefix} has {version or 'none'}.",
                fix=f"Leave --{project} out: {cell[project.replace('-', '_')]} is the newest that works with it.",
            )
    return facts


def _with_named(project: str, release: str, facts: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    """The cell with a release that was asked for, and with what that needs beside what the torch needs."""
    changed = {project.replace("-", "_"): release, "why": f"{project} {release} was asked for; {cell['why']}"}
    for key in _REQUIREMENTS:
        if wanted := ",".join(str(source[key]) for source in (cell, facts) if key in source):
            changed[key] = str(SpecifierSet(wanted))
    return {**cell, **changed}


def _contains(specifier: str, version: str) -> bool:
    """Whether a range holds a version, whatever its local part is."""
    return SpecifierSet(specifier).contains(version.partition("+")[0], prereleases=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _minor_of(version: str) -> str:
    return ".".join(version.partition("+")[0].split(".")[:2])


def _spec(python: str) -> str:
    return f"{python}.* *_cpython" if int(python.split(".")[1]) < 13 else f"{python}.* *_cp{python.replace('.', '')}"
