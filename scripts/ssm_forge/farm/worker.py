"""One job of a farm, on the machine that the engine chose: ``python -m ssm_forge.farm.worker FARM.json JOB CORES``.

Whatever happens, the channel has a whole package or none, and there is a receipt only for what is done. Two workers at
the same job, such as one that a killed controller left and one of its successor, wait for each other.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ssm_forge.base import locks, machine, platforms
from ssm_forge.base.arch import ArchList
from ssm_forge.base.ending import end
from ssm_forge.base.errors import BuildError, ForgeError
from ssm_forge.base.files import sha256_of, write_whole
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.base.ui import Log, console, open_log
from ssm_forge.base.urls import is_under
from ssm_forge.bridge import assemble
from ssm_forge.build.request import BuildRequest
from ssm_forge.channel import folder as channels
from ssm_forge.channel import mirror as channel_mirror
from ssm_forge.channel import policy
from ssm_forge.channel.source import open_source
from ssm_forge.farm import inputs, receipts
from ssm_forge.farm.cells import Cell
from ssm_forge.farm.receipts import How, Receipt
from ssm_forge.flow import pipeline, planning
from ssm_forge.flow.plan import Options
from ssm_forge.install import prefix as install
from ssm_forge.install.marker import Installed
from ssm_forge.manifest import variants
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.package import wheel
from ssm_forge.solve.prefix import machine_virtual_packages
from ssm_forge.solve.recipes import solve_builds

_FIX_WITHOUT_LOCKS = "set SSM_FORGE_CACHE_DIR to a folder on another file system"


@dataclass(frozen=True)
class Work:
    """A job, and the farm that it is of.

    Attributes:
        job: as :meth:`ssm_forge.farm.jobs.Job.as_dict` gave it.
        farm: host compiler, channels to copy from, the folder of wheels.
        folder: the farm's.
        cores: that it may use.
    """

    job: dict[str, Any]
    farm: dict[str, Any]
    folder: Path
    cores: int
    workspace: Workspace
    log: Log

    @property
    def cell(self) -> Cell:
        """The cell that the job is for."""
        facts = self.job["cell"]
        variant = variants.load(self.workspace.variants).get(facts["variant"], facts["source"])
        archs, platform = ArchList.parse(facts["cuda_arch"]), platforms.of(facts["platform"])
        return Cell(variant, facts["python"], archs, facts["project"], platform, facts["kernels"])

    @property
    def request(self) -> BuildRequest:
        """The build of the cell's package."""
        return inputs.request(self.cell, self.farm["host_compiler"], self.workspace)

    @property
    def options(self) -> Options:
        """What ``install-mamba`` would be asked to build the cell's packages."""
        cell = self.cell
        return Options(
            variant=cell.variant.name,
            python=cell.python,
            cuda_arch=str(cell.archs),
            source=cell.variant.source,
            jobs=self.cores,
            host_compiler=self.farm["host_compiler"],
            for_this_machine=False,
            kernels=cell.kernels,
            platform=cell.platform.subdir,
        )


@dataclass(frozen=True)
class Outcome:
    """How a job was done, and the package or wheel that it gave; None for other jobs."""

    how: How
    file: Path | None = None


def main(farm: Path, name: str, cores: int) -> int:
    """Carry out one job and write its receipt; the exit code comes out.

    What went wrong is left in ``failed/`` of the farm's folder.

    Args:
        farm: the file of jobs; its folder is the farm's.
        name: the job's.
        cores: that it may use.
    """
    signal.signal(signal.SIGTERM, _stop)
    farm_content = json.loads(farm.read_text(encoding="utf-8"))
    job = next(job for job in farm_content["jobs"] if job["name"] == name)
    folder, own_workspace = farm.parent, workspace()
    trouble = folder / "failed" / f"{name}.txt"
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with open_log(folder / "logs", name) as log, locks.held(folder / "locks" / name, _FIX_WITHOUT_LOCKS, what=name):
            outcome = _WORKS[job["kind"]](Work(job, farm_content, folder, cores, own_workspace, log))
    except ForgeError as error:
        trouble.parent.mkdir(parents=True, exist_ok=True)
        write_whole(trouble, str(error).encode())
        console.print(f"error: {error}")
        return error.exit_code
    used = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
    file = outcome.file
    receipt = Receipt(
        job=name,
        digest=job["digest"],
        how=outcome.how,
        file=file.name if file else "",
        sha256=sha256_of(file) if file else "",
        seconds=time.monotonic() - started,
        cpu=sum(use.ru_utime + use.ru_stime for use in used),
        cores=cores,
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
    )
    receipts.write(folder / job["receipt"], receipt)
    trouble.unlink(missing_ok=True)
    return 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Leave as after Ctrl-C, so that a build takes its compilers with it."""
    raise SystemExit(128 + number)


def _toolchain(work: Work) -> Outcome:
    origin = inputs.origin_of(work.cell, work.farm["host_compiler"], work.workspace)
    if origin.parts is not None:
        assemble.assemble_toolchain(origin.parts, work.workspace, work.log)
    else:
        _fill_cache(work, "build")
    return Outcome("made")


def _torch(work: Work) -> Outcome:
    origin = inputs.origin_of(work.cell, work.farm["host_compiler"], work.workspace)
    if origin.parts is not None:
        assemble.assemble(origin.parts, work.workspace, work.log)
    else:
        _fill_cache(work, "host")
    return Outcome("made")


def _fill_cache(work: Work, kind: str) -> None:
    """Have an environment of the builds in the package cache, by making it once: builds then only link it."""
    # The first project needs nothing of ours, and has the compilers and the torch of both.
    cell = replace(work.cell, project=PROJECTS[0])
    request = inputs.request(cell, work.farm["host_compiler"], work.workspace)
    if request.locked is not None:
        records = list(request.locked.build if kind == "build" else request.locked.host)
    else:
        channels.ensure_indexed(work.workspace.channel)
        of_this_machine = [v for v in machine_virtual_packages() if not v.name.startswith("__cuda")]
        # As in a build: for the GPU that it is for, wherever that is done.
        machine_of_build = (
            *virtual_packages(cuda=cell.variant.cuda, cuda_arch=str(cell.archs.sass[0]))[:2],
            *of_this_machine,
        )
        solved = solve_builds([request.rendered], request.channels, machine_of_build, f"for {cell.environment}")
        records = list(next(environment for environment in solved if environment.kind == kind).records)
    if not records:
        return
    with tempfile.TemporaryDirectory(dir=work.workspace.cache, prefix="farm-", ignore_cleanup_errors=True) as scratch:
        marker = Installed(cell.variant.name, cell.python, "conda", (), created=True)
        install.install(records, Path(scratch) / "prefix", marker, work.workspace, work.log)


def _package(work: Work) -> Outcome:
    request, workspace = work.request, work.workspace
    if inputs.digest(request, workspace) != work.job["digest"]:
        raise BuildError(
            f"what {request.filename} is made from changed after the farm began.", fix="Run the same command again."
        )
    channels.ensure_indexed(workspace.channel)
    present = channels.find(workspace.channel, request.filename)
    if present is not None and inputs.made_from(present, request, workspace):
        return Outcome("found", present)
    for url in work.farm["channels"]:
        if (copied := _copied(url, request, work)) is not None:
            return Outcome("copied", copied)
    _check_room(workspace)
    planned = planning.make(work.options, workspace)
    chosen = next(package for package in planned.packages if package.name == request.project)
    chosen = replace(chosen, state="to build")
    pipeline.make_packages(replace(planned, packages=(chosen,), jobs=work.cores), workspace, work.log)
    return Outcome("built", workspace.channel / request.key.platform.subdir / request.filename)


def _check_room(workspace: Workspace) -> None:
    """Have a full disk known now, and not after an hour.

    Raises:
        MachineError: when the channel's disk is full.
    """
    if machine.free_disk(workspace.channel) < _LEAST_FREE_BYTES:
        raise channels.full(workspace.channel, OSError(28, "No space left on device"))


_LEAST_FREE_BYTES = 100_000_000


def _copied(url: str, request: BuildRequest, work: Work) -> Path | None:
    """The package from a shared channel, where that has it and it is made from the same."""
    rules = policy.find(None, work.workspace)
    if any(is_under(url.rstrip("/") + "/", rule.url) for rule in rules):
        work.log(f"{url} is under a trust policy, which is checked where packages are installed: nothing is copied.")
        return None
    with tempfile.TemporaryDirectory(dir=_scratch(work.workspace)) as scratch:
        staged = Path(scratch)
        channel_mirror.mirror(open_source(url), staged, only=[request.filename], log=work.log)
        package = channels.find(staged, request.filename)
        if package is None or not inputs.made_from(package, request, work.workspace):
            return None
        return channels.add(work.workspace.channel, package)


def _scratch(workspace: Workspace) -> Path:
    folder = workspace.cache / "farm"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _wheel(work: Work) -> Outcome:
    package = channels.find(work.workspace.channel, work.job["file"])
    if package is None:
        raise BuildError(f"{work.job['file']} is not in {work.workspace.channel}.", fix="Run the same command again.")
    cell = work.cell
    folder = Path(work.farm["wheels"]) / f"{cell.row}-{cell.made}"
    folder.mkdir(parents=True, exist_ok=True)
    return Outcome("made", wheel.from_conda(package, folder))


_WORKS = {"toolchain": _toolchain, "torch": _torch, "package": _package, "wheel": _wheel}


if __name__ == "__main__":
    end(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
