"""The recipes: rendering for a variant, and the digest of everything they are made of."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_forge.base import platforms
from ssm_forge.base.errors import BuildError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import LINUX_64
from ssm_forge.manifest.build_key import PLATFORM_KEY, BuildKey

if TYPE_CHECKING:
    from rattler_build import RenderedVariant

PROJECTS = ("causal-conv1d", "mamba-ssm")
EXTENSIONS = {"causal-conv1d": "causal_conv1d_cuda", "mamba-ssm": "selective_scan_cuda"}


# Names of files and folders that belong to no recipe.
_NO_SOURCE = frozenset({"__pycache__", ".pixi", "pixi.toml", "pixi.lock"})


@dataclass(frozen=True)
class Rendered:
    """A recipe rendered for one variant.

    Attributes:
        name: package name.
        version: package version.
        build: build string, hash included.
        engine: the engine's object, to build from.
        subdir: conda's name of the platform that it is for.
    """

    name: str
    version: str
    build: str
    engine: RenderedVariant
    subdir: str = LINUX_64.subdir

    @property
    def build_number(self) -> int:
        """The build number that the recipe gives."""
        return int(self.engine.recipe.build.number or 0)

    @property
    def filename(self) -> str:
        """The name that the built package will have."""
        return f"{self.name}-{self.version}-{self.build}.conda"


def render(project: str, key: BuildKey, workspace: Workspace) -> Rendered:
    """Render one recipe for a build.

    Raises:
        BuildError: when the recipe does not render, or the variant skips it.
    """
    return render_file(workspace.recipes / project / "recipe.yaml", key.to_renderer())


def render_file(path: Path, values: Mapping[str, Sequence[str]]) -> Rendered:
    """Render the recipe in a file with the values of a build matrix, as :func:`render`."""
    from rattler_build import PlatformConfig, RattlerBuildError, RenderConfig, Stage0Recipe, VariantConfig

    values_any: dict[str, list[Any]] = {name: list(listed) for name, listed in values.items()}
    (target,) = values_any.pop(PLATFORM_KEY, [LINUX_64.subdir])
    if target != LINUX_64.subdir:
        # The engine's library takes it from here, where the recipe asks for it.
        values_any["host_platform"] = [target]
    own = (platforms.known_here() or LINUX_64).subdir
    platform = RenderConfig(platform=PlatformConfig(target_platform=target, build_platform=own, host_platform=target))
    try:
        with _environment(SSM_FORGE_CROSS_FROM=own if own != target else ""):
            rendered = Stage0Recipe.from_file(str(path)).render(VariantConfig(values_any), platform)
    except RattlerBuildError as error:
        raise BuildError(f"{path} does not render: {error}") from error
    if len(rendered) != 1:
        raise BuildError(f"{path} renders to {len(rendered)} packages for this variant, instead of one.")
    recipe = rendered[0].recipe
    return Rendered(
        name=str(recipe.package.name),
        version=str(recipe.package.version),
        build=str(recipe.build.string),
        engine=rendered[0],
        subdir=target,
    )


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables for what the engine reads of this process's."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def requirements(rendered: Rendered) -> dict[str, tuple[str, ...]]:
    """Requirements by environment; as in a build, a bare name in build or host takes the variant's pin."""
    pins: Mapping[str, str] = rendered.engine.variant
    wanted = rendered.engine.recipe.requirements

    def pinned(spec: str) -> str:
        return f"{spec} {pins[spec]}" if spec in pins else spec

    return {
        "build": tuple(pinned(str(s)) for s in wanted.build),
        "host": tuple(pinned(str(s)) for s in wanted.host),
        "run": tuple(str(s) for s in wanted.run),
    }


@functools.lru_cache
def digest(project: str, workspace: Workspace) -> str:
    """sha256 over the recipe, what it shares with the others, and its patches: names and bytes, sorted.

    What pixi is told beside the recipe, and what it makes there, is no part of it: no byte of a package depends on it.
    """
    folders = [workspace.recipes / project, workspace.recipes / "common", workspace.patches / project]
    folders.append(workspace.patches / "torch")
    total = hashlib.sha256()
    for folder in folders:
        for file in sorted(
            p for p in folder.rglob("*") if p.is_file() and not _NO_SOURCE.intersection(p.relative_to(folder).parts)
        ):
            total.update(f"{file.relative_to(workspace.root)}\0".encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def sources(rendered: Rendered) -> list[dict[str, Any]]:
    """The sources of a rendered recipe as plain values: url, sha256, patches."""
    plain: list[dict[str, Any]] = [source.to_dict() for source in rendered.engine.recipe.sources]
    return plain


def releases(project: str, workspace: Workspace) -> list[str]:
    """The releases that a project's recipe has sources of, in the recipe's order."""
    text = (recipe_dir(project, workspace) / "recipe.yaml").read_text(encoding="utf-8")
    return re.findall(r'- if: version == "([^"]+)"', text)


def recipe_dir(project: str, workspace: Workspace) -> Path:
    """The folder of a project's recipe."""
    return workspace.recipes / project
