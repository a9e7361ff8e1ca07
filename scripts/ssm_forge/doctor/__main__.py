"""``python -m ssm_forge.doctor`` and ``ssm-forge-doctor.pyz``: as ``./run doctor``, with any Python from 3.8 on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ssm_forge.doctor.app import WAIT_SECONDS, run
from ssm_forge.doctor.report import LANGUAGES


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and examine; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="ssm-forge-doctor",
        description="Why an environment's Mamba kernels don't work, and the command that mends it.",
    )
    parser.add_argument("env", nargs="?", help="folder of the environment  [default: the one of this Python]")
    parser.add_argument("--python", metavar="EXE", help="the environment's interpreter, instead of its folder")
    parser.add_argument("--log", metavar="FILE|-", help="read the log of a failed build or import instead")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--report", metavar="FILE", help="write a report to send, without secrets and home folders")
    parser.add_argument(
        "--wait", type=float, default=WAIT_SECONDS, help="seconds for everything  [default: %(default)s]"
    )
    parser.add_argument("--network", action="store_true", help="also ask which channels and registries answer")
    parser.add_argument("--lang", choices=LANGUAGES, help="language of the explanations  [default: by LANG]")
    options = parser.parse_args(arguments)
    return run(
        location=Path(options.python or options.env or sys.executable)
        if options.python or options.env or not options.log
        else None,
        log=options.log,
        variables=dict(os.environ),
        folder=Path.cwd(),
        as_json=options.json,
        report=Path(options.report) if options.report else None,
        seconds=options.wait,
        language=options.lang,
        network=options.network,
    )


def guarded() -> int:
    """:func:`main` for a process: whatever happens is an exit code and at most one line, never a traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"error: {reason} This is a bug in ssm-forge-doctor; please report it.", file=sys.stderr)
        return 70


if __name__ == "__main__":
    sys.exit(guarded())
