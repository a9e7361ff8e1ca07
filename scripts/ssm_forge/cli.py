"""The command line: one command per task, each in a module under ``commands``.

Command modules are imported on demand, so that a task that has nothing to do takes no time.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from pathlib import Path

import click

from ssm_forge.errors import ForgeError
from ssm_forge.paths import launcher, workspace
from ssm_forge.ui import console

# Task -> (module under commands, one line of help). The same names as the tasks of pixi.toml.
COMMANDS: dict[str, tuple[str, str]] = {
    "install-mamba": ("install_mamba", "Build what is missing, install the kernels, verify them."),
    "verify": ("verify", "Prove that an installed environment works."),
    "python": ("activated", "Run Python inside the installed environment, activated."),
    "shell": ("activated", "Open a shell inside the installed environment, activated."),
    "test": ("test", "Run the tests: unit tests, then the real thing."),
    "build": ("build", "Show that the recipes fit the channels (--solve-only)."),
    "lock": ("lock", "Write pixi.lock, check it against pixi.toml, or show what changed."),
    "env": ("env", "Make an environment from pixi.lock alone, or verify one against it."),
    "export": ("export", "Write a locked environment in another tool's format, or its bill of materials."),
    "pack": ("pack", "Write one archive that installs an environment with no network at all."),
    "unpack": ("pack", "Install what pack wrote, with no network at all."),
}


class Tasks(click.Group):
    """Loads a task's module when the task is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"ssm_forge.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Tasks"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.command(cls=Tasks, context_settings={"help_option_names": ["-h", "--help"]})
def tasks() -> None:
    """causal-conv1d and mamba-ssm as conda packages with real CUDA kernels: built, installed, proven."""


def _save_traceback() -> Path:
    logs = workspace().logs
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    path.write_text(f"command: {' '.join(sys.argv)}\n\n{traceback.format_exc()}", encoding="utf-8")
    return path


def main() -> None:
    """Run a task; every outcome is an exit code and at most one clear message."""
    try:
        tasks.main(prog_name=launcher(), standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        console.print("[yellow]stopped[/]: run the same command again to go on where it was.")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ForgeError as error:
        console.print("[red]error:[/]", end=" ")
        console.print(str(error), markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.print("[yellow]stopped[/]: run the same command again to go on where it was.")
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away (`| head`); nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        path = _save_traceback()
        console.print("[red]error:[/]", end=" ")
        console.print(
            f"{type(error).__name__}: {error} This is a bug in ssm-forge; please report it with {path}.",
            markup=False,
        )
        sys.exit(70)
