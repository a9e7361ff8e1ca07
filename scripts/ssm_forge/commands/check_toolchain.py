"""``check-toolchain``: whether C library, compilers, CUDA and torch of a variant fit each other."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ssm_forge.base import paths
from ssm_forge.base.errors import VerifyError
from ssm_forge.base.ui import open_log, out, say
from ssm_forge.bridge.assemble import assemble
from ssm_forge.flow import advice, plan, planning
from ssm_forge.manifest.variants import DEFAULT_VARIANT
from ssm_forge.verify import toolchain
from ssm_forge.verify.installed import choose_prefix
from ssm_forge.verify.report import show


@click.command("check-toolchain")
@click.option("--variant", default=DEFAULT_VARIANT, show_default=True, help="Row of the build matrix.")
@click.option("--python", metavar="X.Y", help="Python minor version.  [default: 3.12, else the newest]")
@click.option("--source", type=click.Choice(["auto", "conda", "bridge"]), default="auto", show_default=True)
@click.option("--host-compiler", default="auto", show_default=True, metavar="auto|system|bridge|PATH")
@click.option("--prefix", type=click.Path(path_type=Path), help="Check this environment instead of making one.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def check_toolchain(
    variant: str, python: str | None, source: str, host_compiler: str, prefix: Path | None, as_json: bool
) -> None:
    """Check glibc, g++, nvcc, cuDNN and torch of a variant; exit 9 when something does not fit."""

    workspace = paths.workspace()
    options = plan.Options(
        variant=variant,
        python=python,
        source=source,  # type: ignore[arg-type]
        host_compiler=host_compiler,
    )
    with open_log(workspace.logs, "check-toolchain") as log:
        origin = planning.origin(options, workspace)
        if prefix is not None:
            prefix = choose_prefix(prefix)
        else:
            if origin.parts is not None:
                assemble(origin.parts, workspace, log)
            prefix = toolchain.environment(origin, workspace, log)
        report = toolchain.check(prefix, origin.variant)
        log(json.dumps(report.as_dict(), indent=2))
    if as_json:
        out.print_json(json.dumps(report.as_dict()))
    else:
        show(report)
    if report.failed:
        if finding := "" if as_json else advice.of_environment(prefix, with_kernels=False):
            say(finding)
        raise SystemExit(VerifyError.exit_code)
