"""What a package is made from, each thing with its sha256: sources, patches, toolchain locks; and its SBOM."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ssm_forge.base import platforms
from ssm_forge.base.credentials import redact
from ssm_forge.base.errors import BuildError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge import pylock
from ssm_forge.manifest import recipe
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.recipe import Rendered
from ssm_forge.package.read import Material, material_digest
from ssm_forge.solve.lock_sources import SourcePackage

# What a channel gave at the time of the build: of all roles the one that a checkout can't tell.
SOLVED = "toolchain package"


def collect(
    rendered: Rendered,
    key: BuildKey,
    workspace: Workspace,
    *,
    compiler_lock: Path | None = None,
    packages: Sequence[Material] = (),
) -> list[Material]:
    """The materials of one package, sorted: ``uri``, ``sha256`` (or ``md5``) and ``role``.

    Roles are source, patch, toolchain lock and toolchain package.

    Args:
        compiler_lock: of the C++ compiler, where the bridge brought it.
        packages: what the engine took from channels.
    """
    items = list(packages)
    for source in recipe.sources(rendered):
        items.append({"uri": source["url"], "sha256": source["sha256"], "role": "source"})
        folder = recipe.recipe_dir(rendered.name, workspace)
        items += [_file((folder / patch).resolve(), "patch", workspace) for patch in source.get("patches", [])]
    items += toolchain_locks(key, workspace, compiler_lock)
    return sorted(items, key=lambda item: (item["role"], item["uri"]))


def toolchain_locks(key: BuildKey, workspace: Workspace, compiler_lock: Path | None) -> list[Material]:
    """The locks that the toolchain of a build comes from, as materials; arguments are those of :func:`collect`."""
    locks = [*_locks(key, workspace), *([compiler_lock.resolve()] if compiler_lock else [])]
    return [_file(path, "toolchain lock", workspace) for path in locks]


def solved(package: Path) -> list[Material]:
    """What the engine solved the build and host environments of a package to, as it says in the unpacked package.

    Raises:
        BuildError: when it does not say so.
    """
    try:
        document = yaml.safe_load((package / "info/recipe/rendered_recipe.yaml").read_text(encoding="utf-8"))
        environments = [document["finalized_dependencies"][kind] or {} for kind in ("build", "host")]
        records = [record for environment in environments for record in environment.get("resolved", [])]
        items = [_solved(record["url"], record.get("sha256"), record.get("md5")) for record in records]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(
            f"the engine does not say which packages it built with ({type(error).__name__}: {error}).",
            fix="This rattler-build writes info/recipe/rendered_recipe.yaml otherwise; please report this.",
        ) from error
    return _each_once(items)


def locked(source: SourcePackage) -> list[Material]:
    """What a package that pixi builds is built with: the packages that recipes/pixi.lock has for it."""
    records = (*source.build, *source.host)
    return _each_once(
        [_solved(r.url, r.sha256 and bytes(r.sha256).hex(), r.md5 and bytes(r.md5).hex()) for r in records]
    )


def _each_once(items: Sequence[Material]) -> list[Material]:
    return list({item["uri"]: item for item in items}.values())


def _solved(url: object, sha256: object, md5: object) -> Material:
    """A package by its strongest hash: NVIDIA's older channels publish only md5.

    Where it is to be had; of one in a folder of this machine only the name, and never a secret.
    """
    text = str(url)
    uri = text.rpartition("/")[2] if text.startswith("file:") else redact(text)
    return {"uri": uri, **({"sha256": str(sha256)} if sha256 else {"md5": str(md5)}), "role": SOLVED}


def sbom(index: dict[str, Any], materials: Sequence[Material]) -> dict[str, Any]:
    """A CycloneDX 1.6 document for a package: itself, what went into it, and what it needs to run.

    It holds no time and no random number: the same package gives the same document. Written by hand, because these
    are bytes of a package: another release of cyclonedx-python-lib must not change them, and the pixi environment that
    builds has none.
    """
    name, version = index["name"], index["version"]
    purl = f"pkg:conda/{name}@{version}?build={index['build']}&subdir={index['subdir']}"
    contents = [_component(item) for item in materials if not item["role"].startswith("toolchain")]
    toolchain = [
        {"name": f"{item['role']} {item['uri']}", "value": ":".join(material_digest(item))}
        for item in materials
        if item["role"].startswith("toolchain")
    ]
    requirements = [
        {"type": "library", "bom-ref": f"needs:{spec}", "name": spec.split()[0], "description": f"requires {spec}"}
        for spec in sorted(index["depends"])
        if not spec.startswith("__")
    ]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, purl + "".join(material_digest(item).value for item in materials))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "component": {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl},
            "properties": toolchain,
        },
        "components": [*contents, *requirements],
        "dependencies": [{"ref": purl, "dependsOn": [item["bom-ref"] for item in (*contents, *requirements)]}],
    }


def _component(item: Material) -> dict[str, Any]:
    algorithm, value = material_digest(item)
    return {
        "type": "file",
        "bom-ref": item["uri"],
        "name": item["uri"].rpartition("/")[2],
        "description": item["role"],
        "hashes": [{"alg": {"sha256": "SHA-256", "md5": "MD5"}[algorithm], "content": value}],
        **(
            {"externalReferences": [{"type": "distribution", "url": item["uri"]}]}
            if item["uri"].startswith("https://")
            else {}
        ),
    }


def _file(path: Path, role: str, workspace: Workspace) -> Material:
    return {"uri": path.relative_to(workspace.root.resolve()).as_posix(), "sha256": sha256_of(path), "role": role}


def _locks(key: BuildKey, workspace: Workspace) -> list[Path]:
    """The locks that toolkit and torch came from; builds from conda's channels are solved, and from no lock."""
    if key.source == "conda":
        return []
    paths = []
    # A cross compiler's programs are this machine's, its headers and libraries those that the package is for.
    for platform in dict.fromkeys((key.platform, platforms.known_here() or key.platform)):
        python = f"py{key.python.replace('.', '')}"
        paths += [pylock.lock_path(workspace, key.variant, part, platform) for part in (python, "toolkit")]
        paths.append(workspace.bridge_locks / f"debs.cuda-{key.cuda}{pylock.suffix(platform)}.toml")
    return [path.resolve() for path in paths if path.exists()]
