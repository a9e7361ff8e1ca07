"""``test``: the tiers of this repository's tests."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys

import click

from ssm_forge.base.own_tools import require
from ssm_forge.base.paths import workspace
from ssm_forge.base.ui import say
from ssm_forge.upkeep import tiers


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--fast", is_flag=True, help="Lint, types and unit tests only: the inner loop.")
@click.option("--all", "everything", is_flag=True, help="Every test for every variant: before a release.")
@click.option("--strict-skips", is_flag=True, help="Fail for a skip that tests/skips.toml does not expect.")
@click.option("--random-order", "seed", metavar="SEED", default="", help="Unit and server tests in a random order.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def test(fast: bool, everything: bool, strict_skips: bool, seed: str, args: tuple[str, ...]) -> None:
    """Run the tests: lint, types, unit tests, servers, and the main job of one variant from nothing.

    With ARGS only pytest, with these arguments. SSM_FORGE_TEST_VARIANT names the variant; else it changes every day.
    """
    # mypy reads what every module imports; pixi's environments have only some of it, ./run's own tools all.
    require("mypy", "pytest_randomly", "ruff", "xdist", "cryptography", "cyclonedx", "starlette", "uvicorn")
    root = workspace().root
    if args:
        raise SystemExit(subprocess.run([sys.executable, "-m", "pytest", *args], cwd=root, check=False).returncode)
    if fast and everything:
        raise click.UsageError("--fast and --all exclude each other.")
    tier = tiers.FAST if fast else tiers.ALL if everything else tiers.MIDDLE
    variant = tiers.variant_of_the_day(datetime.date.today(), os.environ.get(tiers.VARIANT_VARIABLE, ""))
    if tier == tiers.MIDDLE:
        say(f"The main job is that of {variant} today; {tiers.VARIANT_VARIABLE} names another.")
    results = tiers.run(tiers.steps(tier, root, strict=strict_skips, seed=seed, variant=variant), root)
    tiers.show(results, tier)
    raise SystemExit(next((result.returncode for result in results if result.returncode), 0))
