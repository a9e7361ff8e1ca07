"""``python`` and ``shell``: programs inside an installed environment, in place of this process."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ssm_forge.base.activation import activated_environment
from ssm_forge.base.errors import UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.install import registry
from ssm_forge.verify import emulator
from ssm_forge.verify.installed import choose_prefix

_PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def _prefix(variant: str | None, prefix: Path | None) -> Path:

    if prefix is None and variant is not None:
        prefix = registry.prefix_of(variant, workspace())
    return choose_prefix(prefix)


def _replace_process(prefix: Path, command: list[str]) -> None:

    environment = activated_environment(prefix)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise UsageError(f"{command[0]} could not be started in {prefix} ({error.strerror}).") from error


@click.command(context_settings=_PASS_ON)
@click.option("--variant", help="Use the environment of this variant.")
@click.option("--prefix", type=click.Path(path_type=Path), help="Use this environment.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def python(variant: str | None, prefix: Path | None, args: tuple[str, ...]) -> None:
    """Run the environment's Python with ARGS (the environment installed last, unless one is named)."""
    chosen = _prefix(variant, prefix)
    platform = emulator.foreign(chosen)
    emulated_by = emulator.find(platform, workspace()).command if platform is not None else ()
    _replace_process(chosen, [*emulated_by, str(chosen / "bin/python"), *args])


@click.command(context_settings=_PASS_ON)
@click.option("--variant", help="Use the environment of this variant.")
@click.option("--prefix", type=click.Path(path_type=Path), help="Use this environment.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def shell(variant: str | None, prefix: Path | None, args: tuple[str, ...]) -> None:
    """Open $SHELL inside the environment, or run ARGS in it."""
    chosen = _prefix(variant, prefix)
    _replace_process(chosen, list(args) or [os.environ.get("SHELL", "/bin/bash")])
