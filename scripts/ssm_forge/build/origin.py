"""Where the parts of a variant come from: conda's channels, or the bridge."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ssm_forge.base import platforms
from ssm_forge.base.errors import NetworkError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import Platform
from ssm_forge.base.ui import say
from ssm_forge.bridge import interpreter as interpreters
from ssm_forge.bridge import parts as bridge_parts
from ssm_forge.bridge.gcc import BundledCompiler
from ssm_forge.build import offline
from ssm_forge.channel.folder import channel_urls
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest import variants
from ssm_forge.manifest.variants import Source, Variant
from ssm_forge.solve.solver import require_reachable


@dataclass(frozen=True)
class Origin:
    """Where the parts of a variant come from.

    Attributes:
        python: its minor, such as ``3.12``.
        channels: channel URLs, ours first.
        parts: what the bridge is assembled from, None for source conda.
    """

    variant: Variant
    python: str
    channels: tuple[str, ...]
    parts: bridge_parts.Parts | None


def origin(
    variant: Variant, python: str, host_compiler: str, workspace: Workspace, platform: Platform | None = None
) -> Origin:
    """Find the parts of a variant for a Python minor (``3.12``), without making anything of them.

    Args:
        host_compiler: ``auto``, ``system``, ``bridge`` or the path of a g++, for a variant from the bridge.
        platform: what the parts are for; None for this machine's.

    Raises:
        MachineError: when the machine lacks a Python or a compiler for the bridge.
    """
    if variant.source == "conda":
        channels = (*channel_urls([workspace.channel]), *conda_channels(variant, workspace))
        return Origin(variant, python, channels, None)
    parts = bridge_parts.find_parts(variant, python, host_compiler, workspace, platform)
    channels = channel_urls([workspace.channel, bridge_parts.channel_dir(workspace, variant, platform)])
    return Origin(variant, python, channels, parts)


def conda_channels(variant: Variant, workspace: Workspace) -> tuple[str, ...]:
    """The channels that pixi.toml names for the variant's environment."""
    return manifest.load(workspace.manifest).environment(variant.name).channels


def choose_source(
    variant: str,
    asked: Literal["auto", "conda", "bridge"],
    matrix: variants.Matrix,
    python: str | None,
    workspace: Workspace,
    platform: Platform | None = None,
) -> Source:
    """Where a variant's parts come from: what was asked for, else conda's channels where they can be reached.

    The caches do as well, where they have all that the locks name.

    Raises:
        NetworkError: when only conda channels have it, and none can be reached.
    """
    offered = matrix.sources(variant, platform)
    if not offered:
        # Matrix.get and Variant.check_platform say that there is no such variant, or not for the platform.
        return next(iter(matrix.sources(variant)), "bridge")
    if asked != "auto":
        return asked
    if "conda" not in offered:
        return "bridge"
    if conda_reachable():
        return "conda"
    row = matrix.get(variant, "conda")
    if offline.has_all(row, python or default_python(row, workspace), workspace):
        say("No conda channel can be reached: the caches have everything that the locks name.")
        return "conda"
    if "bridge" in offered:
        say("No conda channel can be reached: using the bridge (packages assembled from PyPI and Debian).")
        return "bridge"
    raise NetworkError(
        f"variant {variant} comes from conda channels, and none can be reached.",
        fix="Check the network, or choose a variant that the bridge has (see variants).",
    )


def conda_reachable() -> bool:
    """Whether conda-forge, or the mirror of it that pixi is configured for, answers within three seconds."""
    try:
        require_reachable(["conda-forge"], seconds=3, public=True)
    except NetworkError:
        return False
    return True


def default_python(variant: Variant, workspace: Workspace, platform: Platform | None = None) -> str:
    """The Python minor that a variant is made for where nobody names one: 3.12 where that can be had.

    Args:
        platform: what the variant is made for; None for this machine's.
    """
    if variant.source == "conda":
        return variants.DEFAULT_PYTHON if variants.DEFAULT_PYTHON in variant.pythons else variant.pythons[-1]
    preferred = [variants.DEFAULT_PYTHON, *reversed(variant.pythons)]
    if platform not in (None, platforms.known_here()):
        # That of the oldest C library: it runs on the most machines, and they are not known here.
        fitting = [p for p in interpreters.brought(workspace, platform) if p in variant.pythons]
        return fitting[0] if fitting else variant.pythons[-1]
    for pythons_of in (interpreters.available, interpreters.brought):
        present = pythons_of(workspace)
        for python in preferred:
            if python in variant.pythons and python in present:
                return python
    # interpreters.choose explains what was found and why it does not do.
    return variants.DEFAULT_PYTHON if variants.DEFAULT_PYTHON in variant.pythons else variant.pythons[-1]


class CompilerRecord(NamedTuple):
    """What a package says of the C++ compiler that it was made with; nothing where a channel has that compiler.

    Attributes:
        version_line: what a compiler of this machine prints of itself.
        lock: the lock of Debian packages that a compiler of the bridge is made of.
    """

    version_line: str = ""
    lock: Path | None = None


def compiler_of(variant: Variant, parts: bridge_parts.Parts | None, workspace: Workspace) -> CompilerRecord:
    """What a package of a variant is to say of its C++ compiler.

    Args:
        parts: what the bridge is assembled from, None for source conda.
    """
    if parts is None:
        return CompilerRecord()
    if isinstance(parts.compiler, BundledCompiler):
        if parts.cross is not None:
            return CompilerRecord(lock=bridge_parts.cross_compiler_lock(variant, workspace, parts.platform))
        return CompilerRecord(lock=bridge_parts.compiler_lock(variant, workspace))
    printed = subprocess.run([parts.compiler.cxx, "--version"], capture_output=True, text=True, check=False).stdout
    return CompilerRecord(printed.partition("\n")[0])
