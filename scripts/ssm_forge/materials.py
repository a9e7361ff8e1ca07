"""What a package is made from, each thing with its sha256: sources, patches, toolchain locks; and its SBOM."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssm_forge import recipe
from ssm_forge.fetch import sha256_of
from ssm_forge.paths import Workspace

Material = dict[str, str]


def collect(project: str, values: dict[str, list[str]], workspace: Workspace) -> list[Material]:
    """The materials of one package, sorted: ``uri``, ``sha256`` and ``role`` (source, patch or toolchain lock)."""
    found = []
    rendered = recipe.render(project, values, workspace)
    for source in recipe.sources(rendered):
        found.append({"uri": source["url"], "sha256": source["sha256"], "role": "source"})
        folder = recipe.recipe_dir(project, workspace)
        found += [_file((folder / patch).resolve(), "patch", workspace) for patch in source.get("patches", [])]
    found += [_file(path, "toolchain lock", workspace) for path in _locks(values, workspace)]
    return sorted(found, key=lambda item: (item["role"], item["uri"]))


def sbom(index: dict[str, Any], materials: Sequence[Material]) -> dict[str, Any]:
    """A CycloneDX 1.6 document for a package: itself, what went into it, and what it needs to run.

    It holds no time and no random number: the same package gives the same document.
    """
    name, version = index["name"], index["version"]
    me = f"pkg:conda/{name}@{version}?build={index['build']}&subdir={index['subdir']}"
    inside = [_component(item) for item in materials if item["role"] != "toolchain lock"]
    locks = [
        {"name": f"toolchain lock {item['uri']}", "value": f"sha256:{item['sha256']}"}
        for item in materials
        if item["role"] == "toolchain lock"
    ]
    needs = [
        {"type": "library", "bom-ref": f"needs:{spec}", "name": spec.split()[0], "description": f"requires {spec}"}
        for spec in sorted(index["depends"])
        if not spec.startswith("__")
    ]
    serial = uuid.uuid5(uuid.NAMESPACE_URL, me + "".join(item["sha256"] for item in materials))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {
            "component": {"type": "library", "bom-ref": me, "name": name, "version": version, "purl": me},
            "properties": locks,
        },
        "components": [*inside, *needs],
        "dependencies": [{"ref": me, "dependsOn": [item["bom-ref"] for item in (*inside, *needs)]}],
    }


def _component(item: Material) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": item["uri"],
        "name": item["uri"].rpartition("/")[2],
        "description": item["role"],
        "hashes": [{"alg": "SHA-256", "content": item["sha256"]}],
        **(
            {"externalReferences": [{"type": "distribution", "url": item["uri"]}]}
            if item["uri"].startswith("https://")
            else {}
        ),
    }


def _file(path: Path, role: str, workspace: Workspace) -> Material:
    return {"uri": path.relative_to(workspace.root.resolve()).as_posix(), "sha256": sha256_of(path), "role": role}


def _locks(values: dict[str, list[str]], workspace: Workspace) -> list[Path]:
    """The locks that the compiler and torch came from: pixi.lock, or those of the bridge."""
    if values["forge_source"][0] == "conda":
        return [path.resolve() for path in (workspace.lock,) if path.exists()]
    variant = values["forge_variant"][0]
    python = values["python"][0].split(".*")[0].replace(".", "")
    names = [
        f"pylock.{variant}-py{python}.toml",
        f"pylock.{variant}-toolkit.toml",
        f"debs.cuda-{values['cuda_compiler_version'][0]}.toml",
    ]
    return [path.resolve() for name in names if (path := workspace.bridge_locks / name).exists()]
