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
class SourceDependency:
    """A package that a manifest wants built from a recipe, and that manifest."""

    spec: SourceSpec
    manifest: Manifest

    @property
    def recipe(self) -> Path:
        """The recipe's file, which need not exist."""
        return self.manifest.path.parent / self.spec.path / "recipe.yaml"


@dataclass(frozen=True)
class SolvedSource:
    """A package from source, and the entry that an index would have of it.

    Attributes:
        filename: of the package that the recipe makes.
        entry: as in a repodata.json.
        exports: URL of a package that its recipe names -> what that adds to the needs of this one.
    """

    package: SourcePackage
    filename: str
    entry: Mapping[str, Any]
    exports: Mapping[str, RunExports]


def solve_sources(
    dependencies: Sequence[SourceDependency], variants: Mapping[str, Sequence[str]], request: Request
) -> tuple[SolvedSource, ...]:
    """Solve what each package from source is built with, and what it will need to run.

    Args:
        variants: the keys of the build matrix, as the manifest has them for the platform.
        request: of the environment that the packages are for: its channels, machine and snapshot.

    Raises:
        SolveError, NetworkError: as :func:`ssm_forge.solve.solver.solve`.
        BuildError: when a recipe does not render.
        UsageError: when a recipe is missing, or a key has not exactly one value.
    """
    ambiguous = [key for key, values in variants.items() if len(values) != 1]
    if ambiguous and dependencies:
        raise UsageError(
            f"{dependencies[0].manifest.path} gives {ambiguous[0]} not one value, which can't be locked here."
        )
    return tuple(_solve_source(source, variants, request) for source in dependencies)


@dataclass(frozen=True)
class RecipeRequirements:
    """What a recipe says for one row of the build matrix, before anything is solved.

    Attributes:
        variants: the keys of the build matrix that it uses, with their values.
        build, host, run: its requirements, as match specs.
    """

    variants: Mapping[str, str]
    build: tuple[str, ...]
    host: tuple[str, ...]
    run: tuple[str, ...]


def recipe_requirements(source: SourceDependency, variants: Mapping[str, Sequence[str]]) -> RecipeRequirements:
    """What a recipe asks for, rendered with ``variants`` (key of the build matrix -> its values).

    Raises:
        BuildError: when the recipe does not render.
        UsageError: when the recipe is missing.
    """
    rendered = _render(source, variants)
    needs = requirements(rendered)
    run = tuple(str(MatchSpec(text)) for text in needs["run"])
    return RecipeRequirements(dict(rendered.engine.variant), needs["build"], needs["host"], run)


def with_sources(request: Request, sources: Sequence[SolvedSource]) -> Request:
    """The request for the environment itself, with the packages from source among its specs."""
    if not sources:
        return request
    names = tuple(source.package.name for source in sources)
    return replace(request, specs=(*request.specs, *names), extra={s.filename: s.entry for s in sources})


def _render(source: SourceDependency, variants: Mapping[str, Sequence[str]]) -> Rendered:
    if not source.recipe.is_file():
        raise UsageError(
            f"{source.manifest.path} names {source.spec.name} at '{source.spec.path}', and {source.recipe} does not "
            "exist.",
            fix=f"'{launcher()} lock' writes recipes/pixi.toml anew.",
        )
    return render_file(source.recipe, {key: list(values) for key, values in variants.items()})


def _solve_source(source: SourceDependency, variants: Mapping[str, Sequence[str]], request: Request) -> SolvedSource:
    rendered = _render(source, variants)
    needs = requirements(rendered)
    build = _environment(rendered, "build", needs["build"], request)
    build_exports = _exports(build, needs["build"], request.snapshot)
    strong = [text for exported in build_exports.values() for text in exported.strong]
    limits = [text for exported in build_exports.values() for text in exported.strong_constrains]
    host = _environment(rendered, "host", (*needs["host"], *strong), request, limits)
    host_exports = _exports(host, needs["host"], request.snapshot)
    depends = _needs(needs["run"], build_exports, host_exports, "strong", "weak")
    own_limits = rendered.engine.recipe.requirements.to_dict().get("run_constraints", [])
    constrains = _needs(own_limits, build_exports, host_exports, "strong_constrains", "weak_constrains")
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
        location=source.spec.path,
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
        for names, by_name in zip(urls, (build_exports, host_exports), strict=True)
        for name, exported in by_name.items()
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


def _exports(records: Sequence[RepoDataRecord], specs: Sequence[str], snapshot: Path | None) -> dict[str, RunExports]:
    """What the packages that a recipe names export; not what only came along with them."""
    named = {MatchSpec(text).name.normalized for text in specs}
    direct = [r for r in records if r.name.normalized in named]
    return run_exports.of(direct, snapshot)


def _needs(
    run: Sequence[str], build: Mapping[str, RunExports], host: Mapping[str, RunExports], strong: str, weak: str
) -> tuple[str, ...]:
    """Match specs by name, in the order in which names come up; a need that two packages export is there twice."""
    specs_by_name: _Needs = {}

    def add(text: str, origin: str) -> None:
        spec = MatchSpec(text)
        specs_by_name.setdefault(spec.name.normalized, {})[str(spec), origin] = None

    for text in run:
        add(text, "")
    for kind, exports, strength in (("host", host, strong), ("build", build, strong), ("host", host, weak)):
        for name, exported in exports.items():
            for text in getattr(exported, strength):
                add(text, f"{kind} {name}")
    return tuple(text for specs in specs_by_name.values() for text, _ in specs)
