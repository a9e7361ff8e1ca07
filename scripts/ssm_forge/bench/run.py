"""Measures builds: cold, warm, for a second Python, and from the channel; what each took and where it went.

Every step is the product itself, run as its user runs it, with a channel and a compile cache of its own. The bridge
is assembled before anything is timed, since upstream's build gets its dependencies ready-made, too.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rattler.package_streaming import extract

from ssm_forge.base import machine, platforms
from ssm_forge.base.errors import BuildError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import Log, human_seconds, say
from ssm_forge.bench import baseline as build_baseline
from ssm_forge.bench import process_tree
from ssm_forge.bench import tools as build_tools
from ssm_forge.bench.usage import MEMORY_NOTE, Group, Usage
from ssm_forge.bridge.assemble import assemble
from ssm_forge.build.schedule import Job, longest_first, simulate
from ssm_forge.flow import plan, planning
from ssm_forge.manifest import recipe
from ssm_forge.package import gpu_code
from ssm_forge.package.kernels import DEFAULT, Kernels
from ssm_forge.package.write import read_json

Document = dict[str, Any]

STEPS = ("cold", "warm", "second Python", "from channel")
SIMULATED_CORES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Target:
    """What is built.

    Attributes:
        second: another Python, for which objects of the first are reused.
        jobs: parallel compilers, None for what fits the machine.
        kernels: ours, or upstream's as they are.
    """

    variant: str
    python: str
    second: str
    cuda_arch: str
    source: str
    jobs: int | None = None
    host_compiler: str = "auto"
    kernels: Kernels = DEFAULT

    def options(self, python: str) -> plan.Options:
        """What the planner is asked for, with one of the two Pythons."""
        return plan.Options(
            variant=self.variant,
            python=python,
            cuda_arch=self.cuda_arch,
            source=self.source,  # type: ignore[arg-type]
            jobs=self.jobs,
            host_compiler=self.host_compiler,
            for_this_machine=False,
            kernels=self.kernels,
        )

    def arguments(self, python: str) -> list[str]:
        """The same as words of the command line."""
        words = ["--variant", self.variant, "--python", python, "--cuda-arch", self.cuda_arch, "--source", self.source]
        words += ["--host-compiler", self.host_compiler, "--kernels", self.kernels]
        return words + (["--jobs", str(self.jobs)] if self.jobs else [])


@dataclass(frozen=True)
class Bench:
    """One series of measurements.

    Attributes:
        scratch: empty folder for channels, the compile cache, environments and what upstream builds.
        save: gets the document after each step.
    """

    target: Target
    scratch: Path
    place: Workspace
    log: Log
    save: Callable[[Document], None]

    def run(self, *, baseline: Sequence[build_baseline.Kind] = ()) -> Document:
        """Measure every step, then upstream's builds.

        Raises:
            BuildError: when a step fails.
        """
        document: Document = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": this_machine(),
            "target": asdict(self.target),
            "memory": MEMORY_NOTE,
            "steps": {},
        }
        say("Making what both builds take for granted: bridge, torch, toolkit")
        options = {python: self.target.options(python) for python in (self.target.python, self.target.second)}
        for each in options.values():
            self._prepare(each)
        prefix = self.scratch / "toolchain"
        # Ours gets an environment like it from the same package cache, which this fills.
        build_baseline.environment(options[self.target.python], prefix, self.place, self.log)
        for step in STEPS:
            usage, folder = self._step(step)
            document["steps"][step] = {**told(usage), "packages": packages(folder)}
            if step == "cold":
                document["simulated"] = simulated(document)
            self.save(document)
        for kind in baseline:
            document.setdefault("baseline", {})[kind] = self._baseline(kind, prefix)
            self.save(document)
        return document

    def _prepare(self, options: plan.Options) -> None:
        parts = planning.origin(options, self.place).parts
        if parts is not None:
            assemble(parts, self.place, self.log)

    def _step(self, step: str) -> tuple[Usage, Path]:
        """Run the product with what the step has; returns what it took and the channel it filled."""
        say(f"Measuring: {step}")
        words = self.target.arguments(self.target.second if step == "second Python" else self.target.python)
        if step == "from channel":
            words = ["install-mamba", *words, "--prefix", str(self.scratch / "prefix")]
        else:
            words = ["build", *words]
        folder = self.scratch / ("cold" if step == "from channel" else step.split()[0])
        self.log(f"measured: {' '.join(words)}")
        usage = process_tree.measure(
            [sys.executable, "-m", "ssm_forge", *words],
            describe=build_tools.describe,
            log=self.log.path,
            environment={
                **os.environ,
                "SSM_FORGE_CHANNEL": str(folder),
                "SSM_FORGE_CCACHE_DIR": str(self.scratch / "ccache"),
            },
        )
        if usage.returncode:
            raise BuildError(f"'{' '.join(words)}' failed while it was measured.", log=self.log.path)
        say(f"  {human_seconds(usage.wall)}")
        return usage, folder

    def _baseline(self, kind: build_baseline.Kind, prefix: Path) -> Document:
        say(f"Measuring: upstream's build, {kind}")
        folder = self.scratch / f"upstream-{kind.split()[0]}"
        trees = build_baseline.sources(self.target.options(self.target.python), kind, folder / "src", self.place)
        usage, wheels = build_baseline.build(trees, prefix, self.target.cuda_arch, folder, self.log)
        say(f"  {human_seconds(usage.wall)}")
        return {**told(usage), "wheels": [self._wheel(wheel, kind, folder) for wheel in wheels]}

    def _wheel(self, wheel: build_baseline.Wheel, kind: build_baseline.Kind, folder: Path) -> Document:
        """A wheel's sizes; beside our package of the same capability, what its flags change."""
        (ours,) = (self.scratch / "cold" / platforms.here().subdir).glob(f"{wheel.project}-*.conda")
        document: Document = {
            "project": wheel.project,
            "wheel_size": wheel.path.stat().st_size,
            "extension_size": wheel.extension.stat().st_size,
            "size_as_package": build_baseline.size_as_package(ours, wheel, folder),
        }
        if kind == "same capability":
            with tempfile.TemporaryDirectory(dir=self.scratch) as scratch:
                extract(ours, Path(scratch))
                (extension,) = Path(scratch).glob(f"lib/python*/site-packages/{wheel.extension.name}")
                document["sass"] = gpu_code.compare_libraries(extension, wheel.extension).as_dict()
        return document


def told(usage: Usage) -> Document:
    """What a run took, as plain values; seconds and bytes."""
    inside = sum(usage.cpu_by_tool.get(tool, 0.0) for tool in build_tools.COMPILERS)
    files = [_file(group) for group in usage.groups if "source" in group.labels]
    return {
        "wall": usage.wall,
        "cpu": usage.cpu,
        "cpu_by_tool": {**dict(sorted(usage.cpu_by_tool.items(), key=lambda item: -item[1])), "unseen": usage.unseen},
        "cpu_outside_compilers": usage.cpu - inside,
        "peak_memory": usage.peak_rss,
        "others_cpu": usage.others_cpu,
        "measuring_cpu": usage.own_cpu,
        "compile": windows(usage.groups, machine.cores()),
        "files": sorted(files, key=lambda file: -file["cpu"]),
    }


def _file(group: Group) -> Document:
    return {
        "extension": group.labels.get("extension", ""),
        "source": group.labels["source"],
        "cpu": group.cpu,
        "wall": group.last - group.first,
        "peak_memory": group.peak_rss,
        "tools": {tool: use.cpu for tool, use in sorted(group.tools.items(), key=lambda item: -item[1].cpu)},
    }


def windows(groups: Sequence[Group], cores: int) -> Document:
    """For each extension: seconds from its first compiler to its last, and how busy the cores were in between.

    What the linker takes is not part of it: nothing else is left to do then.
    """
    by_extension = {}
    compilers = [g for g in groups if g.labels.get("source", "(link)") != "(link)" and g.labels.get("extension")]
    for extension in sorted({g.labels["extension"] for g in compilers}):
        of_it = [g for g in compilers if g.labels["extension"] == extension]
        wall = max(g.last for g in of_it) - min(g.first for g in of_it)
        cpu = sum(g.cpu for g in of_it)
        by_extension[extension] = {"wall": wall, "cpu": cpu, "busy": cpu / (wall * cores) if wall else 0.0}
    return by_extension


def costs(document: Document) -> dict[str, list[Job]]:
    """What the files of a cold build took, longest first; extension -> its files."""
    jobs_of: dict[str, list[Job]] = {}
    for file in document["steps"]["cold"]["files"]:
        if file["source"] != "(link)" and file["extension"]:
            job = Job(file["source"], file["cpu"], file["peak_memory"])
            jobs_of.setdefault(file["extension"], []).append(job)
    return {extension: longest_first(jobs) for extension, jobs in sorted(jobs_of.items())}


def recordable(document: Document) -> dict[str, list[Job]]:
    """As :func:`costs`, and all of it.

    Raises:
        BuildError: when a CUDA file is of no extension, and would be missing.
    """
    for file in document["steps"]["cold"]["files"]:
        if file["source"].endswith(".cu") and not file["extension"]:
            raise BuildError(f"which extension {file['source']} was compiled for is not in its command lines.")
    return costs(document)


def simulated(document: Document) -> dict[str, float]:
    """Seconds that compiling both projects, one after the other, takes on that many cores."""
    each = costs(document).values()
    return {str(cores): sum(simulate(jobs, cores) for jobs in each) for cores in SIMULATED_CORES}


def packages(folder: Path) -> list[Document]:
    """The packages of a channel: sizes, and the hash that tells whether two are the same."""
    documents = []
    for path in sorted(folder.glob(f"{platforms.here().subdir}/*.conda")):
        name = read_json(path, "index.json")["name"]
        entries = read_json(path, "paths.json")["paths"]
        binary = [e for e in entries if recipe.EXTENSIONS[name] in e["_path"] and e["_path"].endswith(".so")]
        documents.append(
            {
                "file": path.name,
                "sha256": sha256_of(path),
                "size": path.stat().st_size,
                "extension_size": sum(e["size_in_bytes"] for e in binary),
            }
        )
    return documents


def this_machine() -> Document:
    """What the figures were measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return {"cpu": model, "cores": machine.cores(), "memory": psutil.virtual_memory().total, "glibc": machine.glibc()}
