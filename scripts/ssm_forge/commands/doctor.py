"""``doctor``: why an environment's kernels don't work, or a build failed, and the command that mends it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import click

from ssm_forge.base.paths import workspace
from ssm_forge.base.ui import out
from ssm_forge.doctor import app, docs, pyz
from ssm_forge.doctor.report import LANGUAGES
from ssm_forge.flow.advice import users_variables
from ssm_forge.install.registry import installed_prefixes


@click.command()
@click.argument("env", required=False, type=click.Path(path_type=Path))
@click.option(
    "--python", metavar="EXE", type=click.Path(path_type=Path), help="Its interpreter, instead of its folder."
)
@click.option("--log", metavar="FILE|-", help="Read the log of a failed build or import instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--report", metavar="FILE", type=click.Path(path_type=Path), help="Write a report that can be sent.")
@click.option(
    "--wait", metavar="SECONDS", type=float, default=app.WAIT_SECONDS, show_default=True, help="For everything."
)
@click.option("--network", is_flag=True, help="Also ask which channels and registries answer.")
@click.option("--lang", type=click.Choice(LANGUAGES), help="Language of the explanations.  [default: by LANG]")
@click.option(
    "--write-pyz", metavar="FILE", type=click.Path(path_type=Path), help="Write doctor as one file, and stop."
)
@click.option("--write-docs", is_flag=True, help="For maintainers: write docs/doctor.md from the rules, and stop.")
def doctor(
    env: Path | None,
    python: Path | None,
    log: str | None,
    as_json: bool,
    report: Path | None,
    wait: float,
    network: bool,
    lang: str | None,
    write_pyz: Path | None,
    write_docs: bool,
) -> None:
    """Say why an environment's kernels don't work, and the command that mends it; exit 9 when something is broken.

    ENV is the folder of any environment: conda, pixi, uv, venv. Nothing in it is changed.
    """
    if write_pyz is not None:
        pyz.write(write_pyz)
        out.print(f"{write_pyz} ({write_pyz.stat().st_size // 1000} kB)")
        return
    if write_docs:
        path = workspace().root / "docs/doctor.md"
        path.write_text(docs.text(), encoding="utf-8")
        out.print(str(path))
        return
    variables = users_variables(os.environ)
    code = app.run(
        location=python or env or (None if log else _default(variables)),
        log=log,
        variables=variables,
        folder=Path.cwd(),
        as_json=as_json,
        report=report,
        seconds=wait,
        language=lang,
        network=network,
    )
    raise SystemExit(code)


def _default(variables: Mapping[str, str]) -> Path:
    """The environment that is active; else the one installed last here; else that of the Python on PATH."""
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if variables.get(name):
            return Path(variables[name])
    prefixes = installed_prefixes(workspace())
    if prefixes:
        return prefixes[0]
    for folder in variables["PATH"].split(os.pathsep):
        for name in ("python3", "python"):
            if os.access(Path(folder) / name, os.X_OK):
                return Path(folder) / name
    return Path("python3")
