"""pixi.lock: written from a solve of every environment, read back, and compared with the manifest."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rattler import LockChannel, LockFile, LockPlatform, MatchSpec, RepoDataRecord, VersionSpec

from ssm_forge.base.errors import UsageError, did_you_mean
from ssm_forge.base.foreign import read_bytes
from ssm_forge.base.paths import launcher
from ssm_forge.manifest.environments import EnvironmentSpec, Manifest, Platform
from ssm_forge.manifest.virtual import VirtualPackage, subdir_type, virtual_packages
from ssm_forge.package.intact import digest
from ssm_forge.solve import lock_sources, source_solve
from ssm_forge.solve.lock_sources import Kind, SolvedFor, SourcePackage
from ssm_forge.solve.run_exports import RunExports
from ssm_forge.solve.solver import Request, solve

# When an index got a package, which newer engines keep in a lock and pixi 0.77 does not.
_INDEXED = re.compile(r"^  indexed_timestamp: \d+\n", re.MULTILINE)


@dataclass(frozen=True)
class LockedEnvironment:
    """One environment of a lock on one platform.

    Attributes:
        channels: base URLs in order of priority.
        platform: the machine it was solved for.
        records: every package from a channel, sorted by name, with canonical URL and hashes.
        sources: packages that are built from a recipe, sorted by name.
    """

    name: str
    channels: tuple[str, ...]
    platform: Platform
    records: tuple[RepoDataRecord, ...]
    sources: tuple[SourcePackage, ...] = ()


def write(
    manifest: Manifest, path: Path, *, snapshot: Path | None, progress: Callable[[str], None] = lambda _: None
) -> tuple[LockedEnvironment, ...]:
    """Solve every environment, write the lock and return it; the file is replaced only when all of them solved.

    Raises:
        SolveError, NetworkError, UsageError: see :func:`ssm_forge.solve.solver.solve`.
    """
    solved = []
    exports: dict[str, RunExports] = {}
    names = short_names(manifest)
    for environment in manifest.environments:
        for platform in environment.platforms:
            request = _request(environment, platform, snapshot)
            dependencies = [source_solve.SourceDependency(source, manifest) for source in environment.sources]
            sources = source_solve.solve_sources(dependencies, manifest.variants.get(platform.name, {}), request)
            for source in sources:
                exports.update(source.exports)
            records = solve(source_solve.with_sources(request, sources))
            short = replace(platform, name=names[platform.name])
            solved.append(
                LockedEnvironment(
                    environment.name,
                    environment.channels,
                    short,
                    tuple(r for r in records if r.name.normalized not in {s.package.name for s in sources}),
                    tuple(source.package for source in sources),
                )
            )
            progress(f"{environment.name}: {len(records)} packages for {platform.name}")
    write_locked(tuple(solved), path, exports)
    return tuple(solved)


def short_names(manifest: Manifest) -> dict[str, str]:
    """Platform names as the lock has them: pixi 0.77 writes ``p1``, ``p2`` for those that name more than a subdir."""
    rich = [p.name for p in manifest.platforms if p.name != p.subdir]
    return {p.name: p.name for p in manifest.platforms} | {name: f"p{i}" for i, name in enumerate(rich, 1)}


def counterpart(platform: Platform, candidates: Sequence[LockedEnvironment], *names: str) -> LockedEnvironment | None:
    """The candidate that was solved for the same machine, whatever the platform is called there; else by name.

    Names are only labels: pixi renames the platforms of a lock when it reads and writes it.
    """
    same = (e for e in candidates if _identity(e.platform) == _identity(platform))
    return next(same, None) or next((e for e in candidates if e.platform.name in names), None)


def _identity(platform: Platform) -> tuple[str, frozenset[VirtualPackage]]:
    """What makes a platform what it is: its subdir, and what it says beyond that subdir's defaults."""
    return platform.subdir, frozenset(platform.virtual) - set(virtual_packages(subdir=platform.subdir))


def write_locked(
    environments: tuple[LockedEnvironment, ...], path: Path, exports: Mapping[str, RunExports] | None = None
) -> None:
    """Write environments that are solved already.

    Args:
        exports: URL -> what the package there exports, of those that a recipe names; known of what was read.
    """
    used = list(dict.fromkeys(e.platform for e in environments))
    platforms = {p.name: LockPlatform(p.name, subdir_type(p.subdir), [str(v) for v in p.virtual]) for p in used}
    lock = LockFile(list(platforms.values()))
    for environment in environments:
        lock.set_channels(environment.name, [LockChannel(url) for url in environment.channels])
        for record in environment.records:
            lock.add_conda_package(environment.name, platforms[environment.platform.name], record)
    packages = list({str(source): source for e in environments for source in e.sources}.values())
    for number, package in enumerate(packages):
        for kind in lock_sources.KINDS:
            name = lock_sources.stand_in(number, kind)
            lock.set_channels(name, [])
            for record in package.built_with(kind):
                lock.add_conda_package(name, next(iter(platforms.values())), record)
    sources_of = {SolvedFor(e.name, e.platform.name): e.sources for e in environments if e.sources}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".lock-") as folder:
        draft = Path(folder) / path.name
        lock.to_path(draft)
        text = _INDEXED.sub("", draft.read_text(encoding="utf-8"))
        if packages:
            text = lock_sources.join(text, packages, sources_of, exports or {})
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)


def _request(environment: EnvironmentSpec, platform: Platform, snapshot: Path | None) -> Request:
    return Request(
        specs=environment.specs,
        channels=environment.channels,
        virtual=platform.virtual,
        subdir=platform.subdir,
        constraints=environment.constraints,
        strict=environment.strict,
        snapshot=snapshot,
        offers_snapshot=True,
        purpose=f"environment {environment.name} on {platform.name}",
    )


def read(path: Path) -> tuple[LockedEnvironment, ...]:
    """Read a lock, environments and platforms in the file's order.

    Raises:
        UsageError: when it is missing, or not a lock that pixi would read.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist.", fix=f"Make it with '{launcher()} lock'.")
    try:
        parted = lock_sources.part(read_bytes(path).decode())
        if not parted.entries:
            return _environments(LockFile.from_path(path), parted)
        # The engine reads files only.
        with tempfile.TemporaryDirectory(prefix="ssm-forge-lock-") as folder:
            plain = Path(folder) / path.name
            plain.write_text(parted.engine, encoding="utf-8")
            return _environments(LockFile.from_path(plain), parted)
    except Exception as error:  # The engine has an error of its own for each thing that is wrong.
        raise UsageError(
            f"{path} is not a readable lock file ({error}).", fix=f"Make it anew with '{launcher()} lock'."
        ) from error


def _environments(lock: LockFile, parted: lock_sources.Parted) -> tuple[LockedEnvironment, ...]:
    by_name: dict[str, list[LockedEnvironment]] = {}
    for name, environment in sorted(lock.environments(), key=lambda item: item[0]):
        channels = tuple(str(c) for c in environment.channels())
        for platform in sorted(environment.platforms(), key=lambda p: p.name):
            records = environment.conda_repodata_records_for_platform(platform) or []
            virtual = tuple(VirtualPackage.parse(v) for v in platform.virtual_packages)
            solved_for = Platform(platform.name, str(platform.subdir), virtual)
            ordered = tuple(sorted(records, key=lambda r: r.name.normalized))
            by_name.setdefault(name, []).append(LockedEnvironment(name, channels, solved_for, ordered))

    def built_with(number: int, kind: Kind) -> tuple[RepoDataRecord, ...]:
        return next((e.records for e in by_name.get(lock_sources.stand_in(number, kind), [])), ())

    packages = {
        entry["conda_source"]: lock_sources.package(entry, functools.partial(built_with, number))
        for number, entry in enumerate(parted.entries)
    }
    real = [e for name, environments in by_name.items() if not lock_sources.is_stand_in(name) for e in environments]
    return tuple(
        replace(e, sources=tuple(packages[s] for s in parted.listed.get(SolvedFor(e.name, e.platform.name), ())))
        for e in real
    )


def environment(path: Path, name: str) -> LockedEnvironment:
    """One environment of the lock, for the platform of its name's first entry.

    Raises:
        UsageError: when the lock has no such environment; says which it has.
    """
    locked = read(path)
    for candidate in locked:
        if candidate.name == name:
            return candidate
    names = list(dict.fromkeys(e.name for e in locked))
    message = f"{path.name} has no environment '{name}'; it has {', '.join(names)}."
    raise UsageError(message, fix=did_you_mean(name, names).strip())


@dataclass(frozen=True)
class Disagreement:
    """A reason why the lock is not what the manifest asks for.

    Attributes:
        environment: name of the environment.
        package: what it is about; empty when it is about the environment as a whole.
        reason: one sentence.
    """

    environment: str
    package: str
    reason: str

    def __str__(self) -> str:
        about = f"{self.environment}: {self.package}: " if self.package else f"{self.environment}: "
        return about + self.reason


def check(manifest: Manifest, path: Path) -> dict[str, list[Disagreement]]:
    """Compare lock and manifest, without solving: environment -> disagreements (empty when they agree).

    Raises:
        UsageError: when the lock can't be read.
    """
    unmatched = list(read(path))
    names = short_names(manifest)
    by_environment: dict[str, list[Disagreement]] = {}
    for wanted in manifest.environments:
        problems = by_environment.setdefault(wanted.name, [])
        for platform in wanted.platforms:
            candidates = [e for e in unmatched if e.name == wanted.name]
            match = counterpart(platform, candidates, platform.name, names[platform.name])
            if match is not None:
                unmatched.remove(match)
                problems += _compare(wanted, platform, match)
                problems += _compare_sources(wanted, platform, match, manifest)
            elif wanted.specs or wanted.sources:
                problems.append(Disagreement(wanted.name, "", f"not locked for platform {platform.name}"))
    for extra in unmatched:
        reason = f"locked for platform {extra.platform.name}, which pixi.toml does not ask for"
        by_environment.setdefault(extra.name, []).append(Disagreement(extra.name, "", reason))
    return by_environment


def _compare(wanted: EnvironmentSpec, platform: Platform, locked: LockedEnvironment) -> list[Disagreement]:
    def about(package: str, reason: str) -> Disagreement:
        return Disagreement(wanted.name, package, reason)

    problems = []
    if locked.channels != wanted.channels:
        problems.append(about("", f"channels are {_names(locked.channels)}, pixi.toml has {_names(wanted.channels)}"))
    if locked.platform.subdir != platform.subdir or set(locked.platform.virtual) != set(platform.virtual):
        locked_for, asked = _names(map(str, locked.platform.virtual)), _names(map(str, platform.virtual))
        problems.append(about("", f"locked for a machine with {locked_for}, pixi.toml has {asked}"))
    by_name: dict[str, Any] = {r.name.normalized: r for r in locked.records}
    for text in wanted.specs:
        spec = MatchSpec(text)
        name = _name(spec)
        if name not in by_name:
            problems.append(about(name, f"pixi.toml asks for '{text}', the lock has no {name}"))
        elif not satisfies(by_name[name], spec):
            problems.append(about(name, f"pixi.toml asks for '{text}', the lock has {describe(by_name[name])}"))
    for text in wanted.constraints:
        spec = MatchSpec(text)
        record = by_name.get(_name(spec))
        if record is not None and not satisfies(record, spec):
            problems.append(about(_name(spec), f"pixi.toml allows only '{text}', the lock has {describe(record)}"))
    return problems + [about(*p) for p in _unsound(locked, by_name, wanted, platform.name)]


def _compare_sources(
    wanted: EnvironmentSpec, platform: Platform, locked: LockedEnvironment, manifest: Manifest
) -> list[Disagreement]:
    """Packages from source: asked for and there, and locked from their recipes as they are now."""
    by_name = {source.name: source for source in locked.sources}
    asked = {source.name for source in wanted.sources}
    unasked = [(name, "locked as built from a recipe, and pixi.toml does not ask for that") for name in by_name]
    problems = [problem for problem in unasked if problem[0] not in asked]
    for spec in wanted.sources:
        source = by_name.get(spec.name)
        if source is None or source.location != spec.path:
            locked_from = f"from '{source.location}'" if source else "from no recipe"
            problems.append(
                (spec.name, f"pixi.toml asks for it from the recipe in '{spec.path}', the lock has it {locked_from}")
            )
            continue
        dependency = source_solve.SourceDependency(spec, manifest)
        recipe = source_solve.recipe_requirements(dependency, manifest.variants.get(platform.name, {}))
        problems += [(spec.name, reason) for reason in _unlike(recipe, source, platform)]
    return [Disagreement(wanted.name, name, reason) for name, reason in problems]


def _unlike(recipe: source_solve.RecipeRequirements, source: SourcePackage, platform: Platform) -> list[str]:
    """Why a recipe, as it is now, would be locked otherwise."""
    problems = []
    keys = sorted(set(recipe.variants) | set(source.variants))
    for key in (key for key in keys if recipe.variants.get(key) != source.variants.get(key)):
        new, old = (values.get(key, "nothing") for values in (recipe.variants, source.variants))
        problems.append(f"its recipe is built with {key} {new}, the lock has {old}")
    problems += [f"its recipe needs '{text}', the lock does not" for text in recipe.run if text not in source.depends]
    for kind, specs in (("build", recipe.build), ("host", recipe.host)):
        records = {r.name.normalized: r for r in (source.build if kind == "build" else source.host)}
        problems += [f"its recipe's {kind} environment: {reason}" for reason in _lacking(specs, records)]
        for name, record in records.items():
            needs = [text for text in record.depends if not _name(MatchSpec(text)).startswith("__")]
            problems += [f"its {kind} environment: {name}: {reason}" for reason in _lacking(needs, records)]
            if not digest(record)[0]:
                problems.append(f"its {kind} environment: the lock has no hash of {name}")
    return problems


def _lacking(specs: Sequence[str], records: Mapping[str, RepoDataRecord]) -> list[str]:
    reasons = []
    for text in specs:
        spec = MatchSpec(text)
        record = records.get(_name(spec))
        if record is None or not satisfies(record, spec):
            reasons.append(f"needs '{text}', the lock has {describe(record) if record else f'no {_name(spec)}'}")
    return reasons


def _unsound(
    locked: LockedEnvironment, by_name: dict[str, Any], wanted: EnvironmentSpec, platform_name: str
) -> list[tuple[str, str]]:
    """What no solve would have written, as (package, reason): unmet needs, unneeded packages, missing hashes."""
    problems: list[tuple[str, str]] = []
    virtual = {v.name: v for v in locked.platform.virtual}
    needed: set[str] = set()
    sources = {source.name: source for source in locked.sources}
    waiting = [_name(MatchSpec(text)) for text in wanted.specs] + list(sources)
    while waiting:
        name = waiting.pop()
        if name in needed or name not in {**by_name, **sources}:
            continue
        needed.add(name)
        for depend in {**by_name, **sources}[name].depends:
            spec = MatchSpec(depend)
            target = _name(spec)
            if target in sources:
                # Of a package that is still to be built the lock has no version.
                pass
            elif target.startswith("__"):
                if not _machine_has(virtual.get(target), spec):
                    problems.append((name, f"needs '{depend}' of the machine, which {platform_name} lacks"))
            elif target not in by_name or not satisfies(by_name[target], spec):
                there_is = describe(by_name[target]) if target in by_name else f"no {target}"
                problems.append((name, f"needs '{depend}', the lock has {there_is}"))
            waiting.append(target)
    problems += [(n, "nothing in pixi.toml needs it") for n in sorted(set(by_name) - needed)]
    for name, record in by_name.items():
        if not digest(record)[0]:
            problems.append((name, "the lock has no hash of it"))
        if not any(is_from(record, channel) for channel in locked.channels):
            problems.append((name, f"comes from {record.url}, which is none of the channels"))
    return problems


def _machine_has(virtual: VirtualPackage | None, spec: MatchSpec) -> bool:
    """Whether a declared machine property meets a requirement such as ``__glibc >=2.28``."""
    if virtual is None:
        return False
    return not spec.version or VersionSpec(spec.version).matches(virtual.to_rattler().version)


def satisfies(record: Any, spec: MatchSpec) -> bool:
    """Whether a locked package meets a spec, its channel included."""
    if spec.channel is not None and not is_from(record, spec.channel.base_url):
        return False
    return bool(spec.matches(record))


def is_from(record: Any, channel: str) -> bool:
    """Whether a record is of exactly this channel; ``nvidia`` is not ``nvidia/label/cuda-11.8.0``."""
    return bool(record.url.rsplit("/", 2)[0] == channel.rstrip("/"))


def describe(record: Any) -> str:
    """A record's name, version and build, for people."""
    return f"{record.name.normalized} {record.version} {record.build}"


def _name(spec: MatchSpec) -> str:
    return str(spec.name.normalized)


def _names(items: Any) -> str:
    return ", ".join(items) or "none"
