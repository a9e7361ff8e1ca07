"""What a variant's bridge is made from: the locks and this machine are looked at, nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from ssm_forge.base import platforms
from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.fetch import Artifact
from ssm_forge.base.machine import glibc
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.bridge import compiler as host
from ssm_forge.bridge import debian, gcc, pylock, thin
from ssm_forge.bridge import interpreter as interpreters
from ssm_forge.bridge.toolkit_parts import ToolkitParts
from ssm_forge.manifest.variants import Variant

# What a build runs of Python's packages; where it is for another platform, they are this machine's.
_BUILD_TOOLS = frozenset({"ninja", "packaging", "pip", "setuptools", "typing-extensions", "wheel"})


@dataclass(frozen=True)
class BuildTools:
    """What of this machine's platform a build for another one runs, beside the cross compiler.

    Attributes:
        interpreter: a Python of the same minor.
        compiler: of programs that run here.
        wheels: Python packages that build.
    """

    interpreter: interpreters.Interpreter
    compiler: host.HostCompiler | gcc.BundledCompiler
    wheels: tuple[pylock.LockedWheel, ...]


@dataclass(frozen=True)
class Parts:
    """What a variant's bridge is made from on this machine, before anything is downloaded.

    Attributes:
        interpreter: the Python that is copied, from the machine or from Debian packages.
        compiler: the C++ compiler: one of the machine's that is pointed at, or one that is brought.
        wheels: Python packages, torch among them.
        toolkit: the CUDA toolkit.
        there: the torch of somebody's environment, where it is that one; the wheels are then a build's tools.
        platform: what the variant's packages are for.
        cross: what runs here in a build for another platform; None where the platform is this machine's.
    """

    variant: Variant
    interpreter: interpreters.Interpreter
    compiler: host.HostCompiler | gcc.BundledCompiler
    wheels: tuple[pylock.LockedWheel, ...]
    toolkit: ToolkitParts
    there: thin.There | None = None
    platform: Platform = LINUX_64
    cross: BuildTools | None = None

    @property
    def debs(self) -> tuple[debian.Deb, ...]:
        """Debian packages of the toolkit, and of compilers and Pythons that are brought."""
        own = (self.cross.compiler, self.cross.interpreter) if self.cross is not None else ()
        brought = (deb for part in (self.compiler, self.interpreter, *own) for deb in getattr(part, "debs", ()))
        return tuple(dict.fromkeys((*self.toolkit.debs, *brought)))

    @property
    def artifacts(self) -> list[Artifact]:
        """Every file to download."""
        newer = (self.toolkit.ptxas,) if self.toolkit.ptxas else ()
        run_here = (*self.toolkit.tools, *(self.cross.wheels if self.cross is not None else ()))
        wheels = (wheel.artifact for wheel in (*self.wheels, *self.toolkit.wheels, *newer, *run_here))
        return list(dict.fromkeys([*wheels, *(deb.artifact() for deb in self.debs)]))


def channel_dir(workspace: Workspace, variant: Variant, platform: Platform | None = None) -> Path:
    """The folder of a variant's bridge channel; a machine of another platform may share the cache.

    Args:
        platform: what the packages are for; None for this machine's.
    """
    own = platforms.here()
    platform = platform or own
    return workspace.bridge / f"{variant.name}{pylock.suffix(platform)}{'' if platform == own else '-cross'}"


def find_parts(
    variant: Variant, python: str, host_compiler: str, workspace: Workspace, platform: Platform | None = None
) -> Parts:
    """Look at the machine and the locks.

    Args:
        host_compiler: ``auto``, ``system``, ``bridge`` or the path of a g++.
        platform: what the packages are for; None for this machine's.

    Raises:
        MachineError: when the machine has no usable Python or compiler.
        UsageError: when the variant is not there for the platform, or the compiler can't be for it.
    """
    own = platforms.here()
    platform = platform or own
    tag = f"py{python.replace('.', '')}"
    if platform != own:
        return _cross(variant, python, host_compiler, workspace, platform)
    return Parts(
        variant=variant,
        interpreter=interpreters.choose(python, workspace),
        compiler=find_compiler(variant, host_compiler, workspace),
        wheels=tuple(pylock.read(pylock.lock_path(workspace, variant.name, tag, own), python, own)),
        toolkit=find_toolkit(variant, python, workspace),
        platform=own,
    )


def _cross(variant: Variant, python: str, host_compiler: str, workspace: Workspace, platform: Platform) -> Parts:
    """The parts of a build for another platform: its Python, torch and libraries, and what compiles for it here."""
    own = platforms.here()
    tag = f"py{python.replace('.', '')}"
    lock = cross_compiler_lock(variant, workspace, platform)
    if host_compiler not in ("auto", "bridge") or not lock.exists():
        raise UsageError(
            f"kernels for {platform.subdir} are compiled here with the cross compiler that the bridge brings, not with "
            f"'{host_compiler}'."
            if lock.exists()
            else f"there is no cross compiler for {platform.subdir} that runs on {own.subdir}.",
            fix="Leave --host-compiler out." if lock.exists() else f"Build on a machine that is {platform.people}.",
        )
    wheels = pylock.read(pylock.lock_path(workspace, variant.name, tag, own), python, own)
    return Parts(
        variant=variant,
        interpreter=interpreters.for_another(python, platform, workspace),
        compiler=_bundled(lock),
        wheels=tuple(pylock.read(pylock.lock_path(workspace, variant.name, tag, platform), python, platform)),
        toolkit=ToolkitParts(
            cuda=variant.cuda,
            wheels=_toolkit_wheels(variant, python, workspace, platform),
            newest_gcc=_newest_gcc(variant),
            target=platform,
            tools=_toolkit_wheels(variant, python, workspace, own),
            runs_on=own,
        ),
        platform=platform,
        cross=BuildTools(
            interpreter=interpreters.choose(python, workspace),
            compiler=find_compiler(variant, "auto", workspace),
            wheels=tuple(wheel for wheel in wheels if wheel.name in _BUILD_TOOLS),
        ),
    )


def cross_compiler_lock(variant: Variant, workspace: Workspace, platform: Platform) -> Path:
    """The lock of the compiler for another platform that runs on this machine's."""
    name = f"debs.gcc-{variant.row['cxx_compiler_version']}-cross-{platform.subdir}.toml"
    return workspace.bridge_locks / name


def compiler_lock(variant: Variant, workspace: Workspace) -> Path:
    """The lock of the compiler that is brought where a machine has none."""
    name = f"debs.gcc-{variant.row['cxx_compiler_version']}{pylock.suffix(platforms.here())}.toml"
    return workspace.bridge_locks / name


def find_toolkit(variant: Variant, python: str, workspace: Workspace, *, newer_ptxas: bool = False) -> ToolkitParts:
    """The toolkit that the locks name for the row of the matrix, for this machine.

    Args:
        newer_ptxas: whether it takes the one of a newer toolkit, too.
    """
    name, own = variant.row["forge_variant"], platforms.here()
    newer = pylock.read(pylock.lock_path(workspace, name, "ptxas", own), python, own) if newer_ptxas else [None]
    debs = workspace.bridge_locks / f"debs.cuda-{variant.cuda}{pylock.suffix(own)}.toml"
    return ToolkitParts(
        cuda=variant.cuda,
        wheels=_toolkit_wheels(variant, python, workspace, own),
        debs=debian.read_lock(debs) if debs.exists() else (),
        newest_gcc=_newest_gcc(variant),
        ptxas=newer[0],
        target=own,
        runs_on=own,
    )


def _toolkit_wheels(
    variant: Variant, python: str, workspace: Workspace, platform: Platform
) -> tuple[pylock.LockedWheel, ...]:
    lock = pylock.lock_path(workspace, variant.row["forge_variant"], "toolkit", platform)
    return tuple(pylock.read(lock, python, platform))


def _newest_gcc(variant: Variant) -> int:
    return int(variant.row["host_compiler_range"].split("-")[1])


def find_compiler(variant: Variant, wanted: str, workspace: Workspace) -> host.HostCompiler | gcc.BundledCompiler:
    """The compiler that ``wanted`` names; ``auto``: the machine's if nvcc accepts one, else the bridge's."""
    low, high = (int(bound) for bound in variant.row["host_compiler_range"].split("-"))
    allowed = range(low, high + 1)
    lock = compiler_lock(variant, workspace)
    if wanted == "bridge":
        return _bundled(lock)
    if wanted != "auto":
        return host.find(allowed, variant.cuda, None if wanted == "system" else wanted)
    try:
        return host.find(allowed, variant.cuda)
    except MachineError as error:
        return _bundled(lock, f"{error.what.removesuffix('.')}, and ")


def _bundled(lock: Path, why: str = "") -> gcc.BundledCompiler:
    """Debian's, where it runs.

    Raises:
        MachineError: when this machine's C library is older than Debian's.
    """
    compiler = gcc.BundledCompiler(debian.read_lock(lock))
    if Version(glibc()) < Version(compiler.glibc):
        raise MachineError(
            f"{why}the {compiler.origin} that would be brought along needs glibc {compiler.glibc}, and this machine "
            f"has {glibc()}.",
            fix="Install a g++ from your distribution (RHEL and its kin: gcc-toolset-12) and name it with "
            "--host-compiler PATH, or use --source conda, whose compiler runs on older systems.",
        )
    return compiler
