"""From options to a plan: what an installation will do, worked out before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssm_forge.base import machine, platforms
from ssm_forge.base.errors import IntegrityError, UsageError, VerifyError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.platforms import Platform
from ssm_forge.base.ui import note, say
from ssm_forge.build import finalize
from ssm_forge.build import origin as build_origin
from ssm_forge.build.origin import Origin, choose_source, compiler_of, default_python
from ssm_forge.build.request import BuildRequest
from ssm_forge.channel import folder as channels
from ssm_forge.channel import others as remote
from ssm_forge.channel import policy
from ssm_forge.flow.needs import choose_archs, with_needs
from ssm_forge.flow.plan import Choice, Options, Plan, PlannedPackage, State
from ssm_forge.install import marker as install_marker
from ssm_forge.install import pixi
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest import recipe, source_workspace, variants
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.variants import Variant
from ssm_forge.package import installed as package_installed
from ssm_forge.package import kernels as package_kernels
from ssm_forge.package import read as inspection
from ssm_forge.package.kernels import Kernels
from ssm_forge.solve import lock
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.lock_sources import SourcePackage


def choose(options: Options, workspace: Workspace) -> Choice:
    """The variant, its source and the Python that options come to, before anything else is looked at.

    Raises:
        UsageError: for a variant or Python that does not exist.
        NetworkError: when only conda channels have the variant, and none can be reached.
    """
    matrix = variants.load(workspace.variants)
    platform = platforms.of(options.platform) if options.platform else platforms.here()
    source = choose_source(options.variant, options.source, matrix, options.python, workspace, platform)
    variant = matrix.get(options.variant, source)
    variant.check_platform(platform)
    python = options.python or default_python(variant, workspace, platform)
    variant.check_python(python)
    return Choice(variant, python, platform)


def make(
    options: Options,
    workspace: Workspace,
    choice: Choice | None = None,
    projects: Sequence[str] = recipe.PROJECTS,
) -> Plan:
    """Work out the plan of an installation, without doing anything.

    Args:
        choice: what ``options`` come to, where the caller knows it already.
        projects: those of ours that are wanted; none where something else is built, which counts its own needs.

    Raises:
        UsageError: for a variant, Python or architecture that does not exist.
        MachineError: when the machine lacks a Python, a compiler, memory or disk.
        InstallError: when no environment can be made in the prefix.
        VerifyError: when pixi.lock is not what pixi.toml asks for.
        NetworkError: when source conda was asked for and can't be reached.
    """
    # Long: the questions of a plan in their order, each of which needs the answers before it.
    matrix = variants.load(workspace.variants)
    choice = choice or choose(options, workspace)
    variant, python, platform = choice.variant, choice.python, choice.platform
    archs = choose_archs(
        variant,
        options.cuda_arch,
        machine.gpus() if platform == platforms.known_here() else (),
        require=lambda archs: variant.check_archs(archs, matrix),
        instead="Use --cuda-arch native; to build for another machine, use the build task."
        if options.for_this_machine
        else None,
    )
    own = default_prefix(variant.name, python, workspace, options.kernels, platform)
    prefix = (options.prefix or own).expanduser().absolute()
    check_platform_of(prefix, platform)
    install_marker.check_target(prefix)
    pixi.check_not_its_own(prefix, workspace)
    locked = locked_environment(variant, python, workspace)

    offered = remote.channel_urls(options.channels)
    rules = policy.find(options.trust, workspace)
    variant_origin = build_origin.origin(variant, python, options.host_compiler, workspace, platform)
    parts, channel_list = variant_origin.parts, tuple(dict.fromkeys((*offered, *variant_origin.channels)))
    major = None if parts is None else str(parts.compiler.major)
    key = variant.key(python, archs, compiler=major, kernels=options.kernels, platform=platform)
    compiler = compiler_of(variant, parts, workspace)
    sources = locked_sources(variant, key, workspace) if locked is not None else {}
    beside = locked.records if locked is not None and sources else ()
    packages = tuple(
        _package(
            BuildRequest(
                recipe.render(name, key, workspace),
                key,
                channel_list,
                *compiler,
                locked=sources.get(name),
                beside=beside,
            ),
            prefix,
            workspace,
            offered,
        )
        for name in projects
    )
    facts = (variant, python, archs, prefix, channel_list, packages, parts)
    work = Plan(*facts, trust=rules, locked=locked, platform=platform)
    return with_needs(work, options.jobs, workspace)


def check_platform_of(prefix: Path, platform: Platform) -> None:
    """Refuse an environment of another platform.

    Raises:
        UsageError: naming both.
    """
    found = platforms.of_program(prefix / "bin/python")
    if found is not None and found != platform:
        name = found if isinstance(found, str) else found.subdir
        raise UsageError(
            f"{prefix} is an environment for {name}, and the packages are for {platform.subdir}.",
            fix="Name another folder with --prefix, or the platform of this one with --platform.",
        )


def origin(options: Options, workspace: Workspace) -> Origin:
    """The variant that ``options`` choose and where its parts come from, without planning a build.

    Raises:
        UsageError, MachineError, NetworkError: as :func:`make`.
    """
    choice = choose(options, workspace)
    return build_origin.origin(choice.variant, choice.python, options.host_compiler, workspace, choice.platform)


def default_prefix(
    variant: str,
    python: str,
    workspace: Workspace,
    kernels: Kernels = package_kernels.DEFAULT,
    platform: Platform | None = None,
) -> Path:
    """The prefix of a variant where nobody names one: ``.pixi/envs/cu130``, with ``-py311`` for another Python.

    Upstream's kernels have ``-upstream`` after that, and another platform its name, ``-linux-aarch64``.

    Where that is an environment of pixi's, which knows nothing of the kernels, they get one beside it.
    """
    suffix = "" if python == manifest_python(variant, workspace) else f"-py{python.replace('.', '')}"
    suffix += "" if kernels == package_kernels.DEFAULT else f"-{kernels}"
    if platform not in (None, platforms.known_here()):
        suffix += f"-{platform.subdir}"
    return pixi.prefix_for_kernels(workspace.envs / f"{variant}{suffix}", workspace)


def manifest_python(variant: str, workspace: Workspace) -> str:
    """The Python of the variant's environment in pixi.toml; of one that pixi.toml lacks, the usual."""
    environment = next((e for e in manifest.load(workspace.manifest).environments if e.name == variant), None)
    return (environment and environment.python) or variants.DEFAULT_PYTHON


def locked_environment(variant: Variant, python: str, workspace: Workspace) -> LockedEnvironment | None:
    """The environment of pixi.lock for a variant from conda, None where it has another Python.

    Raises:
        UsageError: when there is no lock.
        VerifyError: when the lock is not what pixi.toml asks for.
    """
    if variant.source != "conda" or python != manifest_python(variant.name, workspace):
        return None
    problems = lock.check(manifest.load(workspace.manifest), workspace.lock).get(variant.name, [])
    if problems:
        raise VerifyError(
            f"{workspace.lock.name} does not fit {workspace.manifest.name}: environment {problems[0]}.",
            fix=f"Run '{launcher()} lock'.",
        )
    return lock.environment(workspace.lock, variant.name)


def locked_sources(variant: Variant, key: BuildKey, workspace: Workspace) -> dict[str, SourcePackage]:
    """What recipes/pixi.lock says that the kernels are built with: package name -> its entry.

    The compilers are the same for every GPU and for upstream's kernels. Empty where the lock has not this build, for
    another Python for example, or is out of step, which is said.
    """
    if not workspace.source_manifest.exists() or not workspace.source_lock.exists():
        return {}
    workspace_of_recipes = manifest.load(workspace.source_manifest)
    environment = next((e for e in workspace_of_recipes.environments if e.name == variant.name), None)
    if environment is None:
        return {}
    locked_key = source_workspace.key(workspace_of_recipes, environment)
    if locked_key is None or locked_key.toolchain != key.toolchain:
        return {}
    # Of the others each recipe would be rendered too.
    asked = replace(workspace_of_recipes, environments=(environment,))
    problems = lock.check(asked, workspace.source_lock).get(variant.name, [])
    if problems:
        note(f"recipes/pixi.lock is out of step ({problems[0]}): the builds are solved anew. See '{launcher()} lock'.")
        return {}
    return {source.name: source for source in lock.environment(workspace.source_lock, variant.name).sources}


def _package(request: BuildRequest, prefix: Path, workspace: Workspace, offered: tuple[str, ...]) -> PlannedPackage:
    state: State = "to build"
    offer = remote.find(request.filename, offered, request.key.platform.subdir) if offered else None
    if offer is not None:
        state = "installed" if _is_installed(request.filename, offer.sha256, prefix) else "in channel"
        return PlannedPackage(state, request, offer.channel)
    held = channels.find(workspace.channel, request.filename)
    if held is not None and is_current(held, request.project, workspace):
        state = "installed" if _is_installed(held.name, sha256_of(held), prefix) else "in channel"
    return PlannedPackage(state, request)


def is_current(package: Path, name: str, workspace: Workspace) -> bool:
    """Whether the package was built from the recipe and patches as they are now."""
    try:
        made_from = inspection.provenance(package)
    except IntegrityError as error:
        say(f"{error} It is built anew.")
        return False
    current = (finalize.FORMAT, recipe.digest(name, workspace))
    return (made_from.get("format"), made_from.get("recipe_sha256")) == current


def _is_installed(filename: str, sha256: str, prefix: Path) -> bool:
    marker = install_marker.read_marker(prefix)
    if marker is None or filename not in marker.packages:
        return False
    record = next((prefix / "conda-meta").glob(f"{filename.removesuffix('.conda')}.json"), None)
    if record is None:
        return False
    installed = package_installed.records(prefix)[read_name(Path(filename))]
    # A package that was built anew keeps its name.
    if installed.sha256 != sha256:
        return False
    return all((prefix / entry.path).exists() for entry in installed.paths)


def read_name(package: Path) -> str:
    """The package name in a file name ``NAME-VERSION-BUILD.conda``."""
    return package.name.rsplit("-", 2)[0]
