"""The build matrix of ``recipes/variants.yaml``: rows, lookup, and what the recipe renderer gets."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from packaging.version import Version

from ssm_forge.base import platforms
from ssm_forge.base.arch import ArchList, Capability, code_for
from ssm_forge.base.errors import UsageError, did_you_mean
from ssm_forge.base.paths import launcher
from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.manifest.build_key import PLATFORM_KEY, BuildKey
from ssm_forge.package import kernels as package_kernels
from ssm_forge.package.kernels import Kernels

Source = Literal["conda", "bridge"]
SOURCES: tuple[Source, ...] = ("conda", "bridge")

# Of a bridge row these are what the machine has.
COMPILER_KEYS = ("c_compiler_version", "cxx_compiler_version")
# Says where a row is, and no build differs by it: a package has the platform that it is for instead.
_PLATFORMS_KEY = "forge_platforms"

DEFAULT_VARIANT = "cu130"
DEFAULT_PYTHON = "3.12"


@dataclass(frozen=True)
class Variant:
    """One row of the matrix.

    Attributes:
        name: ``cu130``.
        source: where its parts come from.
        row: the row's zipped keys and values, as conda-forge's tools name them.
        common: the keys with one value for all rows.
        python_specs: Python version -> conda's variant value (``3.12.* *_cpython``).
    """

    name: str
    source: Source
    row: dict[str, str]
    common: dict[str, str]
    python_specs: dict[str, str]

    @property
    def cuda(self) -> str:
        """CUDA toolkit release, ``13.0``."""
        return self.row["cuda_compiler_version"]

    @property
    def torch(self) -> str:
        """torch minor release, ``2.11``."""
        return self.row["pytorch"]

    @property
    def torch_spec(self) -> str:
        """The match spec of the torch that kernels of this variant are built with."""
        return f"pytorch {self.row['pytorch_host']}.* {self.row['pytorch_build']}"

    @property
    def pythons(self) -> tuple[str, ...]:
        """Python minors that torch exists for here, oldest first."""
        low, high = (Version(self.row[key]) for key in ("python_min", "python_max"))
        return tuple(p for p in self.python_specs if low <= Version(p) <= high)

    @property
    def platforms(self) -> tuple[Platform, ...]:
        """What packages of this row can be made for."""
        return tuple(platforms.of(subdir) for subdir in self.row.get(_PLATFORMS_KEY, LINUX_64.subdir).split(";"))

    @property
    def default_archs(self) -> str:
        """The GPUs that are compiled for where nobody names any, as users write them."""
        return self.row["cuda_arch_list"]

    @property
    def supported_archs(self) -> tuple[Capability, ...]:
        """What this variant's nvcc can make SASS for."""
        return ArchList.parse(self.row["cuda_arch_supported"]).sass

    @property
    def upstream_archs(self) -> tuple[Capability, ...]:
        """What upstream's setup.py builds with this toolkit."""
        return ArchList.parse(self.row["cuda_arch_upstream"]).sass

    @property
    def projects(self) -> dict[str, str]:
        """Package name -> version, in build order."""
        return {"causal-conv1d": self.row["causal_conv1d"], "mamba-ssm": self.row["mamba_ssm"]}

    def check_python(self, python: str) -> None:
        """Refuse a Python that this row does not have.

        Raises:
            UsageError: when the variant has no such Python.
        """
        if python not in self.pythons:
            raise UsageError(
                f"variant {self.name} ({self.source}) exists for Python {', '.join(self.pythons)}, not {python}.",
                fix=f"Use --python {self.pythons[-1]}, or see '{launcher()} variants' for the whole matrix.",
            )

    def check_platform(self, platform: Platform) -> None:
        """Refuse a platform that this row is not made for.

        Raises:
            UsageError: naming what it is made for.
        """
        if platform not in self.platforms:
            made = " and ".join(known.subdir for known in self.platforms)
            raise UsageError(
                f"variant {self.name} ({self.source}) is made for {made}, not for {platform.subdir}.",
                fix=f"See '{launcher()} variants' for what there is for each platform.",
            )

    def check_archs(self, archs: ArchList, matrix: Matrix) -> None:
        """Refuse GPUs that this row's nvcc can't compile for.

        Raises:
            UsageError: when this variant's nvcc lacks a capability; names the variants that have it.
        """
        missing = [c for c in archs.sass if c not in self.supported_archs]
        if not missing:
            return
        others = sorted(
            {v.name for v in matrix.variants if all(c in v.supported_archs for c in archs.sass)} - {self.name}
        )
        running = {c: code for c in missing if (code := code_for(c, self.supported_archs)) != c}
        if others:
            fix = f"Use --variant {others[-1]}, whose nvcc has it."
        elif len(running) == len(missing):
            fix = f"Use {', '.join(f'{code}, whose code runs on {c}' for c, code in running.items())}."
        else:
            fix = "No variant has it; choose from this list."
        raise UsageError(
            f"variant {self.name} with nvcc {self.cuda} can't target {', '.join(map(str, missing))}; it can "
            f"target {', '.join(map(str, self.supported_archs))}.",
            fix=fix,
        )

    def key(
        self,
        python: str,
        archs: ArchList,
        *,
        compiler: str | None = None,
        kernels: Kernels = package_kernels.DEFAULT,
        platform: Platform = LINUX_64,
    ) -> BuildKey:
        """What a build of this row is made for.

        Args:
            compiler: major of the machine's g++, where that is not the row's.
            kernels: ours, or upstream's as they are.
        """
        settings = {**self.common, **self.row, "python": self.python_specs[python], "cuda_arch_list": str(archs)}
        settings.pop(_PLATFORMS_KEY, None)
        settings["build_source"] = self.source
        if platform != LINUX_64:
            settings[PLATFORM_KEY] = platform.subdir
        if compiler is not None:
            settings.update(dict.fromkeys(COMPILER_KEYS, compiler))
        return BuildKey.from_settings(settings).with_kernels(kernels)


@dataclass(frozen=True)
class Matrix:
    """All rows of the file."""

    variants: tuple[Variant, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all rows, each once, in the file's order."""
        return tuple(sorted({v.name for v in self.variants}))

    def get(self, name: str, source: Source) -> Variant:
        """The row of this name and source.

        Raises:
            UsageError: for a variant that does not exist, or not from this source.
        """
        rows = [v for v in self.variants if v.name == name]
        for variant in rows:
            if variant.source == source:
                return variant
        if rows:
            raise UsageError(
                f"variant {name} can't be made from source {source}.", fix=f"Use --source {rows[0].source}."
            )
        raise UsageError(
            f"there is no variant '{name}'; there are {', '.join(self.names)}.",
            fix=f"{did_you_mean(name, self.names)}See '{launcher()} variants'.",
        )

    def sources(self, name: str, platform: Platform | None = None) -> tuple[Source, ...]:
        """The sources that variant ``name`` can be made from; empty when there is no such variant.

        Args:
            platform: only those that have it for this platform.
        """
        rows = (v for v in self.variants if v.name == name)
        return tuple(v.source for v in rows if platform is None or platform in v.platforms)


@functools.lru_cache
def load(path: Path) -> Matrix:
    """Read ``variants.yaml``.

    Raises:
        UsageError: when zipped keys differ in length.
    """
    data: dict[str, list[str]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    zipped: list[str] = data.pop("zip_keys")[0]  # type: ignore[assignment]
    pythons = {spec.split(".*")[0]: spec for spec in data.pop("python")}
    lengths = {key: len(data[key]) for key in zipped}
    if len(set(lengths.values())) != 1:
        raise UsageError(f"{path}: zipped keys must have equally many values, but have {lengths}.")
    common = {key: str(values[0]) for key, values in data.items() if key not in zipped}
    rows = []
    for index in range(lengths[zipped[0]]):
        row = {key: str(data[key][index]) for key in zipped}
        source = row["forge_source"]
        if source not in SOURCES:
            raise UsageError(f"{path}: forge_source must be one of {', '.join(SOURCES)}, not '{source}'.")
        rows.append(Variant(name=row["forge_variant"], source=source, row=row, common=common, python_specs=pythons))
    return Matrix(tuple(rows))
