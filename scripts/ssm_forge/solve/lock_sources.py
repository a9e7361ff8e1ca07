"""Packages from source in a lock's text: pixi writes them, and the engine's Python side neither makes nor tells them.

So they are taken out of the text before the engine reads it, and put in after it has written it. What they are built
with is given to the engine as environments of its own, which no lock has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import yaml
from rattler import RepoDataRecord

from ssm_forge.solve.run_exports import RunExports

Kind = Literal["build", "host"]
KINDS: tuple[Kind, ...] = ("build", "host")

_ENTRY = re.compile(r"^- conda_source: .+\n(?:  .*\n)*", re.MULTILINE)
_LISTED = re.compile(r"^      - conda_source: (.+)\n", re.MULTILINE)
_SELECTOR = re.compile(r"(?P<name>[^\[\]]+)\[(?P<identity>[^\[\]]+)\] @ (?P<location>.+)")
_PLATFORM = re.compile(r"^- name: (.+)$", re.MULTILINE)
_STAND_IN = "built-with-"


@dataclass(frozen=True)
class SourcePackage:
    """One package that is built from a recipe, as a lock has it.

    Attributes:
        identity: what tells it from others of the same recipe.
        location: folder of the recipe, relative to the lock, or the address of a git repository.
        variants: the keys of the build matrix that the recipe used.
        depends, constrains: what it will need to run, what its compilers add to that included.
        build, host: the packages it is built with: compilers, and what it is linked to.
    """

    name: str
    identity: str
    location: str
    variants: Mapping[str, str] = field(default_factory=dict)
    depends: tuple[str, ...] = ()
    constrains: tuple[str, ...] = ()
    license: str = ""
    build: tuple[RepoDataRecord, ...] = ()
    host: tuple[RepoDataRecord, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}[{self.identity}] @ {self.location}"

    def built_with(self, kind: Kind) -> tuple[RepoDataRecord, ...]:
        """The records of its build or host environment."""
        return self.build if kind == "build" else self.host


def stand_in(number: int, kind: Kind) -> str:
    """The name of the environment that the engine gets for what package ``number`` is built with."""
    return f"{_STAND_IN}{number}-{kind}"


def is_stand_in(environment: str) -> bool:
    """Whether an environment's name is one that :func:`stand_in` gave."""
    return environment.startswith(_STAND_IN)


class SolvedFor(NamedTuple):
    """Names of an environment and of a platform that it is solved for, as a lock has them."""

    environment: str
    platform: str


@dataclass(frozen=True)
class Parted:
    """A lock's text, parted into what the engine reads and its packages from source.

    Attributes:
        engine: the text that the engine reads.
        entries: packages from source, each as the lock has it; their indices are the numbers of :func:`stand_in`.
        listed: environment on a platform -> selectors of its packages from source.
    """

    engine: str
    entries: tuple[dict[str, Any], ...]
    listed: Mapping[SolvedFor, tuple[str, ...]]


def part(text: str) -> Parted:
    """A lock's text without its packages from source, and those packages.

    Raises:
        ValueError: when packages from source are written otherwise than pixi writes them.
    """
    blocks = _ENTRY.findall(text)
    if text.count("conda_source: ") != len(blocks) + len(_LISTED.findall(text)):
        raise ValueError("its packages from source are not written as pixi writes them")
    if not blocks:
        return Parted(text, (), {})
    entries = tuple(_load(block) for block in blocks)
    listed = _listed(text)
    selectors_with_entry = {entry["conda_source"] for entry in entries}
    missing = [
        selector for selectors in listed.values() for selector in selectors if selector not in selectors_with_entry
    ]
    if missing:
        raise ValueError(f"it has no entry for {missing[0]}")
    rest = _LISTED.sub("", _ENTRY.sub("", text))
    rest = re.sub(r"^(packages:)\n(?!-)", r"\1 []\n", rest, flags=re.MULTILINE)
    rest = re.sub(r"^(      \S.*:)\n(?!      -)", r"\1 []\n", rest, flags=re.MULTILINE)
    platforms = _PLATFORM.findall(text)
    if not platforms:
        raise ValueError("it names no platform")
    stand_ins = [
        f"  {stand_in(number, kind)}:\n    channels: []\n    packages:\n      {platforms[0]}:\n{lines}"
        for number, entry in enumerate(entries)
        for kind in KINDS
        if (lines := "".join(f"      - {line}\n" for line in _selectors(entry, kind)))
    ]
    return Parted(
        re.sub(r"^environments:\n", lambda m: m.group(0) + "".join(stand_ins), rest, flags=re.MULTILINE),
        entries,
        listed,
    )


def _load(block: str) -> dict[str, Any]:
    try:
        (entry,) = yaml.load(block, yaml.CSafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"a package from source is no YAML ({error})") from error
    if not isinstance(entry, dict) or not _SELECTOR.fullmatch(str(entry.get("conda_source"))):
        raise ValueError("a package from source has no name, identity and place")
    return entry


def _selectors(entry: Mapping[str, Any], kind: Kind) -> list[str]:
    packages = entry.get(f"{kind}_packages", [])
    if not isinstance(packages, list) or not all(isinstance(item, dict) for item in packages):
        raise ValueError(f"{entry['conda_source']} has no list of {kind} packages")
    other = [item for item in packages if set(item) != {"conda"}]
    if other:
        raise ValueError(f"{entry['conda_source']} is built with a package that is built from source itself")
    return [f"conda: {item['conda']}" for item in packages]


def _listed(text: str) -> dict[SolvedFor, tuple[str, ...]]:
    selectors: dict[SolvedFor, tuple[str, ...]] = {}
    environment = platform = ""
    for line in text.splitlines():
        if match := re.match(r"^  (\S.*):$", line):
            environment = match.group(1)
        elif match := re.match(r"^      (\S.*):$", line):
            platform = match.group(1)
        elif match := _LISTED.match(f"{line}\n"):
            solved_for = SolvedFor(environment, platform)
            selectors[solved_for] = (*selectors.get(solved_for, ()), match.group(1))
    return selectors


def package(entry: Mapping[str, Any], built_with: Callable[[Kind], Sequence[RepoDataRecord]]) -> SourcePackage:
    """One package from source, from its entry in the lock.

    Raises:
        ValueError: when a field is not of its type.
    """
    selector = _SELECTOR.fullmatch(entry["conda_source"])
    assert selector is not None
    variants = entry.get("variants", {})
    texts = [entry.get(key, []) for key in ("depends", "constrains")]
    if not isinstance(variants, dict) or not all(isinstance(value, list) for value in texts):
        raise ValueError(f"{entry['conda_source']} has fields of another kind")
    return SourcePackage(
        name=selector["name"],
        identity=selector["identity"],
        location=selector["location"],
        variants={str(key): str(value) for key, value in variants.items()},
        depends=tuple(map(str, texts[0])),
        constrains=tuple(map(str, texts[1])),
        license=str(entry.get("license", "")),
        build=tuple(built_with("build")),
        host=tuple(built_with("host")),
    )


def join(
    engine: str,
    packages: Iterable[SourcePackage],
    listed: Mapping[SolvedFor, Sequence[SourcePackage]],
    exports: Mapping[str, RunExports],
) -> str:
    """The lock's text from what the engine wrote, with stand-ins for what ``packages`` are built with.

    Args:
        listed: environment on a platform -> its packages from source.
        exports: URL -> what the package there exports; those that came out of a lock have it already.
    """
    text = re.sub(rf"^  {_STAND_IN}\S+:\n(?:    .*\n)*", "", engine, flags=re.MULTILINE)
    for (environment, platform), sources in listed.items():
        text = _with_sources(text, environment, platform, sources)
    text = re.sub(r"^- conda: (.+)\n(?:  .*\n)*", lambda entry: _with_exports(entry, exports), text, flags=re.MULTILINE)
    unique = {str(source): source for source in packages}
    entries = "".join(_entry(unique[selector]) for selector in sorted(unique))
    return re.sub(r"^packages: \[\]$", "packages:", text, flags=re.MULTILINE) + entries


def _with_sources(text: str, environment: str, platform: str, sources: Sequence[SourcePackage]) -> str:
    lines = "".join(f"      - conda_source: {source}\n" for source in sorted(sources, key=str))
    block = re.search(rf"^  {re.escape(environment)}:\n(?:    .*\n)*", text, re.MULTILINE)
    assert block is not None
    old = block.group(0)
    new = old.replace("    packages: {}\n", f"    packages:\n      {platform}:\n")
    new = re.sub(
        rf"^      {re.escape(platform)}:\n(?:      - .*\n)*", lambda m: m.group(0) + lines, new, flags=re.MULTILINE
    )
    return text.replace(old, new, 1)


def _with_exports(entry: re.Match[str], exports: Mapping[str, RunExports]) -> str:
    """A package's entry with what it exports, which is found between its license and its size."""
    text, exported = entry.group(0), exports.get(entry.group(1))
    if exported is None or "\n  run_exports:" in text:
        return text
    lines = _dump({"run_exports": exported.lists()}).splitlines()
    next_field = re.search(r"^  (size|legacy_bz2_size|timestamp|python_site_packages_path):", text, re.MULTILINE)
    at = next_field.start() if next_field else len(text)
    return text[:at] + "".join(f"  {line}\n" for line in lines) + text[at:]


def _entry(source: SourcePackage) -> str:
    content: dict[str, Any] = {"conda_source": str(source), "variants": dict(sorted(source.variants.items()))}
    content |= {key: list(value) for key in ("depends", "constrains") if (value := getattr(source, key))}
    content |= {"license": source.license} if source.license else {}
    for kind in KINDS:
        if records := source.built_with(kind):
            content[f"{kind}_packages"] = [{"conda": url} for url in sorted(r.url for r in records)]
    return _dump([content])


def _dump(content: Any) -> str:
    return yaml.dump(content, Dumper=yaml.CSafeDumper, sort_keys=False, width=10**9, allow_unicode=True)
