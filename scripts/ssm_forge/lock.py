"""pixi.lock: written from a solve of every environment, read back, and compared with the manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rattler import LockChannel, LockFile, LockPlatform, MatchSpec, RepoDataRecord

from ssm_forge.errors import UsageError, did_you_mean
from ssm_forge.foreign import MOST_SMALL_BYTES
from ssm_forge.manifest import EnvironmentSpec, Manifest, Platform
from ssm_forge.paths import launcher
from ssm_forge.solver import Request, VirtualPackage, solve, subdir_type, virtual_packages

VERSION = 7


@dataclass(frozen=True)
class LockedEnvironment:
    """One environment of a lock on one platform.

    Attributes:
        channels: base URLs in order of priority.
        platform: the machine it was solved for.
        records: every package, sorted by name, with canonical URL and hashes.
    """

    name: str
    channels: tuple[str, ...]
    platform: Platform
    records: tuple[RepoDataRecord, ...]


def write(
    manifest: Manifest, path: Path, *, snapshot: Path | None, progress: Callable[[str], None] = lambda _: None
) -> tuple[LockedEnvironment, ...]:
    """Solve every environment and write the lock; the file is replaced only when all of them solved.

    Raises:
        SolveError, NetworkError, UsageError: see :func:`ssm_forge.solver.solve`.
    """
    solved = []
    names = short_names(manifest)
    for environment in manifest.environments:
        for platform in environment.platforms:
            records = solve(_request(environment, platform, snapshot))
            short = replace(platform, name=names[platform.name])
            solved.append(LockedEnvironment(environment.name, environment.channels, short, tuple(records)))
            progress(f"{environment.name}: {len(records)} packages for {platform.name}")
    write_locked(tuple(solved), path)
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


def write_locked(environments: tuple[LockedEnvironment, ...], path: Path) -> None:
    """Write environments that are solved already."""
    used = list(dict.fromkeys(e.platform for e in environments))
    platforms = {p.name: LockPlatform(p.name, subdir_type(p.subdir), [str(v) for v in p.virtual]) for p in used}
    lock = LockFile(list(platforms.values()))
    for environment in environments:
        lock.set_channels(environment.name, [LockChannel(url) for url in environment.channels])
        for record in environment.records:
            lock.add_conda_package(environment.name, platforms[environment.platform.name], record)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".lock-") as folder:
        draft = Path(folder) / path.name
        lock.to_path(draft)
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
        size = path.stat().st_size
        if size > MOST_SMALL_BYTES:
            raise ValueError(f"it has {size} bytes")
        return _environments(LockFile.from_path(path))
    except Exception as error:  # The engine has an error of its own for each thing that is wrong.
        raise UsageError(
            f"{path} is not a readable lock file ({error}).", fix=f"Make it anew with '{launcher()} lock'."
        ) from error


def _environments(lock: LockFile) -> tuple[LockedEnvironment, ...]:
    found = []
    for name, environment in sorted(lock.environments(), key=lambda item: item[0]):
        channels = tuple(str(c) for c in environment.channels())
        for platform in sorted(environment.platforms(), key=lambda p: p.name):
            records = environment.conda_repodata_records_for_platform(platform) or []
            virtual = tuple(VirtualPackage.parse(v) for v in platform.virtual_packages)
            where = Platform(platform.name, str(platform.subdir), virtual)
            ordered = tuple(sorted(records, key=lambda r: r.name.normalized))
            found.append(LockedEnvironment(name, channels, where, ordered))
    return tuple(found)


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
    what = f"{path.name} has no environment '{name}'; it has {', '.join(names)}."
    raise UsageError(what, fix=did_you_mean(name, names).strip())


def digest(record: RepoDataRecord) -> tuple[str, str]:
    """The strongest published hash of a package: ``("sha256", hex)`` or ``("md5", hex)``, or ``("", "")``."""
    if record.sha256:
        return "sha256", bytes(record.sha256).hex()
    if record.md5:
        return "md5", bytes(record.md5).hex()
    return "", ""


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
    locked = list(read(path))
    names = short_names(manifest)
    result: dict[str, list[Disagreement]] = {}
    for wanted in manifest.environments:
        problems = result.setdefault(wanted.name, [])
        for platform in wanted.platforms:
            candidates = [e for e in locked if e.name == wanted.name]
            have = counterpart(platform, candidates, platform.name, names[platform.name])
            if have is None:
                problems.append(Disagreement(wanted.name, "", f"not locked for platform {platform.name}"))
            else:
                locked.remove(have)
                problems += _compare(wanted, platform, have)
    for extra in locked:
        reason = f"locked for platform {extra.platform.name}, which pixi.toml does not ask for"
        result.setdefault(extra.name, []).append(Disagreement(extra.name, "", reason))
    return result


def _compare(wanted: EnvironmentSpec, platform: Platform, have: LockedEnvironment) -> list[Disagreement]:
    def about(package: str, reason: str) -> Disagreement:
        return Disagreement(wanted.name, package, reason)

    problems = []
    if have.channels != wanted.channels:
        problems.append(about("", f"channels are {_names(have.channels)}, pixi.toml has {_names(wanted.channels)}"))
    if have.platform.subdir != platform.subdir or set(have.platform.virtual) != set(platform.virtual):
        locked_for, asked = _names(map(str, have.platform.virtual)), _names(map(str, platform.virtual))
        problems.append(about("", f"locked for a machine with {locked_for}, pixi.toml has {asked}"))
    by_name: dict[str, Any] = {r.name.normalized: r for r in have.records}
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
    return problems + [about(*p) for p in _unsound(have, by_name, wanted, platform.name)]


def _unsound(
    have: LockedEnvironment, by_name: dict[str, Any], wanted: EnvironmentSpec, platform_name: str
) -> list[tuple[str, str]]:
    """What no solve would have written: unmet dependencies, packages nothing needs, missing hashes."""
    problems: list[tuple[str, str]] = []
    virtual = {v.name: v for v in have.platform.virtual}
    needed: set[str] = set()
    waiting = [_name(MatchSpec(text)) for text in wanted.specs]
    while waiting:
        name = waiting.pop()
        if name in needed or name not in by_name:
            continue
        needed.add(name)
        for depend in by_name[name].depends:
            spec = MatchSpec(depend)
            target = _name(spec)
            if target.startswith("__"):
                if not _machine_has(virtual.get(target), spec):
                    problems.append((name, f"needs '{depend}' of the machine, which {platform_name} lacks"))
            elif target not in by_name or not satisfies(by_name[target], spec):
                got = describe(by_name[target]) if target in by_name else f"no {target}"
                problems.append((name, f"needs '{depend}', the lock has {got}"))
            waiting.append(target)
    problems += [(n, "nothing in pixi.toml needs it") for n in sorted(set(by_name) - needed)]
    for name, record in by_name.items():
        if not digest(record)[0]:
            problems.append((name, "the lock has no hash of it"))
        if not any(is_from(record, channel) for channel in have.channels):
            problems.append((name, f"comes from {record.url}, which is none of the channels"))
    return problems


def _machine_has(virtual: VirtualPackage | None, spec: MatchSpec) -> bool:
    """Whether a declared machine property meets a requirement such as ``__glibc >=2.28``."""
    from rattler import VersionSpec

    if virtual is None:
        return False
    return not spec.version or VersionSpec(spec.version).matches(virtual.to_rattler().version)


def satisfies(record: Any, spec: MatchSpec) -> bool:
    """Whether a locked package meets a spec, its channel included."""
    wanted = spec.channel
    if wanted is not None and not is_from(record, wanted.base_url):
        return False
    return bool(spec.matches(record))


def is_from(record: Any, channel: str) -> bool:
    """Whether a record is of exactly this channel; ``nvidia`` is not ``nvidia/label/cuda-11.8.0``."""
    return bool(record.url.rsplit("/", 2)[0] == channel.rstrip("/"))


def describe(record: Any) -> str:
    return f"{record.name.normalized} {record.version} {record.build}"


def _name(spec: MatchSpec) -> str:
    return str(spec.name.normalized)


def _names(items: Any) -> str:
    return ", ".join(items) or "none"
