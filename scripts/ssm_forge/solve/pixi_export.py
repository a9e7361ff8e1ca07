"""A pixi workspace of the user's own with the kernels in it: as packages from a channel, or built from recipes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ssm_forge.base.errors import UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest import source_workspace
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.manifest.virtual import channel_url
from ssm_forge.solve import lock, source_packages
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.lock_sources import SourcePackage
from ssm_forge.solve.pixi_identity import identity

Origin = Literal["channel", "git", "path"]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        manifest: path of the pixi.toml.
        lines: of its dependencies, those that a pixi.toml of the user's own needs.
        locked: whether there is a lock, too.
    """

    manifest: Path
    lines: tuple[str, ...]
    locked: bool


def write(
    folder: Path, variant: str, origin: Origin, workspace: Workspace, *, channel: str = "", git: str = ""
) -> Written:
    """Write pixi.toml, and pixi.lock where that needs no commit that only pixi can ask for.

    Args:
        folder: the user's workspace, new or empty.
        channel: URL of the channel that has the packages; default: the folder of this checkout.
        git: URL of the repository with the recipes; default: where this checkout was cloned from.

    Raises:
        UsageError: when the folder has a manifest already, or nothing is known to clone from.
        SolveError: when the channel lacks a package.
    """
    path = folder / "pixi.toml"
    if path.exists():
        raise UsageError(
            f"{path} exists already.", fix="Name another folder, or add the lines that docs/pixi.md shows."
        )
    locked = lock.environment(workspace.source_lock, variant)
    root = manifest.read_toml(workspace.source_manifest)
    feature = root["feature"][variant]
    platform = next(p for p in root["workspace"]["platforms"] if p["name"] == feature["platforms"][0])
    channels = list(feature.get("channels", root["workspace"]["channels"]))
    kernels: dict[str, Any]
    if origin == "channel":
        finished = source_packages.finished(locked, workspace.source_lock, workspace, published=channel)
        base = finished.channels[0]
        channels.insert(0, base.rstrip("/"))
        kernels = {r.name.normalized: _from_channel(r, base) for r in finished.records if r.name.normalized in PROJECTS}
        locked = replace(finished, sources=())
    elif origin == "path":
        folders = {name: os.path.relpath(workspace.recipes / name, folder.absolute()) for name in PROJECTS}
        kernels = {name: {"path": location} for name, location in folders.items()}
        sources = tuple(_moved(source, folders[source.name], workspace) for source in locked.sources)
        locked = replace(locked, sources=sources)
    else:
        url = git or _cloned_from(workspace)
        kernels = {name: {"git": url, "subdirectory": f"recipes/{name}"} for name in PROJECTS}
    other_dependencies = {name: value for name, value in feature["dependencies"].items() if name not in PROJECTS}
    variants = root["workspace"]["target"][platform["name"]]["build-variants"] if origin != "channel" else {}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(
        _manifest(folder, root, channels, platform, {**other_dependencies, **kernels}, variants), encoding="utf-8"
    )
    if origin != "git":
        _write_lock(locked, folder / "pixi.lock")
    lines = tuple(f"{name} = {source_workspace.toml(spec)}" for name, spec in kernels.items())
    return Written(path, lines, origin != "git")


def _from_channel(record: Any, base: str) -> dict[str, str]:
    return {"version": f"=={record.version}", "build": str(record.build), "channel": base.rstrip("/")}


def _moved(source: SourcePackage, location: str, workspace: Workspace) -> SourcePackage:
    """A package from source as a lock in another folder has it; pixi tells it by where its recipe is."""
    package = source_packages.rendered(source, workspace.source_lock)
    digits = identity(
        location,
        variants=source.variants,
        build_packages=[r.url for r in source.build],
        host_packages=[r.url for r in source.host],
        version=package.version,
        build=package.build,
        build_number=package.build_number,
        subdir=package.subdir,
        depends=source.depends,
        constrains=source.constrains,
    )
    return replace(source, location=location, identity=digits)


def _cloned_from(workspace: Workspace) -> str:
    command = ["git", "-C", str(workspace.root), "remote", "get-url", "origin"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        answer = None
    if answer is None or answer.returncode or not answer.stdout.strip():
        raise UsageError(f"nothing is known to have {workspace.root} cloned from.", fix="Name it with --git URL.")
    return answer.stdout.strip()


def _manifest(
    folder: Path,
    root: Mapping[str, Any],
    channels: list[str],
    platform: Mapping[str, Any],
    dependencies: Mapping[str, Any],
    variants: Mapping[str, Any],
) -> str:
    head = {
        "name": folder.absolute().name,
        "channels": channels,
        "requires-pixi": root["workspace"]["requires-pixi"],
        # Recipes are built by pixi, which is a preview of pixi 0.77.
        **({"preview": ["pixi-build"]} if variants else {}),
        "platforms": [platform],
    }
    parts = ["[workspace]\n" + source_workspace.entries(head)]
    if variants:
        parts.append(f"[workspace.target.{platform['name']}.build-variants]\n{source_workspace.entries(variants)}")
    parts.append("[dependencies]\n" + source_workspace.entries(dependencies))
    return "\n".join(parts)


def _write_lock(locked: LockedEnvironment, path: Path) -> None:
    platform = replace(locked.platform, name="p1")
    own = [url if url.startswith("file:") else channel_url(url) for url in locked.channels]
    lock.write_locked((replace(locked, name="default", platform=platform, channels=tuple(own)),), path)
