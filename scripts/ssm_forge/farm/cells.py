"""The cells of the build matrix, one a package, and the expression that selects some of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ssm_forge.base import platforms
from ssm_forge.base.arch import ArchList, resolve
from ssm_forge.base.errors import UsageError, did_you_mean
from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.manifest.variants import Matrix, Source, Variant
from ssm_forge.package.kernels import DEFAULT, KERNELS, Kernels

KEYS = ("variant", "source", "python", "project", "cuda", "torch", "kernels", "platform")


@dataclass(frozen=True)
class Cell:
    """One package of the matrix.

    Attributes:
        variant: the row of the matrix.
        python: minor version, ``3.12``.
        archs: compute capabilities that the kernels are made for.
        project: recipe name.
        platform: what the package is for.
        kernels: ours, or upstream's as they are.
    """

    variant: Variant
    python: str
    archs: ArchList
    project: str
    platform: Platform
    kernels: Kernels = DEFAULT

    @property
    def facts(self) -> Mapping[str, str]:
        """What an expression can ask for: :data:`KEYS` and their values."""
        row = self.variant
        return {
            "variant": row.name,
            "source": row.source,
            "python": self.python,
            "project": self.project,
            "cuda": row.cuda,
            "torch": row.torch,
            "kernels": self.kernels,
            "platform": self.platform.subdir,
        }

    @property
    def row(self) -> str:
        """What shares a toolchain: ``cu130-bridge``, ``cu130-bridge-linux-aarch64``."""
        platform = "" if self.platform == LINUX_64 else f"-{self.platform.subdir}"
        return f"{self.variant.name}-{self.variant.source}{platform}"

    @property
    def environment(self) -> str:
        """What shares a torch: ``cu130-bridge-py312``."""
        return f"{self.row}-py{self.python.replace('.', '')}"

    @property
    def objects(self) -> str:
        """What shares compiled objects, all Pythons: ``mamba-ssm.cu130-bridge-sm90``."""
        return f"{self.project}.{self.row}-{self.made}"

    @property
    def name(self) -> str:
        """What no other cell is called: ``mamba-ssm.cu130-bridge-py312-sm90``."""
        return f"{self.project}.{self.environment}-{self.made}"

    @property
    def made(self) -> str:
        """What tells packages of one project in one environment apart: ``sm90``, ``sm90-upstream``."""
        return self.archs.tag if self.kernels == DEFAULT else f"{self.archs.tag}-{self.kernels}"


def every(matrix: Matrix, projects: Sequence[str], archs: Sequence[str] = ()) -> list[Cell]:
    """All cells of a matrix: each row, Python, platform, project and choice of kernels, once for each list of
    capabilities.

    Args:
        projects: recipe names.
        archs: lists of compute capabilities as ``--cuda-arch`` takes them; the row's default where there are none.
    """
    return [
        Cell(variant, python, chosen, project, platform, kernels)
        for variant in matrix.variants
        for chosen in _archs(variant, archs)
        for platform in variant.platforms
        for python in variant.pythons
        for project in projects
        for kernels in KERNELS
    ]


def _archs(variant: Variant, requests: Sequence[str]) -> tuple[ArchList, ...]:
    """The lists that the row's nvcc can make; another row may have the others."""
    lists = [
        resolve(
            request or None,
            supported=variant.supported_archs,
            upstream=variant.upstream_archs,
            default=variant.default_archs,
            gpus=(),
        )
        for request in requests or ("",)
    ]
    return tuple(dict.fromkeys(archs for archs in lists if set(archs.sass) <= set(variant.supported_archs)))


def select(cells: Sequence[Cell], expression: str) -> list[Cell]:
    """The cells that every term of an expression holds for.

    Terms stand side by side: ``variant=cu118,cu130 python!=3.10 project=mamba*``. A term's values are alternatives, and
    may be patterns. An expression without ``kernels`` selects none of upstream's, one without ``platform`` what is for
    this machine's.

    Raises:
        UsageError: for a key, or a value, that no cell has, or when nothing is left; lists what there is.
    """
    left = list(cells)
    if not _asks_for("kernels", expression):
        left = [cell for cell in left if cell.kernels == DEFAULT]
    if not _asks_for("platform", expression):
        left = [cell for cell in left if cell.platform == platforms.known_here()]
    for term in expression.split():
        holds = _term(term, cells)
        left = [cell for cell in left if holds(cell)]
    if not left:
        raise UsageError(f"'{expression}' selects nothing.", fix=f"There is: {_listed(cells)}")
    return left


def _asks_for(key: str, expression: str) -> bool:
    return any(re.match(f"{key}!?=", term) for term in expression.split())


def with_needed(picked: Sequence[Cell], projects: Sequence[str]) -> list[Cell]:
    """``picked``, each after the cells whose package its own test installs: mamba-ssm's needs causal-conv1d.

    Args:
        projects: in the order in which one needs another.
    """
    by_name: dict[str, Cell] = {}
    for cell in picked:
        for project in projects[: projects.index(cell.project) + 1]:
            needed = replace(cell, project=project)
            by_name.setdefault(needed.name, needed)
    return list(by_name.values())


def _term(term: str, cells: Sequence[Cell]) -> Callable[[Cell], bool]:
    key, equals, values = term.partition("=")
    negated = key.endswith("!")
    key = key.removesuffix("!")
    if not equals or key not in KEYS:
        raise UsageError(
            f"'{term}' is no term of a selection.",
            fix=f"{did_you_mean(key, KEYS)}Write KEY=VALUE or KEY!=VALUE; there is {_keys(cells)}.",
        )
    patterns = values.split(",")
    there_are = _values(cells, key)
    for pattern in patterns:
        if not any(fnmatchcase(value, pattern) for value in there_are):
            raise UsageError(
                f"no {key} is '{pattern}'.", fix=f"{did_you_mean(pattern, there_are)}There is {', '.join(there_are)}."
            )
    return lambda cell: any(fnmatchcase(cell.facts[key], pattern) for pattern in patterns) != negated


def _values(cells: Iterable[Cell], key: str) -> list[str]:
    return list(dict.fromkeys(cell.facts[key] for cell in cells))


def _keys(cells: Sequence[Cell]) -> str:
    return "; ".join(f"{key}={','.join(_values(cells, key))}" for key in KEYS)


def _listed(cells: Sequence[Cell]) -> str:
    pythons: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        minors = pythons.setdefault((cell.variant.name, cell.variant.source), [])
        if cell.python not in minors:
            minors.append(cell.python)
    return "; ".join(f"variant={name} source={source} python={','.join(p)}" for (name, source), p in pythons.items())


def from_one_source(cells: Sequence[Cell], *, conda: bool) -> list[Cell]:
    """Those of ``cells`` that are of the one source which ``--source auto`` chooses for their variant and platform.

    Args:
        conda: whether conda's channels can be reached.
    """
    offered: dict[tuple[str, Platform], set[Source]] = {}
    for cell in cells:
        offered.setdefault((cell.variant.name, cell.platform), set()).add(cell.variant.source)

    def wanted(cell: Cell) -> bool:
        sources = offered[cell.variant.name, cell.platform]
        return cell.variant.source == ("conda" if conda and "conda" in sources else "bridge")

    return [cell for cell in cells if wanted(cell)]
