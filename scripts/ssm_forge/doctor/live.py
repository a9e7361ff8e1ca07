"""Imports the kernels in the environment's own Python, a process that may crash or hang, and uses them on a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.doctor import symbols
from ssm_forge.doctor.environment import Environment
from ssm_forge.doctor.findings import Finding, Target, finding
from ssm_forge.doctor.logs import printable, recognise
from ssm_forge.doctor.processes import Answer, Program

# One line of JSON before each step and one after it, so that a crash or a hang has a place.
_SCRIPT = r"""
import faulthandler, importlib, json, os, sys
faulthandler.enable()
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
def tell(**words):
    out.write("\n@doctor " + json.dumps(words) + "\n")
    out.flush()
def step(name, action):
    tell(step=name, state="begins")
    try:
        tell(step=name, state="good", said=str(action() or ""))
        return True
    except BaseException as error:
        chain, seen = [], error
        while seen is not None and len(chain) < 5:
            chain.append("%s: %s" % (type(seen).__name__, seen))
            seen = seen.__cause__ or seen.__context__
        tell(step=name, state="bad", said="\n".join(reversed(chain))[:4000])
        return False
def load(name):
    module = importlib.import_module(name)
    return "%s %s" % (getattr(module, "__file__", ""), getattr(module, "__version__", ""))
def cuda():
    import torch
    if not torch.version.cuda:
        return "no CUDA"
    if not torch.cuda.is_available():
        torch.cuda.init()
    return "%d %s" % (torch.cuda.device_count(), torch.cuda.get_device_name(0))
def conv():
    import torch
    from causal_conv1d import causal_conv1d_fn
    x, w = torch.ones(1, 8, 16, device="cuda"), torch.ones(8, 4, device="cuda")
    y = causal_conv1d_fn(x, w)
    torch.cuda.synchronize()
    assert y[0, 0, -1].item() == 4.0, "causal_conv1d_fn computed %r, not 4.0" % y[0, 0, -1].item()
def scan():
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    u = torch.ones(1, 8, 16, device="cuda")
    y = selective_scan_fn(u, u, -u[0, :, :4].contiguous(), u[:, :4].contiguous(), u[:, :4].contiguous())
    torch.cuda.synchronize()
    assert abs(y[0, 0, 0].item() - 4.0) < 1e-3, "selective_scan_fn computed %r, not 4.0" % y[0, 0, 0].item()
gpu = sys.argv[1] == "gpu"
good = step("import torch", lambda: load("torch"))
if good:
    for name in sys.argv[2:]:
        good = step("import " + name, lambda: load(name)) and good
    if gpu and step("cuda", cuda) and good:
        step("kernel causal_conv1d_fn", conv)
        step("kernel selective_scan_fn", scan)
tell(step="end", state="good")
"""
_MODULES = ("causal_conv1d_cuda", "selective_scan_cuda", "causal_conv1d", "mamba_ssm")


@dataclass(frozen=True)
class Step:
    """One import or one kernel.

    Attributes:
        name: ``import torch``, ``cuda``, ``kernel causal_conv1d_fn``.
        state: ``good``, ``bad``, or ``begins`` where it never ended.
        message: what came of it; of a bad one the chain of exceptions, the first cause first.
    """

    name: str
    state: str
    message: str

    @property
    def module(self) -> str:
        """The module or function that the step is about: the last word of its name."""
        return self.name.rpartition(" ")[2]


@dataclass(frozen=True)
class Outcome:
    """All steps; ``end`` says how the process ended: ``whole``, ``stopped`` for want of time, or ``crashed: ...``."""

    steps: tuple[Step, ...]
    end: str

    def good(self, name: str) -> bool:
        """Whether the step of this name ran and was good."""
        return any(step.name == name and step.state == "good" for step in self.steps)


def start(env: Environment, variables: Mapping[str, str], folder: Path, *, gpu: bool) -> Program:
    """Start the process that imports the kernels; :func:`outcome` reads its answer later.

    Args:
        variables: its environment variables.
        folder: its working folder.
        gpu: whether to use each kernel once.
    """
    command = [str(env.python), "-c", _SCRIPT, "gpu" if gpu else "no-gpu", *_MODULES]
    # Reading only: no byte code is written.
    return Program(command, {**variables, "PYTHONDONTWRITEBYTECODE": "1"}, str(folder))


def outcome(answer: Answer) -> Outcome:
    """The steps that the process told of, and how it ended."""
    steps: dict[str, Step] = {}
    for line in re.findall(r"^@doctor (\{.*\})$", answer.output, re.MULTILINE):
        try:
            report = json.loads(line)
            steps[report["step"]] = Step(str(report["step"]), str(report["state"]), str(report.get("said", "")))
        except (ValueError, KeyError):
            continue
    if "end" in steps:
        del steps["end"]
        return Outcome(tuple(steps.values()), "whole")
    if answer.code is None:
        return Outcome(tuple(steps.values()), "stopped")
    fatal = re.search(r"Fatal Python error: [^\n]+", answer.errors)
    last = (answer.errors.strip().splitlines() or [""])[-1]
    signal = f"signal {-answer.code}" if answer.code < 0 else f"exit status {answer.code}"
    return Outcome(tuple(steps.values()), f"crashed: {signal}: {printable(fatal.group() if fatal else last)}")


def findings(imports: Outcome, target: Target) -> Iterator[Finding]:
    """A finding for each import or kernel that failed; a failure that no rule knows is one, too."""
    for step in imports.steps:
        if step.state == "bad":
            yield from _of_step(step, target)
        elif step.state == "begins" and imports.end.startswith("crashed"):
            yield finding("import-crashes", f"{step.name}: {imports.end}", target=target, module=step.module)


def _of_step(step: Step, target: Target) -> Iterator[Finding]:
    lines = [line for line in step.message.splitlines() if line.strip()] or ["no message"]
    hits = recognise(f"{step.name}\n{step.message}")
    for hit in hits[:1]:
        evidence = [f"{step.name}: {hit.text}"]
        if hit.symbol:
            evidence.append(f"that is {symbols.demangle(hit.symbol)}")
        yield finding(hit.rule.code, *evidence, target=target, module=step.module, name=hit.name)
    if not hits:
        yield finding("import-fails", f"{step.name}: {printable(lines[-1])}", target=target, module=step.module)
