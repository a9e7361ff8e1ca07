"""The kernels as pixi builds, locks and keeps them: ``pixi install`` in recipes/, and the finished packages from there.

pixi's packages say nothing of the glibc and the GPUs that they need, and nothing of what they were made from. Those
that go into the channel are finished like any other (see :mod:`ssm_forge.build.finalize`).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlparse

from ssm_forge.base import machine
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import BuildError, ForgeError, InstallError, VerifyError
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.ui import Log, note, say
from ssm_forge.build import compile_cache, offline, origin
from ssm_forge.build import provenance as materials
from ssm_forge.build.finalize import finalize
from ssm_forge.build.run import hint
from ssm_forge.channel import folder as channel
from ssm_forge.channel import policy
from ssm_forge.flow import planning
from ssm_forge.flow.plan import Choice, Options
from ssm_forge.install import marker, pixi, registry
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest import source_workspace
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.recipe import Rendered
from ssm_forge.package import installed as package_installed
from ssm_forge.solve import lock, source_packages
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.lock_sources import SourcePackage

# What pixi says, without its spaces and line ends, where it can't build at all: it is older than the manifest asks for,
# has no pixi-build, or can't have the program that builds recipes.
_CAN_NOT_BUILD = ("requirespixi", "pixi-build", "initializethebuild-backend")
# What it says where it can't have a package.
_NOT_HAD = re.compile(r"mismatch|failed to (fetch|download|extract)|status (client|server) error")
_OUT_OF_DATE = "lock file not up-to-date"
_BUILDING = "Running build for recipe"


@dataclass(frozen=True)
class Kept:
    """An environment of recipes/pixi.toml that is what the user asked for.

    Attributes:
        key: what its kernels are built for.
        prefix: where pixi installs it.
    """

    locked: LockedEnvironment
    key: BuildKey
    prefix: Path

    @property
    def variant(self) -> str:
        return self.key.variant

    @property
    def python(self) -> str:
        return self.key.python

    @property
    def cuda(self) -> str:
        return self.key.cuda

    @property
    def archs(self) -> ArchList:
        return self.key.archs


def choose(options: Options, choice: Choice, place: Workspace) -> Kept | None:
    """The environment that pixi can install for these wishes; None where the own engine has to do it.

    Args:
        choice: what ``options`` come to.

    Raises:
        VerifyError: when recipes/pixi.toml or its lock is not what the root and the matrix say.
    """
    if choice.variant.source != "conda" or not _asks_for_nothing_else(options, place):
        return None
    python = planning.manifest_python(options.variant, place)
    if options.python not in (None, python) or python not in choice.variant.pythons:
        return None
    prefix = place.source_envs / options.variant
    # In a fresh checkout pixi downloads what the recipes are built from; the own engine keeps it in its cache.
    if marker.read_marker(prefix) is None and not origin.conda_reachable():
        return None
    if any(character.isspace() for character in str(place.root)):
        note(f"pixi would build in {place.recipes}, whose path has a space: the own engine builds in its cache.")
        return None
    _require_in_step(options.variant, place)
    locked = lock.environment(place.source_lock, options.variant)
    recipes = manifest.load(place.source_manifest)
    key = source_workspace.key(recipes, recipes.environment(options.variant))
    if key is None or not _serves_this_machine(key.archs):
        return None
    return Kept(locked, key, prefix)


def _asks_for_nothing_else(options: Options, place: Workspace) -> bool:
    """Whether the wishes are such that the lock can hold what comes of them, and pixi is there."""
    other = (options.prefix, options.cuda_arch, options.channels, policy.find(options.trust, place))
    return (
        bool(os.environ.get("PIXI_EXE"))
        and options.source != "bridge"
        and options.host_compiler == "auto"
        and not any(other)
    )


def _require_in_step(variant: str, place: Workspace) -> None:
    fix = f"Run '{launcher()} lock'."
    if stale := source_workspace.check(place):
        raise VerifyError(f"{stale}.", fix=fix)
    recipes = manifest.load(place.source_manifest)
    asked = replace(recipes, environments=(recipes.environment(variant),))
    problems = lock.check(asked, place.source_lock).get(variant, [])
    if problems:
        raise VerifyError(f"recipes/pixi.lock does not fit recipes/pixi.toml: environment {problems[0]}.", fix=fix)


def _serves_this_machine(archs: ArchList) -> bool:
    for gpu in machine.gpus():
        if archs.support(gpu.capability) != "native":
            note(
                f"{gpu.name} ({gpu.capability}) has no machine code in {archs}, for which recipes/pixi.lock has the "
                "kernels: the own engine builds them for this GPU."
            )
            return False
    return True


def install_kept(kept: Kept, place: Workspace, log: Log, *, jobs: int | None = None) -> bool:
    """Let pixi install the environment, compiling what it has not built yet, and take the packages into the channel.

    Returns:
        Whether pixi could build; where it can't, nothing was done.

    Raises:
        BuildError: when a build fails.
        VerifyError: when pixi does not take the lock.
        NetworkError, IntegrityError: when a locked package can't be had, or is another one.
        InstallError: when pixi fails otherwise.
    """
    environment = compile_cache.environment(place)
    if jobs is not None:
        environment["CPU_COUNT"] = str(jobs)
    try:
        pixi.install_environment(kept.variant, kept.cuda, place.source_manifest, log, environment)
    except pixi.PixiError as failed:
        error = _explained(kept, failed, place, log)
        if error is None:
            return False
        raise error from failed
    packages = [source_packages.rendered(source, place.source_lock) for source in kept.locked.sources]
    for source, package in zip(kept.locked.sources, packages, strict=True):
        _take(kept, source, package, place)
    offline.keep_sources(packages, place.source_envs.with_name("bld"), place)
    made = marker.Installed(
        variant=kept.variant,
        python=kept.python,
        source="conda",
        packages=tuple(package.filename for package in packages),
        created=False,
    )
    if marker.read_marker(kept.prefix) != made:
        marker.write_marker(kept.prefix, made)
    registry.remember(kept.prefix, place)
    return True


def _explained(kept: Kept, failed: pixi.PixiError, place: Workspace, log: Log) -> ForgeError | None:
    """What a failure of pixi's is, None where it can't build at all, which is said."""
    reason = failed.reason
    out_of_date = _OUT_OF_DATE in reason
    if out_of_date:
        # The lock fits: that was seen when the environment was chosen.
        reason = pixi.why_out_of_date(place.source_manifest) or reason
    if any(words in re.sub(r"[\s;]+", "", reason) for words in _CAN_NOT_BUILD):
        note(f"this pixi can't build the kernels itself ({reason}): the own engine does it.")
        return None
    if out_of_date:
        what = f"pixi does not take recipes/pixi.lock: {reason.rstrip('.')}."
        return VerifyError(what, fix=f"Run '{launcher()} lock'.", log=log.path)
    if _NOT_HAD.search(failed.told):
        built_with = [r for source in kept.locked.sources for r in (*source.build, *source.host)]
        if (error := offline.blame([*kept.locked.records, *built_with], place)) is not None:
            error.log = log.path
            return error
    if _BUILDING in failed.told:
        return BuildError(failed.error.what, fix=hint(failed.told), log=log.path)
    return failed.error


def _take(kept: Kept, source: SourcePackage, package: Rendered, place: Workspace) -> None:
    """Finish one of pixi's packages and add it to the channel, where that lacks it as the recipe is now."""
    channel.ensure_indexed(place.channel)
    held = channel.find(place.channel, package.filename)
    if held is not None and planning.is_current(held, package.name, place):
        return
    artifact = _artifact(kept.prefix, package)
    place.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.cache, prefix="take-") as scratch:
        # It is finished into the folder above its subdir's.
        copy = Path(scratch) / kept.key.platform.subdir / artifact.name
        copy.parent.mkdir()
        shutil.copyfile(artifact, copy)
        finished = finalize(copy, package, kept.key, place, solved=materials.locked(source))
        target = channel.add(place.channel, finished)
    say(f"Taken into the channel: {target.name}")


def _artifact(prefix: Path, package: Rendered) -> Path:
    """The package that pixi built and installed."""
    record = package_installed.records(prefix).get(package.name)
    url = record.url if record is not None else ""
    path = Path(unquote(urlparse(url).path))
    if path.name != package.filename or not path.is_file():
        raise InstallError(
            f"{prefix} has {package.name} from {url or 'nowhere'}, and recipes/pixi.lock says that it is "
            f"{package.filename}.",
            fix=f"Remove {prefix.parent.parent} and run the same command again.",
        )
    return path
