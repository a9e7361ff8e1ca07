from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.option("--prefix", type=click.Path(path_type=Path), help="Environment to check.  [default: the last one]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(prefix: Path | None, as_json: bool) -> None:
    """Prove that an installed environment works; exit 9 when a check fails."""
    from ssm_forge import verify as checks
    from ssm_forge.errors import VerifyError
    from ssm_forge.ui import out

    report = checks.verify(checks.choose_prefix(prefix))
    if as_json:
        out.print_json(json.dumps(report.as_dict()))
    else:
        checks.show(report)
    if report.failed:
        raise SystemExit(VerifyError.exit_code)
