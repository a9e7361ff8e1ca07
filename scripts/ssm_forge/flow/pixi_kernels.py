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
from ssm_forge.package import kernels as package_kernels
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
        locked: what recipes/pixi.lock has for it.
        key: what its kernels are built for.
        prefix: where pixi installs it.
    """

    locked: LockedEnvironment
    key: BuildKey
    prefix: Path

    @property
    def variant(self) -> str:
        """The environment's name, which is its variant's."""
        return self.key.variant

    @property
    def python(self) -> str:
        """Its Python minor."""
        return self.key.python

    @property
    def cuda(self) -> str:
        """Its CUDA release."""
        return self.key.cuda

    @property
    def archs(self) -> ArchList:
        """What its kernels have GPU code for."""
        return self.key.archs


def choose(options: Options, choice: Choice, workspace: Workspace) -> Kept | None:
    """The environment that pixi can install for these wishes; None where the own engine has to do it.

    Args:
        choice: what ``options`` come to.

    Raises:
        VerifyError: when recipes/pixi.toml or its lock is not what the root and the matrix say.
    """
    if choice.variant.source != "conda" or not _asks_for_nothing_else(options, workspace):
        return None
    python = planning.manifest_python(options.variant, workspace)
    if options.python not in (None, python) or python not in choice.variant.pythons:
        return None
    prefix = workspace.source_envs / options.variant
    # In a fresh checkout pixi downloads what the recipes are built from; the own engine keeps it in its cache.
    if marker.read_marker(prefix) is None and not origin.conda_reachable():
        return None
    if any(character.isspace() for character in str(workspace.root)):
        note(f"pixi would build in {workspace.recipes}, whose path has a space: the own engine builds in its cache.")
        return None
    _require_in_step(options.variant, workspace)
    locked = lock.environment(workspace.source_lock, options.variant)
    recipes = manifest.load(workspace.source_manifest)
    key = source_workspace.key(recipes, recipes.environment(options.variant))
    if key is None or not _serves_this_machine(key.archs):
        return None
    return Kept(locked, key, prefix)


def _asks_for_nothing_else(options: Options, workspace: Workspace) -> bool:
    """Whether the wishes are such that the lock can hold what comes of them, and pixi is there."""
    wishes = (options.prefix, options.cuda_arch, options.channels, policy.find(options.trust, workspace))
    as_locked = options.host_compiler == "auto" and options.kernels == package_kernels.DEFAULT
    return bool(os.environ.get("PIXI_EXE")) and options.source != "bridge" and as_locked and not any(wishes)


def _require_in_step(variant: str, workspace: Workspace) -> None:
    fix = f"Run '{launcher()} lock'."
    if stale := source_workspace.check(workspace):
        raise VerifyError(f"{stale}.", fix=fix)
    recipes = manifest.load(workspace.source_manifest)
    asked = replace(recipes, environments=(recipes.environment(variant),))
    problems = lock.check(asked, workspace.source_lock).get(variant, [])
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


def install_kept(kept: Kept, workspace: Workspace, log: Log, *, jobs: int | None = None) -> bool:
    """Let pixi install the environment, compiling what it has not built yet, and take the packages into the channel.

    Returns:
        Whether pixi could build; where it can't, nothing was done.

    Raises:
        BuildError: when a build fails.
        VerifyError: when pixi does not take the lock.
        NetworkError, IntegrityError: when a locked package can't be had, or is another one.
        InstallError: when pixi fails otherwise.
    """
    environment = compile_cache.environment(workspace)
    if jobs is not None:
        environment["CPU_COUNT"] = str(jobs)
    try:
        pixi.install_environment(kept.variant, kept.cuda, workspace.source_manifest, log, environment)
    except pixi.PixiError as failed:
        error = _explained(kept, failed, workspace, log)
        if error is None:
            return False
        raise error from failed
    packages = [source_packages.rendered(source, workspace.source_lock) for source in kept.locked.sources]
    for source, package in zip(kept.locked.sources, packages, strict=True):
        _take(kept, source, package, workspace)
    offline.keep_sources(packages, workspace.source_envs.with_name("bld"), workspace)
    installed = marker.Installed(
        variant=kept.variant,
        python=kept.python,
        source="conda",
        packages=tuple(package.filename for package in packages),
        created=False,
    )
    if marker.read_marker(kept.prefix) != installed:
        marker.write_marker(kept.prefix, installed)
    registry.remember(kept.prefix, workspace)
    return True


def _explained(kept: Kept, failed: pixi.PixiError, workspace: Workspace, log: Log) -> ForgeError | None:
    """What a failure of pixi's is, None where it can't build at all, which is said."""
    reason = failed.reason
    out_of_date = _OUT_OF_DATE in reason
    if out_of_date:
        # The lock fits: that was seen when the environment was chosen.
        reason = pixi.why_out_of_date(workspace.source_manifest) or reason
    if any(words in re.sub(r"[\s;]+", "", reason) for words in _CAN_NOT_BUILD):
        note(f"this pixi can't build the kernels itself ({reason}): the own engine does it.")
        return None
    if out_of_date:
        message = f"pixi does not take recipes/pixi.lock: {reason.rstrip('.')}."
        return VerifyError(message, fix=f"Run '{launcher()} lock'.", log=log.path)
    if _NOT_HAD.search(failed.output):
        built_with = [r for source in kept.locked.sources for r in (*source.build, *source.host)]
        if (error := offline.blame([*kept.locked.records, *built_with], workspace)) is not None:
            error.log = log.path
            return error
    if _BUILDING in failed.output:
        return BuildError(failed.error.what, fix=hint(failed.output), log=log.path)
    return failed.error


def _take(kept: Kept, source: SourcePackage, package: Rendered, workspace: Workspace) -> None:
    """Finish one of pixi's packages and add it to the channel, where that lacks it as the recipe is now."""
    channel.ensure_indexed(workspace.channel)
    held = channel.find(workspace.channel, package.filename)
    if held is not None and planning.is_current(held, package.name, workspace):
        return
    artifact = _artifact(kept.prefix, package)
    workspace.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace.cache, prefix="take-") as scratch:
        # It is finished into the folder above its subdir's.
        copy = Path(scratch) / kept.key.platform.subdir / artifact.name
        copy.parent.mkdir()
        shutil.copyfile(artifact, copy)
        finished = finalize(copy, package, kept.key, workspace, solved=materials.locked(source))
        target = channel.add(workspace.channel, finished)
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
