"""The graph: a job for each toolchain, torch, package and wheel that is still to be made, and what each waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ssm_forge.base.errors import MachineError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import human_bytes
from ssm_forge.bridge import assemble
from ssm_forge.farm import costs, inputs, receipts
from ssm_forge.farm.cells import Cell
from ssm_forge.farm.costs import Need

Kind = Literal["toolchain", "torch", "package", "wheel"]
KINDS: tuple[Kind, ...] = ("toolchain", "torch", "package", "wheel")


@dataclass(frozen=True)
class Job:
    """One thing that is made on one machine.

    Attributes:
        digest: of everything that it is made from.
        needs: names of jobs that come before it.
        need: cores, memory, time and disk that it is declared to take.
        cell: what it is for; of several that share a toolchain or a torch, the first.
        file: name of the package that it is about; empty for toolchains and torch.
    """

    name: str
    kind: Kind
    digest: str
    needs: tuple[str, ...]
    need: Need
    cell: Cell
    file: str = ""

    @property
    def receipt(self) -> str:
        """Path of its receipt below the farm's folder."""
        return receipts.name(self.kind, self.name, self.digest)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the engine and the worker."""
        cell = self.cell
        return {
            "name": self.name,
            "kind": self.kind,
            "receipt": self.receipt,
            "digest": self.digest,
            "needs": list(self.needs),
            **asdict(self.need),
            "minutes": self.need.minutes,
            "file": self.file,
            "cell": {**cell.facts, "cuda_arch": str(cell.archs)},
        }


@dataclass(frozen=True)
class Limits:
    """What one job may have.

    Attributes:
        cores: at most.
        memory: bytes at most; what needs more gets fewer cores.
        each: cores that every package gets; None for as many as it keeps busy.
    """

    cores: int
    memory: int
    each: int | None = None


@dataclass(frozen=True)
class Wanted:
    """A package, and how far it is.

    Attributes:
        file: name of the package.
        digest: of what it is made from.
        done: whether the channel has it, made from that.
    """

    cell: Cell
    file: str
    digest: str
    done: bool


def graph(
    wanted: Sequence[Wanted],
    workspace: Workspace,
    limits: Limits,
    *,
    host_compiler: str = "auto",
    wheels: bool = False,
    shares_objects: bool = True,
    without: Sequence[str] = (),
) -> list[Job]:
    """The jobs that are left, each after those that it needs.

    Args:
        wheels: whether each package is to become a wheel too.
        shares_objects: whether there is a compile cache: then one Python of each kernel goes first.
        without: names of packages that failed: another Python goes first in their place, and what can't do without
            them is no job.

    Raises:
        MachineError: when a package needs more memory than ``limits`` has.
    """
    planned: dict[str, Job] = {}
    lost = {package.cell.name for package in wanted if package.cell.name in without}
    needed = _needed(wanted)
    possible = [
        package
        for package in wanted
        if not lost & {package.cell.name, *(o.cell.name for o in needed[package.cell.name])}
    ]
    pending = [package for package in possible if not package.done]
    compiled = {package.cell.objects for package in wanted if package.done}
    first: dict[str, str] = {}
    fetched: set[str] = set()
    for package in pending:
        cell = package.cell
        leader = first.setdefault(cell.objects, cell.name)
        follows = shares_objects and leader != cell.name
        shared = follows or (shares_objects and cell.objects in compiled)
        need = costs.package(cell, workspace, shared=shared, cores=limits.each, most=limits.cores, memory=limits.memory)
        _check_memory(cell, need, limits)
        before = _before(cell, workspace, limits, host_compiler, planned, fetched) + ([leader] if follows else [])
        before += [other.cell.name for other in needed[cell.name] if not other.done]
        planned[cell.name] = Job(cell.name, "package", package.digest, tuple(before), need, cell, package.file)
    if wheels:
        for package in wanted:
            if package.done or package.cell.name in planned:
                job = _wheel(package, limits, pending=not package.done)
                planned[job.name] = job
    return list(planned.values())


def _needed(wanted: Sequence[Wanted]) -> dict[str, list[Wanted]]:
    """Cell's name -> those whose package its test installs: mamba-ssm's has causal-conv1d."""
    beside: dict[tuple[str, str], list[Wanted]] = {}
    for package in wanted:
        beside.setdefault((package.cell.environment, package.cell.made), []).append(package)
    needed = {}
    for package in wanted:
        projects = list(package.cell.variant.projects)
        before = projects[: projects.index(package.cell.project)]
        same_environment = beside[package.cell.environment, package.cell.made]
        needed[package.cell.name] = [other for other in same_environment if other.cell.project in before]
    return needed


def _check_memory(cell: Cell, need: Need, limits: Limits) -> None:
    """Refuse a package that can't be built with the memory that there is.

    Raises:
        MachineError: when one compiler needs more.
    """
    if need.memory > limits.memory:
        raise MachineError(
            f"{cell.name} needs {human_bytes(need.memory)} of memory for one compiler, and there are "
            f"{human_bytes(limits.memory)}.",
            fix="Free memory, or name a machine that has it with --executor or --memory.",
        )


def _before(
    cell: Cell, workspace: Workspace, limits: Limits, host_compiler: str, planned: dict[str, Job], fetched: set[str]
) -> list[str]:
    """Names of the toolchain and the torch of a package, where they are not there already.

    Args:
        planned: the jobs so far, to which they are added.
        fetched: sha256 of what the jobs so far fetch, which is added to; Pythons share most of it.
    """
    toolchain, torch = f"toolchain.{cell.row}", f"torch.{cell.environment}"
    if torch in planned:
        return [toolchain, torch]
    request = inputs.request(cell, host_compiler, workspace)
    files = download = disk = 0
    parts = inputs.origin_of(cell, host_compiler, workspace).parts
    if parts is not None:
        if not assemble.bytes_needed(parts, workspace).disk:
            return []
        files, download, disk = assemble.bytes_needed(parts, workspace, without=fetched)
        fetched.update(artifact.sha256 for artifact in parts.artifacts)
    source = cell.variant.source
    locks = inputs.materials_of(request, workspace)
    digest = inputs.text_digest([item for item in locks if item["role"].startswith("toolchain")])
    need = costs.other(costs.TOOLCHAIN_SECONDS[source], most=limits.cores)
    planned.setdefault(toolchain, Job(toolchain, "toolchain", digest, (), need, cell))
    seconds = costs.torch_seconds(source, files)
    need = costs.other(seconds, most=limits.cores, download=download, disk=disk)
    planned[torch] = Job(torch, "torch", digest, (toolchain,), need, cell)
    return [toolchain, torch]


def _wheel(package: Wanted, limits: Limits, *, pending: bool) -> Job:
    name = f"wheel.{package.cell.name}"
    digest = inputs.text_digest(["wheel", package.digest])
    needs = (package.cell.name,) if pending else ()
    return Job(
        name, "wheel", digest, needs, costs.other(costs.WHEEL_SECONDS, most=limits.cores), package.cell, package.file
    )


def kinds(jobs: Sequence[Job]) -> Mapping[Kind, int]:
    """Kind -> how many of the jobs are of it."""
    return {kind: sum(job.kind == kind for job in jobs) for kind in KINDS}
