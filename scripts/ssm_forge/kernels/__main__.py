"""``python -m ssm_forge.kernels``: the commands that run beside the installed kernels.

Each prints one JSON document (``--json``) or lines for people, and exits with 0 when everything that ran
passed, 9 when something failed, and 3 when nothing could run (0 with ``--allow-missing-gpu`` where that is
for want of a GPU).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssm_forge.kernels import (
    as_upstream,
    blocks,
    checks,
    extensions,
    first_use,
    gpus,
    inner,
    large,
    machine,
    models,
    plans,
    plot,
    sanitizer,
    siso,
    tolerance,
    usage,
)
from ssm_forge.kernels import bench as benchmarks
from ssm_forge.kernels import selftest as selftests
from ssm_forge.kernels import upstream as upstream_tests
from ssm_forge.kernels.backends import installed
from ssm_forge.kernels.checks import FAIL, NOT_RUN, Check

EXIT_FAIL, EXIT_NOT_RUN = 9, 3

Document = dict[str, Any]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell(check: Any) -> None:
    _say(f"{check.status:8} {check.name} ({check.seconds:.1f} s) {check.detail}")


def _deadline(options: argparse.Namespace) -> float | None:
    return None if options.limit is None else time.monotonic() + float(options.limit)


def _blocked() -> tuple[str, str]:
    """Why nothing can run here: status and reason, both empty when something can."""

    reason = machine.missing_gpu()
    if reason:
        return NOT_RUN, reason
    broken = machine.missing_packages()
    return (FAIL, f"the packages don't load: {broken}") if broken else ("", "")


def _extent(options: argparse.Namespace) -> tuple[str, list[Any]]:
    """What is checked, and what it is called."""

    device = machine.gpu()
    if options.large:
        return "large", large.plans(machine.free_bytes())
    # The blocks come last: their Triton kernels are tuned on first use, which takes a while.
    extent = plans.quick() + blocks.quick()
    if options.full:
        extent = plans.full() + inner.full() + siso.full() + blocks.full() + usage.full()
    return "full" if options.full else "quick", plans.supported(extent, str(device["capability"]) if device else None)


def check(options: argparse.Namespace) -> Document:
    """Compare the kernels with float64 references."""

    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")
    name, extent = _extent(options)
    chosen = [p for p in extent if options.only in p.name]
    document = {
        **machine.header(seed),
        "command": "check",
        "extent": name,
        "tolerance": f"{tolerance.STATEMENT}; {blocks.STATEMENT}",
    }
    status, reason = _blocked()
    if status:
        results = [checks.Check(p.name, status, reason) for p in chosen]
    else:
        backend = installed()
        document["kernels"] = "upstream" if as_upstream.is_upstreams(backend) else "forge"
        chosen = as_upstream.applicable(chosen) if as_upstream.is_upstreams(backend) else chosen
        _say(f"seed {seed}")
        # The kernels are run on the current GPU, whatever others there are.
        usable = [
            checks.Check(f"torch uses {gpu}", checks.FAIL if why else checks.PASS, why or "it computes there")
            for gpu, why in machine.unusable_devices().items()
        ]
        for result in usable:
            _tell(result)
        finished: list[checks.Check] = []

        def keep(result: checks.Check) -> None:
            """Whatever ends this process, what ran until then is on disk."""
            _tell(result)
            finished.append(result)
            rest = [checks.Check(p.name, checks.NOT_RUN, "stopped before") for p in chosen[len(finished) :]]
            _write(document | {"checks": [c.as_dict() for c in usable + finished + rest]}, options)

        results = usable + checks.run_plans(
            chosen, backend, torch.device("cuda"), seed, on_done=keep, deadline=_deadline(options)
        )
    return document | {"checks": [c.as_dict() for c in results]}


def selftest(options: argparse.Namespace) -> Document:
    """Test the references and the checks themselves on the CPU, with faults injected."""

    return {**machine.header(), "checks": [c.as_dict() for c in selftests.run(_tell)]}


def bench(options: argparse.Namespace) -> Document:
    """Measure speed against this GPU's memory, plain PyTorch, and other builds."""

    status, reason = _blocked()
    if status:
        return {**machine.header(), "rows": [], "checks": [Check("bench", status, reason).as_dict()]}
    deadline = _deadline(options)
    named = [(label, Path(folder)) for label, _, folder in (o.partition("=") for o in options.other)]
    waits = []
    for label, folder in [("installed", None), *named] if options.first_use else []:
        waits.append(first_use.measure(label, folder, limit=options.first_use))
        _say(f"first use of {label}: {waits[-1]}")
    others = [extensions.load(label, folder) for label, folder in named]
    document = benchmarks.run(
        extensions.installed(),
        others,
        small=options.small,
        dtypes=options.dtype,
        deadline=deadline,
        say=_say,
    )
    document["first_use"] = waits
    if options.plot:
        missing = plot.missing()
        document["charts"] = [] if missing else [str(p) for p in plot.draw(document, options.plot)]
        if missing:
            document["charts_not_drawn"] = missing
            _say(f"no charts: {missing}")
    return document


def upstream(options: argparse.Namespace) -> Document:
    """Run upstream's own tests against the installed packages."""

    folders = {name: Path(folder) for name, _, folder in (t.partition("=") for t in options.tests)}
    status, reason = _blocked()
    reason = reason or upstream_tests.missing()
    if reason:
        stopped = [Check(f"{name} upstream tests", status or NOT_RUN, reason) for name in folders]
        return {**machine.header(), "checks": [c.as_dict() for c in stopped]}
    absent = [str(folder) for folder in folders.values() if not folder.is_dir()]
    if absent:
        wrong = Check("upstream tests", FAIL, f"no such folder: {', '.join(absent)}")
        return {**machine.header(), "checks": [wrong.as_dict()]}
    checks, every = upstream_tests.run_projects(folders, limit=options.limit, select=options.select)
    for result in checks:
        _tell(result)
    tests = {
        project: [[r.name, r.status, round(r.seconds, 3), r.message] for r in results]
        for project, results in every.items()
    }
    return {**machine.header(), "checks": [c.as_dict() for c in checks], "tests": tests}


def sanitize(options: argparse.Namespace) -> Document:
    """Watch the kernels with compute-sanitizer: memcheck, racecheck, initcheck."""

    status, reason = _blocked()
    if status:
        results = [Check(f"compute-sanitizer {tool}", status, reason) for tool in sanitizer.TOOLS]
    else:
        results = sanitizer.run_all(limit=(options.limit or 900.0) / len(sanitizer.TOOLS))
        if as_upstream.is_upstreams(installed()):
            what = "compute-sanitizer, a complex A with two groups"
            results.append(Check(what, NOT_RUN, f"not applicable: {as_upstream.TWO_GROUPS}"))
    for result in results:
        _tell(result)
    return {**machine.header(), "checks": [c.as_dict() for c in results]}


def two_gpus(options: argparse.Namespace) -> Document:
    """Call the kernels on a GPU that is not the current one, and train over two."""

    chosen = [p for p in gpus.plans(torch.cuda.device_count()) if options.only in p.name]
    status, reason = _blocked()
    if status:
        results = [Check(p.name, status, reason) for p in chosen]
    else:
        backend = installed()
        chosen = as_upstream.applicable(chosen) if as_upstream.is_upstreams(backend) else chosen
        seed = int.from_bytes(os.urandom(4), "little")
        device = torch.device("cuda", 0)
        results = checks.run_plans(chosen, backend, device, seed, on_done=_tell, deadline=_deadline(options))
    return {**machine.header(), "gpus": torch.cuda.device_count(), "checks": [c.as_dict() for c in results]}


def tiny_models(options: argparse.Namespace) -> Document:
    """Compare models of transformers with the kernels and with its own PyTorch code."""

    status, reason = _blocked()
    if status:
        results = [Check(f"transformers {name}", status, reason) for name in models.MODELS]
    else:
        results = models.run_all(limit=options.limit or 300.0)
    for result in results:
        _tell(result)
    return {**machine.header(), "checks": [c.as_dict() for c in results]}


COMMANDS: dict[str, Callable[[argparse.Namespace], Document]] = {
    "check": check,
    "selftest": selftest,
    "bench": bench,
    "upstream": upstream,
    "sanitize": sanitize,
    "gpus": two_gpus,
    "models": tiny_models,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ssm_forge.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=run.__doc__) for name, run in COMMANDS.items()}
    for subparser in parsers.values():
        subparser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
        subparser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON document here, too")
        subparser.add_argument(
            "--allow-missing-gpu", action="store_true", help="exit 0 where nothing ran for want of a GPU"
        )
        subparser.add_argument("--limit", type=float, metavar="SECONDS", help="report what is left as not run")

    extent = parsers["check"].add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="forward and backward, some seconds (default)")
    extent.add_argument("--full", action="store_true", help="every mode that upstream supports")
    extent.add_argument("--large", action="store_true", help="tensors beyond 2^31 and 2^32 elements, as memory allows")
    for name in ("check", "gpus"):
        parsers[name].add_argument("--only", default="", metavar="TEXT", help="checks whose name contains TEXT")
    parsers["check"].add_argument("--seed", type=int, help="repeat a run (default: a new seed)")

    parsers["bench"].add_argument("--small", action="store_true", help="a few sizes only")
    parsers["bench"].add_argument(
        "--dtype", action="append", default=[], choices=("fp32", "fp16", "bf16"), help="only this precision"
    )
    parsers["bench"].add_argument(
        "--other", action="append", default=[], metavar="LABEL=DIR", help="another build to compare with"
    )
    parsers["bench"].add_argument("--plot", type=Path, metavar="DIR", help="write PNG charts here")
    parsers["bench"].add_argument(
        "--first-use",
        type=float,
        metavar="SECONDS",
        help="also measure the wait before the first call, of each build, at most so long",
    )
    parsers["upstream"].add_argument(
        "--tests", action="append", required=True, metavar="PROJECT=DIR", help="a tests folder of an sdist"
    )
    parsers["upstream"].add_argument("--select", default="", metavar="EXPRESSION", help="pytest's -k")

    for name in ("first-use-worker", "sanitize-worker"):
        worker = commands.add_parser(name)
        worker.add_argument("folder", nargs="?", type=Path)
    worker = commands.add_parser("models-worker")
    worker.add_argument("file", type=Path)
    chosen = worker.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--kernels", action="store_true")
    chosen.add_argument("--own", action="store_true")
    return parser


def exit_code(document: Document, *, allow_missing_gpu: bool) -> int:
    """0 when something ran and all passed; 9 when something failed; 3 when nothing could run."""
    statuses = [c["status"] for c in document["checks"]]
    if "fail" in statuses:
        return EXIT_FAIL
    if "pass" in statuses:
        return 0
    return 0 if allow_missing_gpu and document["device"] is None else EXIT_NOT_RUN


def _write(document: Document, options: argparse.Namespace) -> None:
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        partial = options.output.with_name(options.output.name + ".part")
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        partial.replace(options.output)


def _publish(document: Document, options: argparse.Namespace) -> None:
    _write(document, options)
    if options.json:
        print(json.dumps(document, indent=2))
        return
    for result in document["checks"]:
        print(f"{result['status']:8} {result['name']}: {result['detail']}")


def _work(options: argparse.Namespace) -> int:
    """What another command starts in a process of its own."""
    if options.command == "sanitize-worker":
        sanitizer.worker()
        return 0
    if options.command == "models-worker":
        models.worker(options.file, kernels=options.kernels)
        return 0

    for step in first_use.worker(options.folder):
        print(json.dumps(step), flush=True)
    return 0


def main() -> int:
    """Do what the command line says; the exit code comes out."""
    options = _parser().parse_args()
    if options.command not in COMMANDS:
        return _work(options)
    document = COMMANDS[options.command](options)
    document["command"] = options.command
    _publish(document, options)
    return exit_code(document, allow_missing_gpu=options.allow_missing_gpu)


if __name__ == "__main__":
    sys.exit(main())
