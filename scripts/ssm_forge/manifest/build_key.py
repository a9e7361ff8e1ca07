"""What a build of the kernels is made for: a row of the build matrix, a Python, GPUs, a compiler.

Two builds from the same recipe and patches with equal keys give the same package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssm_forge.base import platforms
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import UsageError
from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.package import kernels as package_kernels
from ssm_forge.package.kernels import Kernels

# The variant key that asks for upstream's kernels. Where it is missing they are ours, so that no build string and no
# package of ours tells of it.
_KERNELS = "forge_kernels"
# conda's name of it. Packages were made for one platform first, and those say nothing of it.
PLATFORM_KEY = "target_platform"


@dataclass(frozen=True)
class BuildKey:
    """The values that a recipe is rendered with, read once. Made by the class methods, which keep its parts in step.

    Attributes:
        variant: ``cu130``.
        source: where the parts come from, ``conda`` or ``bridge`` (a package may be of a version with others).
        python: minor, ``3.12``.
        archs: the GPUs that the kernels are for.
        cuda: toolkit release, ``13.0``.
        compiler: major of g++, ``14``.
        kernels: ours, ``forge``, or ``upstream``: none of our patches that change what runs.
        platform: what the package runs on.
        settings: every key of the matrix with its value as text, in the matrix's order; equality ignores the order.
    """

    variant: str
    source: str
    python: str
    archs: ArchList
    cuda: str
    compiler: str
    kernels: Kernels
    platform: Platform
    settings: Mapping[str, str] = field(hash=False, repr=False)

    @classmethod
    def from_settings(cls, settings: Mapping[str, str]) -> BuildKey:
        """The key that these values are.

        Raises:
            ValueError: when one that every build has is missing, or is no text; names it.
        """
        settings = dict(settings)
        for name, value in settings.items():
            if not isinstance(value, str):
                raise ValueError(f"its {name} is {value!r:.80}")
        for name in _NEEDED:
            if name not in settings:
                raise ValueError(f"it has no {name}")
        try:
            archs = ArchList.parse(settings["cuda_arch_list"])
        except UsageError as error:
            raise ValueError(f"its cuda_arch_list is {settings['cuda_arch_list']!r:.80}") from error
        try:
            platform = platforms.of(settings.get(PLATFORM_KEY, LINUX_64.subdir))
        except UsageError as error:
            raise ValueError(f"its {PLATFORM_KEY} is {settings[PLATFORM_KEY]!r:.80}") from error
        return cls(
            variant=settings["forge_variant"],
            source=settings["forge_source"],
            python=settings["python"].partition(".*")[0],
            archs=archs,
            cuda=settings["cuda_compiler_version"],
            compiler=settings["cxx_compiler_version"],
            kernels=_kernels(settings),
            platform=platform,
            settings=settings,
        )

    @classmethod
    def from_renderer(cls, values: Mapping[str, Sequence[str]]) -> BuildKey:
        """The key in the renderer's form, as spec.json and recipes/pixi.toml have it.

        Raises:
            ValueError: as :meth:`from_settings`, and where a key has not exactly one value.
        """
        for name, listed in values.items():
            if len(listed) != 1:
                raise ValueError(f"its {name} has {len(listed)} values")
        return cls.from_settings({name: listed[0] for name, listed in values.items()})

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any]) -> BuildKey:
        """The key that a package says it was built with.

        Raises:
            ValueError: when it says none, as a package of somebody else.
        """
        settings = provenance.get("variant")
        if not isinstance(settings, dict):
            raise ValueError("it has no variant")
        return cls.from_settings(settings)

    def with_kernels(self, kernels: Kernels) -> BuildKey:
        """The same build with these kernels."""
        if kernels == self.kernels:
            return self
        settings = {name: value for name, value in self.settings.items() if name != _KERNELS}
        if kernels != package_kernels.DEFAULT:
            settings[_KERNELS] = kernels
        return BuildKey.from_settings(settings)

    @property
    def toolchain(self) -> dict[str, str]:
        """The settings that decide what it is compiled with: the same for every GPU, and for upstream's kernels."""
        return {name: value for name, value in self.settings.items() if name not in ("cuda_arch_list", _KERNELS)}

    def to_renderer(self) -> dict[str, list[str]]:
        """What the recipe renderer takes: one value a key, in the matrix's order."""
        return {name: [value] for name, value in self.settings.items()}

    def to_provenance(self) -> dict[str, str]:
        """What a package says of its build, sorted by name."""
        return dict(sorted(self.settings.items()))


_NEEDED = (
    "forge_variant",
    "forge_source",
    "python",
    "cuda_arch_list",
    "cuda_compiler_version",
    "cxx_compiler_version",
)


def _kernels(settings: Mapping[str, str]) -> Kernels:
    named = settings.get(_KERNELS, package_kernels.DEFAULT)
    for kernels in package_kernels.KERNELS:
        if kernels == named:
            return kernels
    raise ValueError(f"its {_KERNELS} is {named!r:.80}")
