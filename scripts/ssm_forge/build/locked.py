"""Builds with exactly the packages that recipes/pixi.lock has for them, by our own engine: nothing is solved anew.

The engine can only solve. So it gets channels that hold nothing but what is locked, and a copy of the recipe whose
environments ask for one more package each, which needs every locked one of its environment by version and build.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rattler import RepoDataRecord
from rattler_build import assemble_package

from ssm_forge.base import fetch, mirrors
from ssm_forge.base.fetch import Artifact
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import PLATFORMS
from ssm_forge.channel import folder as channels
from ssm_forge.solve.lock_sources import KINDS, SourcePackage

_PINS = "ssm-forge-locked-"


class Prepared(NamedTuple):
    """What the engine builds from, so that it can only come to what is locked.

    Attributes:
        root: the copy of the checkout.
        channels: URLs of channels in order of priority.
    """

    root: Path
    channels: tuple[str, ...]


def prepare(
    source: SourcePackage,
    beside: Sequence[RepoDataRecord],
    workspace: Workspace,
    folder: Path,
    archives: Sequence[Artifact] = (),
) -> Prepared:
    """Make the copy of the checkout that is built, and the channels it is built from.

    Args:
        beside: the packages of the environment that the package is for; its own tests run with them.
        folder: where to put it all.
        archives: what the recipe downloads, which it gets from the download cache.

    Raises:
        NetworkError, IntegrityError: when an archive can't be had, or is not what the recipe says.
    """
    root = folder / "checkout"
    fetch.fetch_all(archives, workspace)
    _copy_recipe(source.name, workspace, root, {a.url: fetch.checked(a, workspace).as_uri() for a in archives})
    pins = folder / "pins"
    for kind in KINDS:
        _pin(f"{_PINS}{kind}", source.built_with(kind), folder, pins)
    channels.index(pins)
    records = {r.url: r for r in (*source.build, *source.host, *beside)}
    return Prepared(root, (pins.as_uri(), *indexes(list(records.values()), folder / "locked")))


def _copy_recipe(project: str, workspace: Workspace, root: Path, archives: Mapping[str, str]) -> None:
    for name in (project, "common"):
        shutil.copytree(workspace.recipes / name, root / "recipes" / name, ignore=shutil.ignore_patterns(".pixi"))
    shutil.copy(workspace.recipes / "compile-costs.txt", root / "recipes")
    shutil.copytree(workspace.patches, root / "patches")
    path = root / "recipes" / project / "recipe.yaml"
    recipe: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for kind in KINDS:
        recipe["requirements"][kind].append(f"{_PINS}{kind}")
    text = yaml.safe_dump(recipe, sort_keys=False, width=10**9)
    for url, file_url in archives.items():
        text = text.replace(f"url: {url}\n", f"url: {file_url}\n")
    path.write_text(text, encoding="utf-8")


def _pin(name: str, records: Sequence[RepoDataRecord], folder: Path, channel: Path) -> None:
    """A package that needs exactly these."""
    content = folder / name
    content.mkdir()
    assemble_package(
        name=name,
        version="1",
        target_platform="noarch",
        build_string="0",
        output_dir=str(channel / "noarch"),
        files_dir=str(content),
        depends=[f"{r.name.normalized} =={r.version} {r.build}" for r in records],
    )


def indexes(records: Sequence[RepoDataRecord], folder: Path) -> list[str]:
    """Write an index of just these packages into ``folder``, one subfolder a channel of theirs, and return their URLs.

    The packages stay where they are: an index names their place (CEP-15).
    """
    by_channel: dict[str, list[RepoDataRecord]] = {}
    for record in records:
        by_channel.setdefault(record.url.rsplit("/", 2)[0], []).append(record)
    urls = []
    for number, (base, records_there) in enumerate(by_channel.items()):
        channel = folder / str(number)
        for subdir in (*(known.subdir for known in PLATFORMS), "noarch"):
            content: dict[str, Any] = {
                "info": {"subdir": subdir, "base_url": mirrors.mirrored(f"{base}/{subdir}/")},
                "packages": {},
                "packages.conda": {},
                "repodata_version": 2,
            }
            for record in (r for r in records_there if r.url.rsplit("/", 2)[1] == subdir):
                section = "packages.conda" if record.file_name.endswith(".conda") else "packages"
                content[section][record.file_name] = json.loads(record.to_json())
            (channel / subdir).mkdir(parents=True)
            (channel / subdir / "repodata.json").write_text(json.dumps(content), encoding="utf-8")
        urls.append(channel.as_uri())
    return urls
