from __future__ import annotations

import subprocess
import sys

import click

_PASS_ON = {"ignore_unknown_options": True}


@click.command(context_settings=_PASS_ON)
@click.option("--fast", is_flag=True, help="Lint and unit tests only: the inner loop.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def test(fast: bool, args: tuple[str, ...]) -> None:
    """Run the unit tests, then the real thing: bridge, builds, install, verify. ARGS go to pytest."""
    from ssm_forge.paths import workspace
    from ssm_forge.toolbox import require
    from ssm_forge.ui import say

    # mypy reads what every module imports, and pixi's environments have only some of it.
    require("ruff", "mypy", "cryptography", "cyclonedx", "starlette", "uvicorn")
    root = workspace().root
    for name, command in (
        ("ruff", [sys.executable, "-m", "ruff", "check", "--quiet"]),
        ("mypy", [sys.executable, "-m", "mypy", "--no-error-summary"]),
    ):
        done = subprocess.run(command, cwd=root, check=False)
        if done.returncode:
            say(f"[red]{name} found problems[/]")
            raise SystemExit(done.returncode)
        say(f"{name}: no problems")
    selection = ["-m", "not slow"] if fast else []
    done = subprocess.run([sys.executable, "-m", "pytest", *selection, *args], cwd=root, check=False)
    raise SystemExit(done.returncode)
