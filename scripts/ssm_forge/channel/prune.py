"""Pruning a channel: what newer builds have replaced goes, with what belongs to it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_forge.base import files, owners
from ssm_forge.channel import folder as channels
from ssm_forge.channel import index as repodata
from ssm_forge.channel.check import check as check
from ssm_forge.channel.check import repair as repair
from ssm_forge.channel.index import Records

_BUILD_TAIL = re.compile(r"_?h?[0-9a-f]{7,8}_\d+$|_\d+$")


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` removes.

    Attributes:
        packages: their paths inside the channel.
        other: paths of what belongs to them or to nobody: statements, old shards, unfinished uploads.
        size: bytes of all of these files.
    """

    packages: tuple[str, ...]
    other: tuple[str, ...]
    size: int

    def __add__(self, more: Pruned) -> Pruned:
        return Pruned(self.packages + more.packages, self.other + more.other, self.size + more.size)


def prune(channel: Path, *, keep: int, dry_run: bool) -> Pruned:
    """Remove all but the ``keep`` newest of each package and variant, old shards and unfinished uploads.

    What a package that stays depends on stays too. The index forgets first, then the files go: a reader with
    the new index misses nothing, and a run killed in between is finished by the next.

    Raises:
        DamagedIndexError: when a form of the index can't be read; nothing is removed then.
    """
    with channels.locked(channel):
        doomed: dict[str, set[str]] = {}
        for subdir in channels.subdirs(channel):
            doomed[subdir] = _superseded(channel, subdir, keep)
        packages = [f"{subdir}/{name}" for subdir in doomed for name in sorted(doomed[subdir])]
        other = _garbage(channel, doomed)
        size = sum((channel / path).stat().st_size for path in [*packages, *other])
        result = Pruned(tuple(packages), tuple(other), size)
        if not dry_run:
            if packages:
                _forget(channel, doomed)
                other = _garbage(channel, doomed)  # The shards of the old index are among it now.
            for path in [*packages, *other]:
                (channel / path).unlink(missing_ok=True)
        return result


def _superseded(channel: Path, subdir: str, keep: int) -> set[str]:
    """Records that ``keep`` newer ones of the same package and variant replace, and nothing kept needs."""
    from rattler.exceptions import InvalidMatchSpecError, InvalidVersionError, InvalidVersionSpecError

    listed = channels.records(channel, subdir, repodata.COMPLETE)
    try:
        return _replaced(listed, keep)
    except (InvalidMatchSpecError, InvalidVersionError, InvalidVersionSpecError) as error:
        raise repodata.DamagedIndexError(
            f"{channel / subdir}/repodata.json", f"lists what is no version or no dependency ({error})"
        ) from error


def _replaced(listed: Records, keep: int) -> set[str]:
    from rattler.version import Version

    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, record in listed.items():
        groups[record.name, _BUILD_TAIL.sub("", record.build)].append(name)

    def age(name: str) -> tuple[Any, int, int]:
        record = listed[name]
        return Version(record.version), record.build_number or 0, record.timestamp or 0

    kept = {name for names in groups.values() for name in sorted(names, key=age)[-keep:]}
    files_by_package: dict[str, list[str]] = defaultdict(list)
    for name, record in listed.items():
        files_by_package[record.name].append(name)
    # What was kept before has all that it needs: only what came in the last round may need more.
    newest = kept
    while newest:
        newest = _needed(newest, kept, listed, files_by_package)
        kept |= newest
    return set(listed) - kept


def _needed(
    newest: set[str], kept: set[str], listed: Records, files_by_package: Mapping[str, Sequence[str]]
) -> set[str]:
    """What ``newest`` depends on: all that satisfies a dependency which nothing of ``kept`` does.

    Args:
        files_by_package: package name -> file names.
    """
    from rattler import MatchSpec
    from rattler.version import Version, VersionSpec

    texts = {text for name in newest for text in listed[name].depends or () if text.split()[:1]}
    required = set()
    for text in texts:
        candidates = files_by_package.get(text.split()[0], ())
        if all(name in kept for name in candidates):
            continue
        version = MatchSpec(text).version
        spec = None if version is None else VersionSpec(str(version))
        fitting = [n for n in candidates if spec is None or spec.matches(Version(listed[n].version))]
        if not kept.intersection(fitting):
            required.update(fitting)
    return required


def _garbage(channel: Path, doomed: dict[str, set[str]]) -> list[str]:
    """Shards that no index names, statements that no package has, unfinished uploads."""
    paths = [f".uploads/{path.name}" for path in channels.unfinished(channel)]
    for subdir in channels.subdirs(channel):
        folder = channel / subdir
        listed = {n: r for n, r in channels.records(channel, subdir).items() if n not in doomed.get(subdir, set())}
        paths += [f"{subdir}/{path.name}" for path in sorted(folder.glob(".*.part"))]
        for path in sorted(folder.glob("*.conda.sigs*")):
            package, _, digest = path.name.partition(".sigs")
            current = listed[package].attestations_sha256 if package in listed else None
            if package not in listed or (digest and digest[1:] != current):
                paths.append(f"{subdir}/{path.name}")
        index = folder / "repodata_shards.msgpack.zst"
        if index.exists():
            live_shards = set(repodata.shard_digests(index.read_bytes(), str(index)).values())
            shards = sorted((folder / "shards").glob("*.msgpack.zst"))
            paths += [f"{subdir}/shards/{p.name}" for p in shards if p.name.partition(".")[0] not in live_shards]
    return paths


def _forget(channel: Path, doomed: dict[str, set[str]]) -> None:
    """Replace the index by one without ``doomed``, while their files are still there."""
    from rattler.index import index_fs

    with _staging(channel) as staging:
        for subdir in channels.subdirs(channel):
            old, new = channel / subdir, staging / subdir
            new.mkdir()
            for path in [*old.glob("*.conda"), *old.glob("*.conda.sigs*")]:
                if path.name.partition(".sigs")[0] not in doomed[subdir]:
                    os.link(path, new / path.name)
            for name in ("repodata.json", "repodata.json.zst"):
                if (old / name).exists():
                    shutil.copyfile(old / name, new / name)
        asyncio.run(index_fs(staging, write_zst=True, write_shards=True))
        for subdir in channels.subdirs(channel):
            new, live = staging / subdir, channel / subdir
            (live / "shards").mkdir(exist_ok=True)
            for shard in (new / "shards").glob("*"):
                shard.replace(live / "shards" / shard.name)
            content = repodata.document((new / "repodata.json").read_bytes(), str(new / "repodata.json"))
            (new / "run_exports.json").write_bytes(repodata.run_exports(content))
            for name in channels.INDEX_FILES:
                files.flush(new / name)
                (new / name).replace(live / name)


@contextmanager
def _staging(channel: Path) -> Iterator[Path]:
    channels.sweep_staging(channel)
    staging = channel / f".prune-{owners.mark()}"
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
