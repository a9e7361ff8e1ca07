"""Builds a package a second time from what it says it was made from, and compares the two.

A package holds its variant and the sha256 of its recipe, patches and toolchain locks. A rebuild proves something
only if this checkout has the very same ones; else it is refused, with what differs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssm_forge.base.errors import ForgeError, IntegrityError, MachineError, UsageError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.ui import Log, note, open_log, say
from ssm_forge.build import costs as compile_costs
from ssm_forge.build import finalize, leftovers, offline
from ssm_forge.build import jobs as build_jobs
from ssm_forge.build import provenance as materials
from ssm_forge.build import run as builds
from ssm_forge.build.request import BuildRequest
from ssm_forge.flow import pipeline, plan, planning
from ssm_forge.manifest import recipe, variants
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.package import differences as package_diff
from ssm_forge.package.differences import Comparison, Difference
from ssm_forge.package.file_differences import NEW
from ssm_forge.package.read import PROVENANCE, Material
from ssm_forge.package.write import read_json
from ssm_forge.solve import solver

# Commits looked at for one that has a package's inputs.
_HISTORY = 200


@dataclass(frozen=True)
class Recorded:
    """What a package says it was made from.

    Attributes:
        filename: the name that it was built under, whatever the file is called now.
        requires: names of the packages of ours that it depends on.
        key: what it was built for.
    """

    filename: str
    project: str
    requires: frozenset[str]
    format: int
    recipe_sha256: str
    key: BuildKey
    materials: tuple[Material, ...]


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


def read(package: Path) -> Recorded:
    """What a package says that it was made from.

    Raises:
        UsageError: when it was not made by ssm-forge.
        IntegrityError: when it is not a whole .conda package.
    """
    index = _json(package, "index.json")
    provenance = _json(package, PROVENANCE.removeprefix("info/"))
    tree = provenance.get("tree")
    if isinstance(tree, dict):
        raise UsageError(
            f"{package} was made from a source tree ({tree.get('origin')}), which is not kept here.",
            fix=f"Build that tree again with '{launcher()} build --source-tree', and compare the two with 'cmp'.",
        )
    key, listed = _key(provenance), provenance.get("materials")
    is_projects = provenance.get("name") in recipe.PROJECTS
    if not is_projects or key is None or not isinstance(listed, list) or not all(map(_is_material, listed)):
        reason = f"its {PROVENANCE} is for something else" if provenance else f"it has no {PROVENANCE}"
        raise UsageError(
            f"{package} is not a package that ssm-forge made: {reason}, and it is {_name(index) or 'nameless'}.",
            fix=f"Name one that '{launcher()} build' made, of {' or '.join(recipe.PROJECTS)}.",
        )
    depends = {str(spec).split()[0] for spec in index.get("depends", [])}
    return Recorded(
        filename=f"{_name(index)}.conda",
        project=provenance["name"],
        requires=frozenset(depends & set(recipe.PROJECTS)),
        format=provenance.get("format", 0),
        recipe_sha256=str(provenance.get("recipe_sha256", "")),
        key=key,
        materials=tuple(listed),
    )


def _key(provenance: Mapping[str, Any]) -> BuildKey | None:
    try:
        return BuildKey.from_provenance(provenance)
    except ValueError:
        return None


def _is_of_texts(value: object, keys: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and set(keys) <= set(value) and all(isinstance(v, str) for v in value.values())


def _json(package: Path, name: str) -> dict[str, Any]:
    """A JSON object of the package's info; empty where it has none."""
    try:
        content = read_json(package, name)
    except KeyError:
        return {}
    return content if isinstance(content, dict) else {}


def _name(index: dict[str, Any]) -> str:
    return "-".join(str(index[key]) for key in ("name", "version", "build") if key in index)


def check_inputs(recorded: Recorded, workspace: Workspace) -> None:
    """Refuse a package that this checkout can't build again.

    Raises:
        IntegrityError: when the package was made from other inputs than ``workspace`` has; names them.
    """
    if recorded.format != finalize.FORMAT:
        raise IntegrityError(
            f"{recorded.filename} is finished in format {recorded.format}, and this checkout writes format "
            f"{finalize.FORMAT}, so a rebuild here can't give the same bytes.",
            fix="Check out the version of ssm-forge that built it (git log -S 'FORMAT = "
            f"{recorded.format}' -- scripts/ssm_forge/build/finalize.py).",
        )
    differing = _other_inputs(recorded, workspace)
    if differing:
        raise IntegrityError(
            f"{recorded.filename} was not made from what this checkout has, so a rebuild would prove nothing: "
            f"{'; '.join(differing)}.",
            fix=_where_they_are(recorded, workspace),
        )


def _is_material(item: Any) -> bool:
    """A package that a channel gave may have nothing stronger than md5."""
    known_by_md5 = _is_of_texts(item, ("uri", "md5", "role")) and item["role"] == materials.SOLVED
    return known_by_md5 or _is_of_texts(item, ("uri", "sha256", "role"))


def _other_inputs(recorded: Recorded, workspace: Workspace) -> list[str]:
    """What of the package's inputs ``workspace`` lacks or has otherwise; empty when all are the same."""
    differing = [sentence for item in recorded.materials if (sentence := _other_file(item, workspace))]
    digest = recipe.digest(recorded.project, workspace)
    if digest != recorded.recipe_sha256 and not any(sentence.startswith("patches/") for sentence in differing):
        differing.append(
            f"recipes/{recorded.project}, recipes/common or patches differ (sha256 over them {digest[:12]} here, "
            f"{recorded.recipe_sha256[:12] or 'none'} in the package)"
        )
    differing += _other_values(recorded, workspace)
    if differing:
        return differing
    listed = materials.collect(
        recipe.render(recorded.project, recorded.key, workspace),
        recorded.key,
        workspace,
        compiler_lock=_compiler_lock(recorded, workspace),
    )
    ours = {item["uri"]: item["sha256"] for item in listed}
    theirs = {item["uri"]: item["sha256"] for item in recorded.materials if item["role"] != materials.SOLVED}
    differing += [f"{uri} is an input here, and none of the package's" for uri in sorted(ours.keys() - theirs.keys())]
    differing += [f"{uri} is an input of the package, and none here" for uri in sorted(theirs.keys() - ours.keys())]
    differing += [
        f"{uri} has sha256 {ours[uri][:12]} here, {theirs[uri][:12]} in the package"
        for uri in sorted(ours.keys() & theirs.keys())
        if ours[uri] != theirs[uri]
    ]
    return differing


def _compiler_lock(recorded: Recorded, workspace: Workspace) -> Path | None:
    """The lock of the compiler, where the bridge brought it."""
    names = (item["uri"] for item in recorded.materials if item["uri"].startswith("recipes/bridge/debs.gcc-"))
    return next((workspace.root / name for name in names), None)


def _other_file(item: Material, workspace: Workspace) -> str:
    """How a patch or lock differs here; empty when it is the same, or something to download."""
    if item["role"] in ("source", materials.SOLVED):
        return ""
    path = workspace.root / item["uri"]
    if not path.resolve().is_relative_to(workspace.root.resolve()) or not path.is_file():
        return f"{item['uri']} ({item['role']}) is not here"
    sha256 = sha256_of(path)
    if sha256 == item["sha256"]:
        return ""
    return f"{item['uri']} ({item['role']}) differs (sha256 {sha256[:12]} here, {item['sha256'][:12]} in the package)"


def _other_values(recorded: Recorded, workspace: Workspace) -> list[str]:
    """Values of the build matrix that are others here. The compiler is the machine's, not the matrix's."""
    key = recorded.key
    matrix = variants.load(workspace.variants)
    row = next((v for v in matrix.variants if (v.name, v.source) == (key.variant, key.source)), None)
    if row is None or key.python not in row.pythons:
        return [f"recipes/variants.yaml has no {key.variant} ({key.source}) for Python {key.python}"]
    compiler = key.compiler if key.source == "bridge" else None
    own_key = row.key(key.python, key.archs, compiler=compiler, kernels=key.kernels, platform=key.platform)
    if own_key == key:
        return []
    return [
        f"recipes/variants.yaml: {name} is {own_key.settings.get(name, 'nothing')} here, "
        f"{key.settings.get(name, 'nothing')} in the package"
        for name in sorted(own_key.settings.keys() | key.settings.keys())
        if own_key.settings.get(name) != key.settings.get(name)
    ]


def _where_they_are(recorded: Recorded, workspace: Workspace) -> str:
    """Which commit has the package's inputs, as something to do."""
    paths = ("recipes", "patches", "pixi.lock")
    for commit in _git(workspace.root, "log", f"-{_HISTORY}", "--format=%h", "--", *paths).decode().split():
        with tempfile.TemporaryDirectory(prefix="ssm-forge-history-") as folder:
            archive = _git(workspace.root, "archive", commit)
            subprocess.run(["tar", "-x", "-C", folder, *paths], input=archive, capture_output=True, check=False)
            try:
                same = not _other_inputs(recorded, Workspace(Path(folder), workspace.cache))
            except (ForgeError, OSError, ValueError, KeyError, TypeError, IndexError):
                # The files of then need not be readable by the code of now.
                continue
        if same:
            # Stashed first: restore drops what was changed and not committed.
            restore = f"git stash && git restore --source={commit} {' '.join(paths)}"
            return f"Commit {commit} has them: bring them here with '{restore}', and run it again."
    return "No commit of this checkout has them; check out the one that the package was built from."


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
    if _compiler_lock(recorded, workspace) is not None:
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
    before = dict(os.environ)
    os.environ.update({} if on else {"SSM_FORGE_CCACHE": "off"})
    try:
        yield
    finally:
        os.environ.pop("SSM_FORGE_CCACHE", None)
        os.environ.update({name: before[name] for name in before if name == "SSM_FORGE_CCACHE"})


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


def _git(root: Path, *arguments: str) -> bytes:
    """git's answer; empty without git or outside of a repository."""
    try:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, check=False).stdout
    except OSError:
        return b""
