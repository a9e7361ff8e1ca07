"""``verify``: whether an installed environment works."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ssm_forge.base.errors import VerifyError
from ssm_forge.base.paths import workspace
from ssm_forge.base.ui import out, say
from ssm_forge.existing import check
from ssm_forge.existing.plan import applies, require_existing
from ssm_forge.existing.reader import folder_of
from ssm_forge.flow import advice
from ssm_forge.verify import emulator, gpu
from ssm_forge.verify import installed as checks
from ssm_forge.verify import report as verify_report


@click.command()
@click.option("--prefix", type=click.Path(path_type=Path), help="Environment to check.  [default: the last one]")
@click.option("--target", type=click.Path(path_type=Path), help="The folder that install-mamba was given.")
@click.option("--full", is_flag=True, help="On a GPU: every mode of both kernels, the blocks, and generation.")
@click.option("--upstream", is_flag=True, help="On a GPU: upstream's own tests, one by one.")
@click.option("--sanitize", is_flag=True, help="On a GPU: compute-sanitizer over the kernels.")
@click.option("--allow-missing-gpu", is_flag=True, help="Exit 0 where those could not run for want of a GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(
    prefix: Path | None,
    target: Path | None,
    full: bool,
    upstream: bool,
    sanitize: bool,
    allow_missing_gpu: bool,
    as_json: bool,
) -> None:
    """Prove that an installed environment works; exit 9 when a check fails, 3 when what was asked for could not run."""

    existing = applies(prefix, workspace(), target)
    require_existing(existing, {"--target": target})
    checked_prefix = existing.prefix if existing else checks.choose_prefix(folder_of(prefix))
    report = check.run(existing) if existing else checks.verify(checked_prefix)
    extras = [name for name, on in (("full", full), ("upstream", upstream), ("sanitize", sanitize)) if on]
    gpu_document = None
    if extras:
        gpu_document = gpu.extras(check.place(existing) if existing else gpu.of_conda(checked_prefix), extras)
    if as_json:
        out.print_json(json.dumps(report.as_dict() | ({"gpu": gpu_document} if gpu_document else {})))
    else:
        verify_report.show(report)
        if gpu_document:
            gpu.show(gpu_document, "kernels")
    if report.failed:
        # The doctor asks programs of the environment, which don't run here where it is for another platform.
        silent = as_json or emulator.foreign(checked_prefix) is not None
        if finding := "" if silent else advice.of_environment(checked_prefix):
            say(finding)
        raise SystemExit(VerifyError.exit_code)
    if gpu_document:
        raise SystemExit(gpu.exit_code(gpu_document, allow_missing_gpu=allow_missing_gpu))
