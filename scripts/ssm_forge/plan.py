"""What an installation will do, worked out before anything is done."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ssm_forge import channel as channels
from ssm_forge import (
    compile_costs,
    disks,
    finalize,
    inspection,
    install,
    install_records,
    lock,
    machine,
    manifest,
    policy,
    recipe,
    remote,
    source_workspace,
    variants,
)
from ssm_forge.arch import ArchList, resolve
from ssm_forge.bridge import assemble
from ssm_forge.bridge import interpreter as interpreters
from ssm_forge.bridge.gcc import BundledCompiler
from ssm_forge.build import BuildRequest, channel_urls, choose_jobs, memory_needed
from ssm_forge.build_key import BuildKey
from ssm_forge.errors import IntegrityError, MachineError, NetworkError, UsageError, VerifyError
from ssm_forge.fetch import sha256_of
from ssm_forge.lock import LockedEnvironment
from ssm_forge.lock_sources import SourcePackage
from ssm_forge.paths import Workspace, launcher
from ssm_forge.solver import require_reachable
from ssm_forge.ui import note, say
from ssm_forge.variants import Source, Variant

State = Literal["installed", "in channel", "to build"]


@dataclass(frozen=True)
class Options:
    """What the user asked for; None where the default is wanted.

    Attributes:
        channels: folders, URLs or names of channels to take built packages from, the first that has one wins.
        trust: policy file on signed statements.
        for_this_machine: whether the packages are to run here, and not only to be built here.
    """

    variant: str = variants.DEFAULT_VARIANT
    python: str | None = None
    cuda_arch: str | None = None
    source: Literal["auto", "conda", "bridge"] = "auto"
    prefix: Path | None = None
    jobs: int | None = None
    host_compiler: str = "auto"
    channels: tuple[str, ...] = ()
    trust: Path | None = None
    for_this_machine: bool = True


@dataclass(frozen=True)
class PlannedPackage:
    """One of our packages.

    Attributes:
        state: whether it is installed, only in the channel, or has to be built.
        request: how it is built, or was.
        channel: URL of the channel that it was found in, where that is not the local one.
    """

    state: State
    request: BuildRequest
    channel: str = ""

    @property
    def name(self) -> str:
        return self.request.rendered.name

    @property
    def version(self) -> str:
        return self.request.rendered.version

    @property
    def build(self) -> str:
        return self.request.rendered.build

    @property
    def filename(self) -> str:
        return self.request.filename

    @property
    def spec(self) -> str:
        return f"{self.name} =={self.version} {self.build}"


@dataclass(frozen=True)
class Plan:
    """An installation, ready to be carried out.

    Attributes:
        channels: where packages come from, ours first.
        parts: what the bridge is assembled from, None for source conda.
        locked: the environment of pixi.lock that the kernels are put on, where it has one for this variant and Python.
        download: bytes still to download.
        disk: bytes of disk still needed.
        memory: bytes that the builds may take at most; 0 when nothing is built.
        trust: what packages of which channels must prove.
    """

    variant: Variant
    python: str
    archs: ArchList
    prefix: Path
    channels: tuple[str, ...]
    packages: tuple[PlannedPackage, ...]
    parts: assemble.Parts | None
    jobs: int
    download: int
    disk: int
    memory: int
    trust: tuple[policy.Rule, ...] = ()
    locked: LockedEnvironment | None = None

    @property
    def nothing_to_do(self) -> bool:
        return all(package.state == "installed" for package in self.packages)

    @property
    def to_build(self) -> tuple[PlannedPackage, ...]:
        return tuple(package for package in self.packages if package.state == "to build")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return {
            "variant": self.variant.name,
            "source": self.variant.source,
            "python": self.parts.interpreter.version if self.parts else self.python,
            "cuda": self.variant.cuda,
            "torch": self.variant.torch,
            "host_compiler": f"{self.parts.compiler.origin} {self.parts.compiler.version}" if self.parts else None,
            "cuda_arch": str(self.archs),
            "prefix": str(self.prefix),
            "channels": list(self.channels),
            "packages": [
                {
                    "name": p.name,
                    "version": p.version,
                    "build": p.build,
                    "state": p.state,
                    **({"channel": p.channel} if p.channel else {}),
                }
                for p in self.packages
            ],
            "jobs": self.jobs,
            "download_bytes": self.download,
            "disk_bytes": self.disk,
            "memory_bytes": self.memory,
        }


@dataclass(frozen=True)
class Choice:
    """The row of the build matrix and the Python minor that options come to."""

    variant: Variant
    python: str


def choose(options: Options, workspace: Workspace) -> Choice:
    """Which variant from which source, and which Python, before anything else is looked at.

    Raises:
        UsageError: for a variant or Python that does not exist.
        NetworkError: when only conda channels have the variant, and none can be reached.
    """
    matrix = variants.load(workspace.variants)
    variant = matrix.get(options.variant, _source(options, matrix))
    python = options.python or _default_python(variant, workspace)
    variant.check_python(python)
    return Choice(variant, python)


def make(options: Options, workspace: Workspace, choice: Choice | None = None) -> Plan:
    """Work out the plan.

    Args:
        choice: what ``options`` come to, where the caller knows it already.

    Raises:
        UsageError: for a variant, Python or architecture that does not exist.
        MachineError: when the machine lacks a Python, a compiler, memory or disk.
        NetworkError: when source conda was asked for and can't be reached.
    """
    matrix = variants.load(workspace.variants)
    choice = choice or choose(options, workspace)
    variant, python = choice.variant, choice.python
    archs = resolve(
        options.cuda_arch,
        supported=variant.supported_archs,
        upstream=variant.upstream_archs,
        default=variant.default_archs,
        gpus=[gpu.capability for gpu in machine.gpus()],
    )
    variant.check_archs(archs, matrix)
    if options.for_this_machine:
        _check_gpus(archs)
    prefix = (options.prefix or default_prefix(variant.name, python, workspace)).expanduser().absolute()
    install.check_target(prefix)
    locked = locked_environment(variant, python, workspace)

    offered = remote.channel_urls(options.channels)
    rules = policy.find(options.trust, workspace)
    parts, channel_list = _find_parts(variant, python, options, workspace)
    channel_list = tuple(dict.fromkeys((*offered, *channel_list)))
    key = variant.key(python, archs, compiler=None if parts is None else str(parts.compiler.major))
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
        for name in recipe.PROJECTS
    )
    planned = _with_needs(variant, python, archs, prefix, channel_list, packages, parts, options.jobs, workspace)
    return replace(planned, trust=rules, locked=locked)


@dataclass(frozen=True)
class Origin:
    """Where the parts of a variant come from.

    Attributes:
        channels: channel URLs, ours first.
        parts: what the bridge is assembled from, None for source conda.
    """

    variant: Variant
    python: str
    channels: tuple[str, ...]
    parts: assemble.Parts | None


def origin(options: Options, workspace: Workspace) -> Origin:
    """The variant that ``options`` choose and where its parts come from, without planning a build.

    Raises:
        UsageError, MachineError, NetworkError: as :func:`make`.
    """
    choice = choose(options, workspace)
    parts, channel_list = _find_parts(choice.variant, choice.python, options, workspace)
    return Origin(choice.variant, choice.python, channel_list, parts)


def _find_parts(
    variant: Variant, python: str, options: Options, workspace: Workspace
) -> tuple[assemble.Parts | None, tuple[str, ...]]:
    if variant.source == "conda":
        return None, (*channel_urls([workspace.channel]), *conda_channels(variant, workspace))
    parts = assemble.find_parts(variant, python, options.host_compiler, workspace)
    return parts, channel_urls([workspace.channel, assemble.channel_dir(workspace, variant)])


def _check_gpus(archs: ArchList) -> None:
    """
    Raises:
        UsageError: when a GPU of this machine can't run what would be installed.
    """
    for gpu in machine.gpus():
        if archs.support(gpu.capability) == "none":
            raise UsageError(
                f"this machine's {gpu.name} ({gpu.capability}) can't run kernels made for {archs}.",
                fix="Use --cuda-arch native; to build for another machine, use the build task.",
            )


def default_prefix(variant: str, python: str, workspace: Workspace) -> Path:
    """``.pixi/envs/cu130``, as pixi has it; another Python than that of pixi.toml gets a prefix of its own."""
    suffix = "" if python == manifest_python(variant, workspace) else f"-py{python.replace('.', '')}"
    return workspace.envs / f"{variant}{suffix}"


def manifest_python(variant: str, workspace: Workspace) -> str:
    """The Python of the variant's environment in pixi.toml; of one that pixi.toml lacks, the usual."""
    environment = next((e for e in manifest.load(workspace.manifest).environments if e.name == variant), None)
    return (environment and environment.python) or variants.DEFAULT_PYTHON


def conda_channels(variant: Variant, workspace: Workspace) -> tuple[str, ...]:
    """The channels that pixi.toml names for the variant's environment."""
    return manifest.load(workspace.manifest).environment(variant.name).channels


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

    Empty where the lock has not this build, for other GPUs for example, or is out of step, which is said.
    """
    if not workspace.source_manifest.exists() or not workspace.source_lock.exists():
        return {}
    workspace_of_recipes = manifest.load(workspace.source_manifest)
    environment = next((e for e in workspace_of_recipes.environments if e.name == variant.name), None)
    if environment is None:
        return {}
    if source_workspace.key(workspace_of_recipes, environment) != key:
        return {}
    # Of the others each recipe would be rendered too.
    asked = replace(workspace_of_recipes, environments=(environment,))
    problems = lock.check(asked, workspace.source_lock).get(variant.name, [])
    if problems:
        note(f"recipes/pixi.lock is out of step ({problems[0]}): the builds are solved anew. See '{launcher()} lock'.")
        return {}
    return {source.name: source for source in lock.environment(workspace.source_lock, variant.name).sources}


def _source(options: Options, matrix: variants.Matrix) -> Source:
    offered = matrix.sources(options.variant)
    if not offered:
        return "bridge"  # Matrix.get says that there is no such variant.
    if options.source != "auto":
        return options.source
    if "conda" not in offered:
        return "bridge"
    if conda_reachable():
        return "conda"
    if "bridge" in offered:
        say("No conda channel can be reached: using the bridge (packages assembled from PyPI and Debian).")
        return "bridge"
    raise NetworkError(
        f"variant {options.variant} comes from conda channels, and none can be reached.",
        fix="Check the network, or choose a variant that the bridge has (see variants).",
    )


def conda_reachable() -> bool:
    """Whether conda-forge, or the mirror of it that pixi is configured for, answers within three seconds."""
    try:
        require_reachable(["conda-forge"], seconds=3, public=True)
    except NetworkError:
        return False
    return True


def _default_python(variant: Variant, workspace: Workspace) -> str:
    if variant.source == "conda":
        return variants.DEFAULT_PYTHON if variants.DEFAULT_PYTHON in variant.pythons else variant.pythons[-1]
    preferred = [variants.DEFAULT_PYTHON, *reversed(variant.pythons)]
    for found in (interpreters.available, interpreters.brought):
        here = found(workspace)
        for python in preferred:
            if python in variant.pythons and python in here:
                return python
    # interpreters.choose explains what was found and why it does not do.
    return variants.DEFAULT_PYTHON if variants.DEFAULT_PYTHON in variant.pythons else variant.pythons[-1]


def compiler_of(variant: Variant, parts: assemble.Parts | None, workspace: Workspace) -> tuple[str, Path | None]:
    """What a package is to say of its C++ compiler, where no channel has it: its own words, or its lock."""
    if parts is None:
        return "", None
    if isinstance(parts.compiler, BundledCompiler):
        return "", workspace.bridge_locks / f"debs.gcc-{variant.row['cxx_compiler_version']}.toml"
    said = subprocess.run([parts.compiler.cxx, "--version"], capture_output=True, text=True, check=False).stdout
    return said.partition("\n")[0], None


def _package(request: BuildRequest, prefix: Path, workspace: Workspace, offered: tuple[str, ...]) -> PlannedPackage:
    state: State = "to build"
    found = remote.find(request.filename, offered) if offered else None
    if found is not None:
        state = "installed" if _is_installed(request.filename, found.sha256, prefix) else "in channel"
        return PlannedPackage(state, request, found.channel)
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
    marker = install.read_marker(prefix)
    if marker is None or filename not in marker.packages:
        return False
    record = next((prefix / "conda-meta").glob(f"{filename.removesuffix('.conda')}.json"), None)
    if record is None:
        return False
    found = install_records.records(prefix)[read_name(Path(filename))]
    # A package that was built anew keeps its name.
    if found.sha256 != sha256:
        return False
    return all((prefix / entry.path).exists() for entry in found.paths)


def read_name(package: Path) -> str:
    """The package name in a file name ``NAME-VERSION-BUILD.conda``."""
    return package.name.rsplit("-", 2)[0]


def _with_needs(
    variant: Variant,
    python: str,
    archs: ArchList,
    prefix: Path,
    channel_list: tuple[str, ...],
    packages: tuple[PlannedPackage, ...],
    parts: assemble.Parts | None,
    requested_jobs: int | None,
    workspace: Workspace,
) -> Plan:
    builds = [p for p in packages if p.state == "to build"]
    needs_environment = any(p.state != "installed" for p in packages)
    download, disk = 0, 0
    jobs, memory = 0, 0
    if builds:
        check_build_folder(workspace)
        costs = compile_costs.load(workspace, [p.name for p in builds])
        jobs = choose_jobs(requested_jobs, costs)
        memory = memory_needed(jobs, costs)
    if needs_environment:
        taken = disks.packages(variant, parts, workspace)
        wanted = disks.needs(taken, prefix, len(builds), len(archs.sass), workspace)
        disks.check(wanted)
        download, disk = taken.download, sum(need.bytes for need in wanted)
    return Plan(
        variant=variant,
        python=python,
        archs=archs,
        prefix=prefix,
        channels=channel_list,
        packages=packages,
        parts=parts,
        jobs=jobs,
        download=download,
        disk=disk,
        memory=memory,
    )


def check_build_folder(workspace: Workspace) -> None:
    """
    Raises:
        MachineError: when compiling in the cache would fail: torch splits the command of the compiler at spaces. A link
            does not help, because the engine follows it.
    """
    if any(character.isspace() for character in str(workspace.cache)):
        raise MachineError(
            f"packages are built in the cache, and its path '{workspace.cache}' has a space, at which torch's build "
            "tools split the compiler's path.",
            fix="Set SSM_FORGE_CACHE_DIR to a folder without a space in its path.",
        )


def jit_note(plan: Plan) -> str:
    """What to tell a user whose GPU would compile the kernels on first use; empty when none would."""
    slow = [gpu for gpu in machine.gpus() if plan.archs.support(gpu.capability) == "jit"]
    if slow:
        return (
            f"{slow[0].name} ({slow[0].capability}) has no machine code in {plan.archs}: its driver compiles the "
            "PTX at the first forward and backward, which takes minutes. --cuda-arch native avoids that."
        )
    if plan.archs.ptx and not machine.gpus():
        majors = ", ".join(dict.fromkeys(f"{c.major}.x" for c in plan.archs.sass))
        return (
            f"No GPU was seen; the kernels are made for {plan.archs}: native on {majors} from these on. A newer "
            "GPU compiles the PTX at the first forward and backward, which takes minutes; name yours with "
            "--cuda-arch to avoid that."
        )
    return ""
