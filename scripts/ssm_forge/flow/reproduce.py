"""Builds a package a second time from what it says it was made from, and compares the two.

A package holds its variant and the sha256 of its recipe, patches and toolchain locks. A rebuild proves something
only if this checkout has the very same ones; else it is refused, with what differs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import Log, note, open_log, say
from ssm_forge.build import costs as compile_costs
from ssm_forge.build import jobs as build_jobs
from ssm_forge.build import leftovers, offline
from ssm_forge.build import run as builds
from ssm_forge.build.request import BuildRequest
from ssm_forge.flow import pipeline, plan, planning
from ssm_forge.flow.recorded import Recorded, check_inputs, compiler_lock, read
from ssm_forge.package import differences as package_diff
from ssm_forge.package.differences import Comparison, Difference
from ssm_forge.package.file_differences import NEW
from ssm_forge.solve import solver

_CACHE = "SSM_FORGE_CCACHE"


@dataclass(frozen=True)
class Outcome:
    """A package and its rebuild, compared.

    Attributes:
        rebuilt: the file name of the rebuilt package.
        kept: the rebuilt package, where it was to be kept.
    """

    package: Path
    rebuilt: str
    comparison: Comparison
    kept: Path | None
    log: Path


def reproduce(
    package: Path, workspace: Workspace, *, jobs: int | None = None, cache: bool = True, keep: Path | None = None
) -> Outcome:
    """Build ``package`` again, whatever channels hold, and return how the two compare.

    Args:
        cache: whether objects may come from the compile cache.
        keep: folder for the rebuilt package; None to drop it.

    Raises:
        UsageError: when it is no package of ours, or ``keep`` holds a file of its name.
        IntegrityError: when it was made from other inputs than this checkout has.
        MachineError: when this machine has no compiler of the major that was used, or too little memory.
        BuildError: when the rebuild fails.
    """
    recorded = read(package)
    check_inputs(recorded, workspace)
    leftovers.sweep(workspace)
    with (
        tempfile.TemporaryDirectory(prefix="ssm-forge-reproduce-") as scratch,
        open_log(workspace.logs, "reproduce") as log,
    ):
        work = planning.make(_options(recorded, Path(scratch) / "prefix", jobs, workspace), workspace)
        request = next(p.request for p in work.packages if p.name == recorded.project)
        _check_kept(keep, {recorded.filename, request.filename})
        if request.filename != recorded.filename:
            note(f"the recipe now gives {request.filename}: the packages can't be the same.")
        _make_needed(work, recorded, jobs, workspace, log)
        rebuilt = _rebuild(request, Path(scratch) / "channel", jobs, cache=cache, workspace=workspace, log=log)
        comparison = _compare(package, rebuilt, recorded)
        for difference in comparison.differences:
            log("\n".join([f"{difference.where}: {difference.what}", *difference.detail]))
        return Outcome(package, rebuilt.name, comparison, _keep(rebuilt, keep), log.path)


def _make_needed(work: plan.Plan, recorded: Recorded, jobs: int | None, workspace: Workspace, log: Log) -> None:
    """The bridge, and what the recipe's tests install beside the package: built as by the build task if missing."""
    needed = tuple(p for p in work.packages if p.name in recorded.requires)
    costs = compile_costs.load(workspace, [p.name for p in needed] or [recorded.project], recorded.key.kernels)
    chosen = build_jobs.choose_jobs(jobs, costs)
    memory = build_jobs.memory_needed(chosen, costs)
    pipeline.make_packages(replace(work, packages=needed, jobs=chosen, memory_bytes=memory), workspace, log)


def _rebuild(
    request: BuildRequest, channel: Path, jobs: int | None, *, cache: bool, workspace: Workspace, log: Log
) -> Path:
    if request.locked is None or offline.lacking([request], workspace):
        solver.require_reachable(request.channels)
    # Counted anew: what is needed has been built, and memory is what it was.
    chosen = build_jobs.choose_jobs(jobs, compile_costs.load(workspace, [request.project], request.key.kernels))
    say(f"Building {request.filename} again with {chosen} jobs, {'with' if cache else 'without'} the compile cache")
    with _compile_cache(on=cache):
        return builds.build(request, channel=channel, jobs=chosen, workspace=workspace, log=log)


def _options(recorded: Recorded, prefix: Path, jobs: int | None, workspace: Workspace) -> plan.Options:
    options = plan.Options(
        variant=recorded.key.variant,
        python=recorded.key.python,
        cuda_arch=str(recorded.key.archs),
        source=recorded.key.source,  # type: ignore[arg-type]
        prefix=prefix,
        jobs=jobs,
        for_this_machine=False,
        kernels=recorded.key.kernels,
        platform=recorded.key.platform.subdir,
    )
    if options.source == "conda":
        return options
    if compiler_lock(recorded, workspace) is not None:
        return replace(options, host_compiler="bridge")
    return _with_compiler(options, recorded.key.compiler, workspace)


def _with_compiler(options: plan.Options, major: str, workspace: Workspace) -> plan.Options:
    """The options with a C++ compiler of the major that the package was made with.

    Raises:
        MachineError: when there is none.
    """
    compilers = []
    for choice in ("auto", f"g++-{major}", "g++", "bridge"):
        tried = replace(options, host_compiler=choice)
        try:
            parts = planning.origin(tried, workspace).parts
        except MachineError:
            if choice == "auto":
                raise  # It takes any compiler, so that something else is missing.
            continue
        assert parts is not None
        if str(parts.compiler.major) == major:
            return tried
        compilers.append(f"{parts.compiler.origin} {parts.compiler.version}")
    raise MachineError(
        f"the package was compiled with g++ {major}, and this machine has none (found: "
        f"{', '.join(dict.fromkeys(compilers))}).",
        fix=f"Install it, e.g. 'apt install g++-{major}'.",
    )


@contextmanager
def _compile_cache(*, on: bool) -> Iterator[None]:
    """The build's setting for the compile cache, which its worker takes from the environment."""
    before = os.environ.get(_CACHE)
    if not on:
        os.environ[_CACHE] = "off"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_CACHE, None)
        else:
            os.environ[_CACHE] = before


def _compare(package: Path, rebuilt: Path, recorded: Recorded) -> Comparison:
    comparison = package_diff.compare(package, rebuilt)
    if rebuilt.name == recorded.filename:
        return comparison
    what = f"the recipe gave {recorded.filename}, {NEW} {rebuilt.name}"
    detail = (
        "The recipe and the values are the same, so the build string's hash was made by another rattler-build.",
        "Every name below that holds it follows from that.",
    )
    return replace(comparison, differences=(Difference("build string", what, detail), *comparison.differences))


def _check_kept(folder: Path | None, names: set[str]) -> None:
    """Refuse a folder where the rebuilt package would replace another.

    Raises:
        UsageError: when the rebuilt package would replace a file; above all the one that it is compared with.
    """
    taken = sorted(name for name in names if folder is not None and (folder / name).exists())
    if taken:
        raise UsageError(f"{folder} has a file {taken[0]} already.", fix="Name another folder with --keep.")


def _keep(rebuilt: Path, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(rebuilt, folder / rebuilt.name))
