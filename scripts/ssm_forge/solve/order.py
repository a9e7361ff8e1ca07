"""The packages of a lock in the order and under the names that other tools want."""

from __future__ import annotations

from urllib.parse import urlparse

from rattler import MatchSpec, RepoDataRecord

from ssm_forge.manifest.virtual import channel_url
from ssm_forge.solve.lock import LockedEnvironment


def sorted_by_dependency(records: tuple[RepoDataRecord, ...]) -> list[RepoDataRecord]:
    """The records in another order: dependencies before what needs them, by name where there is a choice."""
    by_name = {r.name.normalized: r for r in records}
    ordered: dict[str, RepoDataRecord] = {}

    def visit(name: str, path: frozenset[str]) -> None:
        # conda packages may need each other in a circle (python and pip did).
        if name in ordered or name in path or name not in by_name:
            return
        for needed in dependency_names(by_name[name]):
            visit(needed, path | {name})
        ordered[name] = by_name[name]

    for name in sorted(by_name):
        visit(name, frozenset())
    return list(ordered.values())


def dependency_names(record: RepoDataRecord) -> list[str]:
    """Names of the packages a record needs; what it needs of the machine is left out."""
    names = {str(MatchSpec(d).name.normalized) for d in record.depends}
    return sorted(n for n in names if not n.startswith("__"))


def channel_names(locked: LockedEnvironment) -> list[str]:
    """Channels as people write them: a bare name where that means the same URL, else the URL."""
    names = [(urlparse(url).path.strip("/"), url) for url in locked.channels]
    return [name if name and channel_url(name) == url else url for name, url in names]
