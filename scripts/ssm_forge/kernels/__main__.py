"""``python -m ssm_forge.kernels``: the commands that run beside the installed kernels."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

EXIT_FAIL, EXIT_NOT_RUN = 9, 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ssm_forge.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    check = commands.add_parser("check", help="compare the kernels with float64 references")
    extent = check.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="forward and backward, some seconds (default)")
    extent.add_argument("--full", action="store_true", help="every mode that upstream supports")
    check.add_argument("--only", default="", metavar="TEXT", help="only checks whose name contains TEXT")
    check.add_argument("--limit", type=float, metavar="SECONDS", help="report what is left as not run")
    check.add_argument("--seed", type=int, help="repeat a run (default: a new seed)")
    _shared(check)

    selftest = commands.add_parser("selftest", help="test references and checks on the CPU, faults injected")
    _shared(selftest)
    return parser


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON document here, too")
    parser.add_argument(
        "--allow-missing-gpu", action="store_true", help="exit 0 where nothing could run for want of a GPU"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check(options: argparse.Namespace) -> dict[str, Any]:
    from ssm_forge.kernels import blocks, checks, machine, plans, tolerance

    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little")
    # The blocks come last: their Triton kernels are tuned on first use, which takes a while.
    extent = plans.full() + blocks.full() if options.full else plans.quick()
    chosen = [p for p in extent if options.only in p.name]
    document = {**machine.header(seed), "extent": "full" if options.full else "quick"}
    document["tolerance"] = f"{tolerance.STATEMENT}; {blocks.STATEMENT}"
    reason = machine.missing_gpu()
    broken = "" if reason else machine.missing_packages()
    if reason or broken:
        status = checks.NOT_RUN if reason else checks.FAIL
        results = [
            checks.Check(p.name, status, reason or f"the packages don't load: {broken}") for p in chosen
        ]
    else:
        import torch

        from ssm_forge.kernels.backends import installed

        _say(f"seed {seed}")
        results = checks.run_plans(
            chosen,
            installed(),
            torch.device("cuda"),
            seed,
            on_done=lambda c: _say(f"{c.status:8} {c.name} ({c.seconds:.1f} s): {c.detail}"),
            deadline=None if options.limit is None else time.monotonic() + options.limit,
        )
    document["checks"] = [c.as_dict() for c in results]
    return document


def _selftest(options: argparse.Namespace) -> dict[str, Any]:
    from ssm_forge.kernels import machine, selftest

    results = selftest.run(lambda c: _say(f"{c.status:8} {c.name} ({c.seconds:.1f} s) {c.detail}"))
    return {**machine.header(), "checks": [c.as_dict() for c in results]}


def exit_code(document: dict[str, Any], *, allow_missing_gpu: bool) -> int:
    """0 when something ran and all passed; 9 when something failed; 3 when nothing could run."""
    statuses = [c["status"] for c in document["checks"]]
    if "fail" in statuses:
        return EXIT_FAIL
    if "pass" in statuses:
        return 0
    return 0 if allow_missing_gpu and document["device"] is None else EXIT_NOT_RUN


def _publish(document: dict[str, Any], options: argparse.Namespace) -> None:
    text = json.dumps(document, indent=2)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
        return
    for check in document["checks"]:
        print(f"{check['status']:8} {check['name']}: {check['detail']}")


def main() -> int:
    options = _parser().parse_args()
    commands = {"check": _check, "selftest": _selftest}
    document = commands[options.command](options)
    _publish(document, options)
    return exit_code(document, allow_missing_gpu=options.allow_missing_gpu)


if __name__ == "__main__":
    sys.exit(main())
