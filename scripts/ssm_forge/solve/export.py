"""A locked environment in other tools' formats: explicit spec, environment.yml, conda-lock, CycloneDX."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import yaml
from rattler import RepoDataRecord

from ssm_forge.package.intact import digest
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.order import channel_names, sorted_by_dependency
from ssm_forge.solve.sbom import bill_of_materials


def explicit(locked: LockedEnvironment) -> str:
    """What ``conda create --file`` takes: a URL and hash a line, dependencies first."""
    lines = [
        f"# {locked.name}: conda create --name {locked.name} --file THIS-FILE",
        f"# platform: {locked.platform.subdir}",
        "@EXPLICIT",
    ]
    for record in sorted_by_dependency(locked.records):
        algorithm, value = digest(record)
        lines.append(f"{record.url}#{'sha256:' if algorithm == 'sha256' else ''}{value}")
    return "\n".join(lines) + "\n"


def environment_yml(locked: LockedEnvironment) -> str:
    """What ``conda env create`` takes: versions and builds, but no hashes: the format has none."""
    content = {
        "name": locked.name,
        "channels": [*channel_names(locked), "nodefaults"],
        "dependencies": [f"{r.name.normalized}={r.version}={r.build}" for r in locked.records],
    }
    return yaml.safe_dump(content, sort_keys=False)


def conda_lock(locked: LockedEnvironment) -> str:
    """conda-lock's unified lock, version 1, which micromamba and mamba read too."""
    subdir = locked.platform.subdir
    content = {
        "version": 1,
        "metadata": {
            "content_hash": {subdir: _content_hash(locked)},
            "channels": [{"url": name, "used_env_vars": []} for name in channel_names(locked)],
            "platforms": [subdir],
            "sources": ["pixi.toml"],
        },
        "package": [_conda_lock_package(record, subdir) for record in locked.records],
    }
    return yaml.safe_dump(content, sort_keys=False)


def _content_hash(locked: LockedEnvironment) -> str:
    content = [list(locked.channels), [r.url for r in locked.records]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _conda_lock_package(record: RepoDataRecord, subdir: str) -> dict[str, Any]:
    hashes = {"md5": record.md5, "sha256": record.sha256}
    depends = {}
    for text in record.depends:
        name, _, rest = text.partition(" ")
        depends[name] = rest
    return {
        "name": record.name.normalized,
        "version": str(record.version),
        "manager": "conda",
        "platform": subdir,
        "dependencies": depends,
        "url": record.url,
        "hash": {name: bytes(value).hex() for name, value in hashes.items() if value},
        "category": "main",
        "optional": False,
    }


def cyclonedx(locked: LockedEnvironment) -> str:
    """A CycloneDX software bill of materials, as JSON.

    Raises:
        MachineError: as :func:`ssm_forge.solve.sbom.bill_of_materials`.
    """
    return bill_of_materials(locked)


# Format name -> writer.
FORMATS: dict[str, Callable[[LockedEnvironment], str]] = {
    "explicit": explicit,
    "environment": environment_yml,
    "conda-lock": conda_lock,
    "cyclonedx": cyclonedx,
}
