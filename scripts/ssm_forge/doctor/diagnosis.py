"""Puts the probes together: what is wrong with an environment, or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssm_forge.doctor import live, logs, probes_kernels, probes_machine, probes_packages, symbols
from ssm_forge.doctor.binary import DamagedError
from ssm_forge.doctor.environment import Environment, NoEnvironmentError, examine, interpreter
from ssm_forge.doctor.findings import Finding, Target, finding, ordered
from ssm_forge.doctor.processes import Clock
from ssm_forge.doctor.system import System, look

# What a library's own file seems to say is untrue where it was imported.
_DISPROVED = {
    "other-torch",
    "cxx11-abi",
    "glibc-too-old",
    "libstdcxx-too-old",
    "cuda-runtime-missing",
    "damaged-library",
}
# What an import says only because of something that was found in the files.
_FOLLOWS = {
    "kernels-missing": {"other-python", "not-installed", "kernels-missing", "shadowed"},
    "not-installed": {"not-installed", "kernels-missing"},
    "conv1d-hidden": {"other-torch", "cxx11-abi", "kernels-missing", "other-python", "not-installed"},
    "torch-missing": {"torch-missing"},
    "no-gpu": {"driver-too-old", "driver-broken"},
}


@dataclass
class Diagnosis:
    """What was looked at and what was found.

    Attributes:
        findings: the most probable cause first.
        facts: what was seen, for people who read a report.
        notes: what could not be looked at, and why.
        unknown: there is a failure that no rule knows.
    """

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unknown: bool = False

    @property
    def broken(self) -> bool:
        """Whether a finding is an error."""
        return any(entry.severity == "error" for entry in self.findings)


def of_environment(location: Path, variables: Mapping[str, str], folder: Path, *, seconds: float) -> Diagnosis:
    """What is wrong with an environment: everything that doctor knows is looked at.

    Args:
        location: the environment's folder, or its interpreter.
        variables: the environment variables that its user has.
        folder: the folder that its user works in.
        seconds: time for everything.
    """
    clock = Clock(seconds)
    diagnosis = Diagnosis()
    try:
        python = interpreter(location)
        env = examine(python, variables, clock)
    except (NoEnvironmentError, OSError) as error:
        code = error.code if isinstance(error, NoEnvironmentError) else "not-an-environment"
        diagnosis.findings = [finding(code, str(error), target=Target(location, location))]
        diagnosis.facts = {"environment": str(location)}
        return diagnosis
    target = Target(env.prefix, env.python)
    system = look(variables, folder, clock)
    program = live.start(env, variables, folder, gpu=bool(system.gpus))
    entries = list(_static(env, system, target, clock, diagnosis.notes))
    imports = live.outcome(program.answer(clock.left()))
    if imports.end == "stopped":
        at = imports.steps[-1].name if imports.steps else "its start"
        diagnosis.notes.append(f"imports were stopped at '{at}' after {seconds:.0f} s; --wait 60 gives them more time")
    entries = [entry for entry in entries if not (entry.code in _DISPROVED and imports.good(f"import {entry.module}"))]
    if imports.good("cuda"):
        entries = [entry for entry in entries if entry.code not in ("driver-too-old", "no-libcuda")]
    codes = {entry.code for entry in entries}
    entries += [entry for entry in live.findings(imports, target) if not _follows(entry, codes)]
    diagnosis.findings = ordered(entries)
    diagnosis.facts = _facts(env, system, imports)
    return diagnosis


def _follows(entry: Finding, codes: set[str]) -> bool:
    if entry.code == "import-fails":
        # Something that breaks imports was found already.
        return bool(codes & (_DISPROVED | {"torch-twice", "torch-missing", "kernel-signature", "transformers-too-new"}))
    return entry.code not in codes and bool(_FOLLOWS.get(entry.code, set()) & codes)


def _static(env: Environment, system: System, target: Target, clock: Clock, notes: list[str]) -> Iterator[Finding]:
    probes: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("kernels", lambda: probes_kernels.probe(env, system, target)),
        ("packages", lambda: probes_packages.probe(env, target)),
        ("machine", lambda: probes_machine.probe(env, system, target, clock)),
    ]
    for name, probe in probes:
        try:
            yield from probe()
        except (OSError, DamagedError, ValueError, LookupError, RecursionError) as error:
            # Files that vanish or that nobody may read; the rest is still looked at.
            notes.append(f"the {name} could not be examined whole ({type(error).__name__}: {error})")


def of_log(name: str, target: Target) -> Diagnosis:
    """What went wrong in the run that wrote a log.

    Args:
        name: the log's file, or ``-`` for standard input.
        target: the environment that commands are for.

    Raises:
        OSError: when the log can't be read.
    """
    reading = logs.read(name)
    diagnosis = Diagnosis()
    diagnosis.findings = ordered(_of_hit(hit, target) for hit in reading.hits)
    diagnosis.facts = {"log": name, "bytes": reading.bytes, "last error": reading.last_error}
    diagnosis.unknown = reading.failed and not diagnosis.findings
    if reading.binary:
        diagnosis.notes.append("the log is no text")
    if reading.skipped:
        diagnosis.notes.append(f"{reading.skipped} bytes in the middle were not searched: the log is too long")
    return diagnosis


def _of_hit(hit: logs.Hit, target: Target) -> Finding:
    evidence = [f"line {hit.line}: {hit.text}" if hit.line else hit.text]
    if hit.symbol:
        evidence.append(f"that is {symbols.demangle(hit.symbol)}")
        built = symbols.built_for([hit.symbol])
        if built:
            evidence.append(f"torch {probes_kernels.span(built)} has it")
    return finding(hit.rule.code, *evidence, target=target, name=hit.name)


def _facts(env: Environment, system: System, imports: live.Outcome) -> dict[str, Any]:
    shown = ("torch", "causal-conv1d", "mamba-ssm", "triton", "transformers", "einops", "numpy", "ninja")
    return {
        "environment": str(env.prefix),
        "kind": env.kind,
        "python": f"{env.version} ({env.python})",
        "packages": {d.name: f"{d.version} in {d.folder}" for d in reversed(env.distributions) if d.name in shown},
        "torch": f"{env.torch.version}, CUDA {env.torch.cuda or 'none'}" if env.torch else "none",
        "gpus": [f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})" for gpu in system.gpus],
        "driver": system.driver_text,
        "glibc": ".".join(map(str, system.glibc)),
        "nvcc": [str(path) for path in system.nvccs],
        "variables": {name: value for name, value in sorted(system.variables.items()) if name in _SHOWN_VARIABLES},
        "steps": [{"step": step.name, "state": step.state, "said": step.message} for step in imports.steps],
        "process": imports.end,
    }


_SHOWN_VARIABLES = frozenset(
    {"CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "CC", "CXX", "TORCH_CUDA_ARCH_LIST"}
    | {
        "MAX_JOBS",
        "CUDA_VISIBLE_DEVICES",
        "TRITON_PTXAS_PATH",
        "TRITON_CACHE_DIR",
        "CONDA_PREFIX",
        "VIRTUAL_ENV",
        "PATH",
    }
)
