"""Packages from source, solved as pixi 0.77 solves them: what they are built with, and what they will need to run.

The compilers come first; what they export (``libgcc`` of gcc, say) joins what the package is linked to, and all that
is exported joins what the recipe says that the package needs. The order of those needs is pixi's too, for it is part
of the lock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rattler import MatchSpec, RepoDataRecord

from ssm_forge.base.errors import UsageError
from ssm_forge.base.paths import launcher
from ssm_forge.manifest.environments import Manifest, SourceSpec
from ssm_forge.manifest.recipe import Rendered, render_file, requirements
from ssm_forge.solve import run_exports
from ssm_forge.solve.lock_sources import SourcePackage
from ssm_forge.solve.pixi_identity import identity
from ssm_forge.solve.run_exports import RunExports
from ssm_forge.solve.solver import Request, solve_in_order

_Needs = dict[str, dict[tuple[str, str], None]]


@dataclass(frozen=True)
class Found:
    """A source dependency, and the manifest that names it."""

    spec: SourceSpec
    manifest: Manifest

    @property
    def recipe(self) -> Path:
        return self.manifest.path.parent / self.spec.path / "recipe.yaml"


@dataclass(frozen=True)
class SolvedSource:
    """A package from source, and the entry that an index would have of it.

    Attributes:
        exports: URL of a package that its recipe names -> what that adds to the needs of this one.
    """

    package: SourcePackage
    filename: str
    entry: Mapping[str, Any]
    exports: Mapping[str, RunExports]


def solve_sources(
    found: Sequence[Found], variants: Mapping[str, Sequence[str]], request: Request
) -> tuple[SolvedSource, ...]:
    """Solve what each package is built with.

    Args:
        variants: the keys of the build matrix, as the manifest has them for the platform.
        request: of the environment that the packages are for: its channels, machine and snapshot.

    Raises:
        SolveError, NetworkError: as :func:`ssm_forge.solve.solver.solve`.
        BuildError: when a recipe does not render.
        UsageError: when a recipe is missing, or a key has not exactly one value.
    """
    several = [key for key, values in variants.items() if len(values) != 1]
    if several and found:
        raise UsageError(f"{found[0].manifest.path} gives {several[0]} not one value, which can't be locked here.")
    return tuple(_solve_source(source, variants, request) for source in found)


@dataclass(frozen=True)
class Stated:
    """What a recipe says for one row of the build matrix, before anything is solved.

    Attributes:
        variants: the keys that it uses.
        build, host, run: its requirements.
    """

    variants: Mapping[str, str]
    build: tuple[str, ...]
    host: tuple[str, ...]
    run: tuple[str, ...]


def stated(source: Found, variants: Mapping[str, Sequence[str]]) -> Stated:
    """What a recipe asks for, rendered with these variants.

    Raises:
        BuildError: when the recipe does not render.
        UsageError: when it is missing.
    """
    rendered = _render(source, variants)
    wanted = requirements(rendered)
    run = tuple(str(MatchSpec(text)) for text in wanted["run"])
    return Stated(dict(rendered.engine.variant), wanted["build"], wanted["host"], run)


def with_sources(request: Request, sources: Sequence[SolvedSource]) -> Request:
    """The request for the environment itself, packages from source among it."""
    if not sources:
        return request
    names = tuple(source.package.name for source in sources)
    return replace(request, specs=(*request.specs, *names), extra={s.filename: s.entry for s in sources})


def _render(source: Found, variants: Mapping[str, Sequence[str]]) -> Rendered:
    if not source.recipe.is_file():
        raise UsageError(
            f"{source.manifest.path} names {source.spec.name} at '{source.spec.path}', and {source.recipe} does not "
            "exist.",
            fix=f"'{launcher()} lock' writes recipes/pixi.toml anew.",
        )
    return render_file(source.recipe, {key: list(values) for key, values in variants.items()})


def _solve_source(source: Found, variants: Mapping[str, Sequence[str]], request: Request) -> SolvedSource:
    rendered = _render(source, variants)
    wanted = requirements(rendered)
    build = _environment(rendered, "build", wanted["build"], request)
    build_exports = _exports(build, wanted["build"], request.snapshot)
    strong = [text for exported in build_exports.values() for text in exported.strong]
    limits = [text for exported in build_exports.values() for text in exported.strong_constrains]
    host = _environment(rendered, "host", (*wanted["host"], *strong), request, limits)
    host_exports = _exports(host, wanted["host"], request.snapshot)
    depends = _needs(wanted["run"], build_exports, host_exports, "strong", "weak")
    limits_of_mine = rendered.engine.recipe.requirements.to_dict().get("run_constraints", [])
    constrains = _needs(limits_of_mine, build_exports, host_exports, "strong_constrains", "weak_constrains")
    package = SourcePackage(
        name=rendered.name,
        identity=identity(
            source.spec.path,
            variants=rendered.engine.variant,
            build_packages=[r.url for r in build],
            host_packages=[r.url for r in host],
            version=rendered.version,
            build=rendered.build,
            build_number=rendered.build_number,
            subdir=request.subdir,
            depends=depends,
            constrains=constrains,
        ),
        place=source.spec.path,
        variants=dict(rendered.engine.variant),
        depends=depends,
        constrains=constrains,
        license=str(rendered.engine.recipe.about.license or ""),
        build=tuple(build),
        host=tuple(host),
    )
    entry = {
        "name": rendered.name,
        "version": rendered.version,
        "build": rendered.build,
        "build_number": rendered.build_number,
        "depends": list(depends),
        "constrains": list(constrains),
        "subdir": request.subdir,
    }
    urls = {r.name.normalized: r.url for r in build}, {r.name.normalized: r.url for r in host}
    exports = {
        names[name]: exported
        for names, found in zip(urls, (build_exports, host_exports), strict=True)
        for name, exported in found.items()
    }
    return SolvedSource(package, rendered.filename, entry, exports)


def _environment(
    rendered: Rendered, kind: str, specs: Sequence[str], request: Request, constraints: Sequence[str] = ()
) -> list[RepoDataRecord]:
    """In the order of the solver's answer, which the order of needs follows."""
    if not specs:
        return []
    purpose = f"the {kind} environment of {rendered.name}, for {request.purpose}"
    return solve_in_order(replace(request, specs=tuple(specs), constraints=tuple(constraints), purpose=purpose))


def _exports(records: Sequence[RepoDataRecord], wanted: Sequence[str], snapshot: Path | None) -> dict[str, RunExports]:
    """What the packages that a recipe names export; not what only came along with them."""
    named = {MatchSpec(text).name.normalized for text in wanted}
    direct = [r for r in records if r.name.normalized in named]
    return run_exports.of(direct, snapshot)


def _needs(
    run: Sequence[str], build: Mapping[str, RunExports], host: Mapping[str, RunExports], strong: str, weak: str
) -> tuple[str, ...]:
    """By name, in the order in which names come up; a need that two packages export is there twice."""
    found: _Needs = {}

    def add(text: str, origin: str) -> None:
        spec = MatchSpec(text)
        found.setdefault(spec.name.normalized, {})[str(spec), origin] = None

    for text in run:
        add(text, "")
    for kind, exports, strength in (("host", host, strong), ("build", build, strong), ("host", host, weak)):
        for name, exported in exports.items():
            for text in getattr(exported, strength):
                add(text, f"{kind} {name}")
    return tuple(text for specs in found.values() for text, _ in specs)
