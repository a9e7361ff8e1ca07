"""``recipes/pixi.toml``: a second pixi workspace, in which pixi itself builds the kernels, locks them and keeps them.

It is written from the root's pixi.toml and from recipes/variants.yaml, and is a workspace of its own because every
command of a workspace with source dependencies needs their build backend, also for environments without any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssm_forge.base import foreign
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.manifest import variants
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.environments import EnvironmentSpec, Manifest
from ssm_forge.manifest.recipe import PROJECTS

_HEADER = """\
# Written by the task `lock` from ../pixi.toml and variants.yaml: change those.
#
# `pixi install -e cu130` in this folder compiles the kernels and installs them; pixi.lock beside this file pins the
# environment, the kernels and every package of the compilers that make them (docs/pixi.md).
"""


def text(workspace: Workspace) -> str:
    """What recipes/pixi.toml has to say.

    Raises:
        UsageError: when the root's manifest has no environment with the kernels' parts.
    """
    root = foreign.toml_from(workspace.manifest.read_bytes())
    matrix = variants.load(workspace.variants)
    environments = {
        name: table
        for name, table in root["environments"].items()
        if isinstance(table, dict) and "conda" in matrix.sources(name)
    }
    if not environments:
        raise UsageError(f"{workspace.manifest} has no environment of a variant that conda channels have.")
    features = {name: root["feature"][name] for name in environments}
    used = [name for feature in features.values() for name in feature["platforms"]]
    platforms = [p for p in root["workspace"]["platforms"] if isinstance(p, dict) and p["name"] in used]
    parts = [_HEADER + _workspace(root["workspace"], platforms)]
    for name, feature in features.items():
        python = feature["dependencies"]["python"].removesuffix(".*")
        parts.append(_variant_table(matrix.get(name, "conda"), python, feature["platforms"][0]))
    parts += [_feature(name, feature) for name, feature in features.items()]
    parts.append("[environments]\n" + entries(environments))
    return "\n".join(parts)


def write(workspace: Workspace) -> bool:
    """Write recipes/pixi.toml; whether it is another than before.

    Raises:
        UsageError: as :func:`text`.
    """
    path, wanted = workspace.source_manifest, text(workspace)
    if path.exists() and path.read_text(encoding="utf-8") == wanted:
        return False
    path.write_text(wanted, encoding="utf-8")
    return True


def _workspace(root: Mapping[str, Any], platforms: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "[workspace]",
        f"name = {toml(root['name'] + '-kernels')}",
        f"channels = {toml(root['channels'])}",
        f"requires-pixi = {toml(root['requires-pixi'])}",
        'preview = ["pixi-build"]',
        "platforms = [",
        *(f"  {toml(platform)}," for platform in platforms),
        "]",
    ]
    return "\n".join(lines) + "\n"


def _variant_table(variant: variants.Variant, python: str, platform: str) -> str:
    """The row of the matrix that is built on one platform: every key that pixi does not set, and glibc's as well."""
    archs = ArchList.parse(variant.default_archs)
    values = variant.key(python, archs).to_renderer()
    return f"[workspace.target.{platform}.build-variants]\n" + entries(values)


def key(recipes: Manifest, environment: EnvironmentSpec) -> BuildKey | None:
    """What recipes/pixi.toml says that the kernels of an environment are built for; None where it does not say it."""
    try:
        return BuildKey.from_renderer(recipes.variants.get(environment.platforms[0].name, {}))
    except ValueError:
        return None


def _feature(name: str, feature: Mapping[str, Any]) -> str:
    channels = {"channels": feature["channels"]} if "channels" in feature else {}
    sources = {project: {"path": project} for project in PROJECTS}
    return (
        f"[feature.{name}]\n{entries({**channels, 'platforms': feature['platforms']})}\n"
        f"[feature.{name}.dependencies]\n{entries({**feature['dependencies'], **sources})}"
    )


def entries(table: Mapping[str, Any]) -> str:
    """A TOML table's lines."""
    return "".join(f"{key} = {toml(value)}\n" for key, value in table.items())


def toml(content: Any) -> str:
    """A TOML value on one line; strings without control characters are JSON's."""
    if isinstance(content, dict):
        return "{ " + ", ".join(f"{key} = {toml(inner)}" for key, inner in content.items()) + " }"
    if isinstance(content, list):
        return "[" + ", ".join(map(toml, content)) + "]"
    return json.dumps(content, ensure_ascii=False)


def check(workspace: Workspace) -> str:
    """Why recipes/pixi.toml is not what it has to be; empty when it is."""
    path = workspace.source_manifest
    if not path.exists():
        return f"{_shown(path, workspace)} does not exist"
    if path.read_text(encoding="utf-8") != text(workspace):
        return f"{_shown(path, workspace)} is not what pixi.toml and recipes/variants.yaml say"
    return ""


def _shown(path: Path, workspace: Workspace) -> str:
    return str(path.relative_to(workspace.root))
