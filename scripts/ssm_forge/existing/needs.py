"""What the kernels import beside torch: looked at, named where it is missing, installed only when asked to."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ssm_forge.base import platforms
from ssm_forge.base.errors import InstallError, NetworkError
from ssm_forge.base.ui import Log
from ssm_forge.bridge.metadata import marker_environment
from ssm_forge.existing.reader import Distribution, Existing

# A build brings its own.
TOOLS = frozenset({"pip", "setuptools", "wheel", "packaging", "ninja"})


@dataclass(frozen=True)
class Needs:
    """Which of the packages that the kernels import an environment has, and which it lacks.

    Attributes:
        closure: torch, what the kernels import, and what those require in turn, by name.
        wanted: requirements that are not met, as pip takes them.
        reasons: why each of them is wanted, a clause each.
    """

    closure: Mapping[str, Distribution]
    wanted: tuple[str, ...]
    reasons: tuple[str, ...]


def look(existing: Existing, requires: Mapping[str, str]) -> Needs:
    """The needs of the kernels, from what an environment has: ``requires``, torch, and what those require in turn.

    Args:
        requires: project -> version range.
    """
    closure: dict[str, Distribution] = {}
    wanted: dict[str, str] = {}
    reasons: dict[str, str] = {}
    # numpy is torch's to bring, and torch runs without.
    first = [Requirement(f"{name}{spec}") for name, spec in requires.items() if name != "numpy" or _has(existing, name)]
    queue: list[tuple[Requirement, str]] = [(requirement, "") for requirement in (Requirement("torch"), *first)]
    environment = marker_environment(existing.minor, existing.version, platforms.here().machine)
    while queue:
        requirement, extra_of = queue.pop(0)
        name = canonicalize_name(requirement.name)
        installed = existing.distributions.get(name)
        needed_by = extra_of or "mamba-ssm"
        if installed is None:
            wanted[name] = f"{requirement.name}{requirement.specifier}"
            reasons[name] = f"{requirement.name} is not there ({needed_by} needs it)"
            continue
        if not _fits(requirement.specifier, installed.version):
            wanted[name] = f"{requirement.name}{requirement.specifier}"
            reasons[name] = f"{requirement.name} is {installed.version} ({needed_by} needs {requirement.specifier})"
        was_seen = name in closure
        closure[name] = installed
        if was_seen and not requirement.extras:
            continue
        queue += [(inner, installed.name) for inner in _requirements(installed, requirement.extras, environment)]
    return Needs(closure, tuple(wanted.values()), tuple(reasons.values()))


def _has(existing: Existing, name: str) -> bool:
    return name in existing.distributions


def _fits(specifier: SpecifierSet, version: str) -> bool:
    return specifier.contains(version, prereleases=True)


def _requirements(distribution: Distribution, extras: set[str], environment: dict[str, str]) -> list[Requirement]:
    requirements = []
    for text in distribution.requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # Of an old release, written before there were rules; pip leaves it out too.
        marker = requirement.marker
        if marker is None:
            # An extra adds to what is required anyway.
            requirements.append(requirement)
        elif any(marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)):
            requirements.append(requirement)
    return requirements


def command(existing: Existing, wanted: tuple[str, ...]) -> str:
    """The line with which a user installs them."""
    requirements = " ".join(shlex.quote(text) for text in wanted)
    if existing.target is not None:
        requirements = f"--target {shlex.quote(str(existing.target))} {requirements}"
    if existing.by_uv:
        return f"uv pip install --python {shlex.quote(str(existing.python))} {requirements}"
    return f"{shlex.quote(str(existing.python))} -m pip install {requirements}"


def require(existing: Existing, needs: Needs) -> None:
    """Refuse an environment that lacks what the kernels import.

    Raises:
        InstallError: when something is not met, with the line that installs it.
    """
    if needs.wanted:
        raise InstallError(
            f"{existing.prefix} lacks what mamba-ssm imports: {'; '.join(needs.reasons)}.",
            fix=f"Install it: {command(existing, needs.wanted)} -- or add --with-deps, which does that.",
        )


def install(existing: Existing, wanted: tuple[str, ...], log: Log) -> None:
    """Install what is wanted, with uv; torch and whatever else is there keeps its release.

    Raises:
        InstallError: when uv finds no set that fits what is there.
        NetworkError: when the index can't be reached.
    """
    kept = [f"{d.name}=={d.version}" for d in existing.distributions.values() if not _names(wanted, d.name)]
    constraints = log.path.with_suffix(".constraints.txt")
    constraints.write_text("\n".join(sorted(kept)) + "\n", encoding="utf-8")
    line = [_uv(), "pip", "install", "--python", str(existing.python), "--constraints", str(constraints), *wanted]
    if existing.target is not None:
        line += ["--target", str(existing.target)]
    log(shlex.join(line))
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    log(done.stdout + done.stderr)
    constraints.unlink()
    if done.returncode:
        complaint = " ".join(done.stderr.split())
        if "error sending request" in complaint or "Failed to fetch" in complaint:
            raise NetworkError(
                f"{', '.join(wanted)} could not be downloaded.",
                fix="Check that the package index can be reached, then run the same command again.",
                log=log.path,
            )
        raise InstallError(
            f"{', '.join(wanted)} can't be installed beside what {existing.prefix} has: {complaint[-300:]}",
            fix="Change what stands in the way yourself, or use a new environment.",
            log=log.path,
        )


def _names(wanted: tuple[str, ...], name: str) -> bool:
    return any(canonicalize_name(Requirement(text).name) == name for text in wanted)


def _uv() -> str:
    """uv of the tools, which is no part of the environment."""
    beside = Path(sys.executable).with_name("uv")
    program = str(beside) if beside.exists() else shutil.which("uv")
    if program is None:
        raise InstallError("uv is missing from the tools.", fix="Delete .pixi/tools and run again.")
    return program
