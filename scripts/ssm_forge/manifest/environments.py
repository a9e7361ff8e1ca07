"""pixi.toml as the solver needs it: for each environment its channels, specs and target machines.

Follows pixi 0.77: the default feature joins every environment that doesn't set ``no-default-feature``;
a feature without channels has the workspace's; a platform belongs to an environment when all its features
support it, and naming one platform of a subdir leaves out the others of that subdir.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssm_forge.base import foreign
from ssm_forge.base.errors import ForgeError, UsageError, did_you_mean
from ssm_forge.manifest.virtual import VirtualPackage, channel_url, virtual_packages

Table = Mapping[str, Any]

# Keys of a feature that do not change which packages are locked.
_IGNORED = frozenset({"tasks", "activation"})
_KNOWN = frozenset({"channels", "channel-priority", "dependencies", "constraints", "platforms"})
_FRIENDLY = {"cuda": "__cuda", "archspec": "__archspec", "glibc": "__glibc", "linux": "__linux"}
_SPEC_KEYS = ("version", "build", "build-number", "channel", "subdir", "md5", "sha256")


@dataclass(frozen=True)
class Platform:
    """A kind of machine that the workspace names.

    Attributes:
        name: as pixi.toml has it.
        subdir: conda's name for system and processor.
        virtual: what such a machine offers, as pixi writes it into the lock: declared ones first.
    """

    name: str
    subdir: str
    virtual: tuple[VirtualPackage, ...]


@dataclass(frozen=True)
class SourceSpec:
    """A package that is built from a recipe.

    Attributes:
        path: folder of the recipe, as the manifest has it: relative to its own.
    """

    name: str
    path: str


@dataclass(frozen=True)
class EnvironmentSpec:
    """What one environment asks for.

    Attributes:
        specs: match specs, sorted by package name.
        channels: base URLs in order of priority.
        platforms: machines it is locked for.
        strict: channel priority is strict.
        sources: packages that are built from a recipe in a folder, sorted by name.
    """

    name: str
    specs: tuple[str, ...]
    constraints: tuple[str, ...]
    channels: tuple[str, ...]
    platforms: tuple[Platform, ...]
    strict: bool
    sources: tuple[SourceSpec, ...] = ()

    @property
    def python(self) -> str:
        """The minor release of Python that it pins (``3.12``), empty where it pins none."""
        matches = (re.fullmatch(r"python =*(\d+\.\d+)(\..*)?", spec) for spec in self.specs)
        return next((match.group(1) for match in matches if match), "")


@dataclass(frozen=True)
class Manifest:
    """The workspace: platforms and environments in the order of pixi.toml.

    Attributes:
        variants: platform -> key of the build matrix -> values that recipes are built with there.
    """

    path: Path
    platforms: tuple[Platform, ...]
    environments: tuple[EnvironmentSpec, ...]
    variants: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    def environment(self, name: str) -> EnvironmentSpec:
        """The environment of this name.

        Raises:
            UsageError: when there is none of that name; says which there are.
        """
        for environment in self.environments:
            if environment.name == name:
                return environment
        names = [e.name for e in self.environments]
        what = f"{self.path.name} has no environment '{name}'; it has {', '.join(names)}."
        raise UsageError(what, fix=did_you_mean(name, names).strip())


def load(path: Path) -> Manifest:
    """Read pixi.toml.

    Raises:
        UsageError: when it is missing, is not TOML, or uses what can't be locked here.
    """
    data = read_toml(path)
    try:
        return _manifest(data, path)
    except ForgeError:
        raise
    except Exception as error:  # The engine has an error of its own for each thing that is wrong with a channel.
        raise UsageError(f"{path} is not what pixi reads ({type(error).__name__}: {error}).") from error


def _manifest(data: dict[str, Any], path: Path) -> Manifest:
    workspace: Table = data["workspace"]
    platforms = tuple(_platform(entry, path) for entry in workspace["platforms"])
    features: dict[str, Table] = {
        "default": {key: data[key] for key in (_KNOWN - {"channels", "platforms"}) | _IGNORED if key in data},
        **data.get("feature", {}),
    }
    for table in ("pypi-dependencies", "target", "system-requirements"):
        if table in data:
            raise _unsupported(path, table)
    environments = data.get("environments", {})
    if "default" not in environments:
        environments = {"default": {}, **environments}
    return Manifest(
        path,
        platforms,
        tuple(_environment(name, entry, features, workspace, platforms, path) for name, entry in environments.items()),
        _variants(workspace),
    )


def read_toml(path: Path) -> dict[str, Any]:
    """A manifest as it is written.

    Raises:
        UsageError: when it is missing, or is not TOML.
    """
    try:
        return foreign.toml_from(foreign.read_bytes(path))
    except OSError as error:
        raise UsageError(f"{path} can't be read ({error.strerror}).") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from error


def _variants(workspace: Table) -> dict[str, dict[str, tuple[str, ...]]]:
    return {
        platform: {key: tuple(map(str, values)) for key, values in table.get("build-variants", {}).items()}
        for platform, table in workspace.get("target", {}).items()
    }


def _environment(
    name: str,
    entry: Any,
    features: Mapping[str, Table],
    workspace: Table,
    platforms: tuple[Platform, ...],
    path: Path,
) -> EnvironmentSpec:
    table: Table = {"features": entry} if isinstance(entry, list) else entry
    names = list(table.get("features", []))
    if not table.get("no-default-feature", False):
        names.append("default")
    missing = [n for n in names if n not in features]
    if missing:
        raise UsageError(f"environment {name} in {path} names the feature {missing[0]}, which does not exist.")
    inline = {k: v for k, v in table.items() if k not in ("features", "no-default-feature", "solve-group")}
    parts = [inline, *(features[n] for n in names)] if inline else [features[n] for n in names]
    for part in parts:
        unknown = set(part) - _KNOWN - _IGNORED
        if unknown:
            raise _unsupported(path, f"{sorted(unknown)[0]} (environment {name})")
    return EnvironmentSpec(
        name=name,
        specs=_merged(parts, "dependencies", path),
        sources=_sources(parts),
        constraints=_merged(parts, "constraints", path),
        channels=_channels(parts, workspace),
        platforms=_platforms(parts, platforms),
        strict=_strict(parts, workspace),
    )


def _unsupported(path: Path, what: str) -> UsageError:
    return UsageError(f"{path} uses {what}, which this project's lock does not cover.")


def _merged(parts: Iterable[Table], key: str, path: Path) -> tuple[str, ...]:
    entries = ((name, value) for part in parts for name, value in part.get(key, {}).items())
    return tuple(sorted({_spec(name, value, path) for name, value in entries if not _is_source(value)}))


def _is_source(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"path"} and not value["path"].endswith((".conda", ".tar.bz2"))


def _sources(parts: Iterable[Table]) -> tuple[SourceSpec, ...]:
    entries = {name: value for part in parts for name, value in part.get("dependencies", {}).items()}
    return tuple(SourceSpec(name, value["path"]) for name, value in sorted(entries.items()) if _is_source(value))


def _spec(name: str, value: Any, path: Path) -> str:
    """A match spec from an entry such as ``"3.12.*"`` or ``{ version = "2.3.0", channel = "pytorch" }``."""
    table: Table = {"version": value} if isinstance(value, str) else value
    unknown = set(table) - set(_SPEC_KEYS)
    if unknown:
        raise UsageError(f"{path}: {name} is specified by {sorted(unknown)[0]}, which can't be locked here.")
    text = name
    version = table.get("version", "*")
    if version != "*" or "build" in table:
        text += f" {version}"
    if "build" in table:
        text += f" {table['build']}"
    brackets = []
    if "build-number" in table:
        brackets.append(f"build_number='{table['build-number']}'")
    if "channel" in table:
        brackets.append(f"channel='{channel_url(table['channel'])}'")
    brackets += [f"{key}='{table[key]}'" for key in ("subdir", "md5", "sha256") if key in table]
    return text + (f"[{', '.join(brackets)}]" if brackets else "")


def _channels(parts: Iterable[Table], workspace: Table) -> tuple[str, ...]:
    entries: list[tuple[int, str]] = []
    for part in parts:
        for channel in part.get("channels", workspace["channels"]):
            if isinstance(channel, str):
                entries.append((0, channel))
            else:
                entries.append((channel.get("priority", 0), channel["channel"]))
    entries.sort(key=lambda e: -e[0])
    return tuple(dict.fromkeys(channel_url(name) for _, name in entries))


def _platforms(parts: list[dict[str, Any]] | list[Table], platforms: tuple[Platform, ...]) -> tuple[Platform, ...]:
    named = {name for part in parts for name in part.get("platforms", ())}
    exact = {p.subdir for p in platforms if p.name in named}

    def supported(platform: Platform, part: Table) -> bool:
        wanted = part.get("platforms")
        return wanted is None or platform.name in wanted or platform.subdir in wanted

    return tuple(
        p for p in platforms if all(supported(p, part) for part in parts) and (p.name in named or p.subdir not in exact)
    )


def _strict(parts: Iterable[Table], workspace: Table) -> bool:
    declared = {part["channel-priority"] for part in parts if "channel-priority" in part}
    priority = declared.pop() if declared else workspace.get("channel-priority", "strict")
    if declared or priority not in ("strict", "disabled"):
        raise UsageError(f"channel-priority must be strict or disabled, the same in all features, not {priority}.")
    return bool(priority == "strict")


def _platform(entry: Any, path: Path) -> Platform:
    if isinstance(entry, str):
        return Platform(entry, entry, virtual_packages(subdir=entry))
    table = dict(entry)
    subdir = table.pop("platform", None) or table["name"]
    name = table.pop("name", None)
    if name is None:
        raise UsageError(f"{path}: the platform {entry} needs a name.")
    declared: list[VirtualPackage] = []
    for key, value in table.items():
        if key == "cuda" and isinstance(value, dict):
            declared.append(VirtualPackage("__cuda", value["driver"]))
            if "arch" in value:
                declared.append(VirtualPackage("__cuda_arch", value["arch"]))
        elif key == "archspec":
            declared.append(VirtualPackage("__archspec", "0", value))
        elif key in _FRIENDLY or key.startswith("__"):
            declared.append(VirtualPackage.parse(f"{_FRIENDLY.get(key, key)}={value}"))
        else:
            raise UsageError(f"{path}: platform {name} has the unknown key {key}.")
    named = {v.name for v in declared}
    defaults = (v for v in virtual_packages(subdir=subdir) if v.name not in named)
    return Platform(name, subdir, (*declared, *defaults))
