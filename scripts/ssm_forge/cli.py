"""The command line: one command per task, each in a module under ``commands``.

Command modules are imported on demand, so that a task that has nothing to do takes no time.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from ssm_forge.base.credentials import redact
from ssm_forge.base.ending import end
from ssm_forge.base.errors import ForgeError, MachineError, did_you_mean
from ssm_forge.base.locks import NOT_THERE
from ssm_forge.base.own_tools import require
from ssm_forge.base.paths import launcher, workspace
from ssm_forge.base.ui import console

# Task -> (module under commands, one line of help). The same names as the tasks of pixi.toml.
COMMANDS: dict[str, tuple[str, str]] = {
    "install-mamba": ("install_mamba", "Build what is missing, install the kernels, verify them."),
    "verify": ("verify", "Prove that an installed environment works."),
    "doctor": ("doctor", "Say why an environment's kernels don't work, and what mends it."),
    "python": ("activated", "Run Python inside the installed environment, activated."),
    "shell": ("activated", "Open a shell inside the installed environment, activated."),
    "variants": ("variants", "Show the build matrix: available, built, installed."),
    "bump": ("bump", "For maintainers: newer releases and parts, patches re-applied."),
    "check-toolchain": ("check_toolchain", "Check glibc, g++, nvcc, cuDNN and torch of a variant."),
    "test": ("test", "Run the tests: unit tests, then the real thing."),
    "build": ("build", "Build what the channel lacks, install nothing; or only solve it (--solve-only)."),
    "farm": ("farm", "Build many packages of the matrix, on this machine or on a cluster."),
    "ci-matrix": ("ci_matrix", "Write a workflow that builds the matrix: GitHub Actions or GitLab CI."),
    "reproduce": ("reproduce", "Rebuild a package from its own metadata and show where the two differ."),
    "lock": ("lock", "Write pixi.lock, check it against pixi.toml, or show what changed."),
    "bench": ("bench", "Measure the kernels (bench kernels) against this GPU and plain PyTorch."),
    "bundle": ("bundle", "Pack packages and checks for a machine with only Python, torch and a GPU."),
    "env": ("env", "Make an environment from pixi.lock alone, or verify one against it."),
    "export": ("export", "Write a locked environment in another tool's format, or its bill of materials."),
    "pack": ("pack", "Write one archive that installs an environment with no network at all."),
    "unpack": ("pack", "Install what pack wrote, with no network at all."),
    "publish": ("publish", "Publish built packages to a channel: folder, server, S3, Quetz, Artifactory."),
    "serve": ("serve", "Serve the local channel over HTTP with read and write tokens."),
    "channel": ("channel", "Check, prune or mirror a channel, show what it covers, make a signing key."),
}

# Task -> libraries that its module needs as soon as it is imported, and that a pixi environment may lack.
_LIBRARIES = {"serve": ("starlette", "uvicorn")}

# What a full, read-only or foreign folder answers: no bug, wherever it is met.
_MACHINE_ERRORS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT})


class Tasks(click.Group):
    """Loads a task's module when the task is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all tasks, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a task, None for a name that no task has; its module is imported now."""
        if cmd_name not in COMMANDS:
            return None
        require(*_LIBRARIES.get(cmd_name, ()))
        module = importlib.import_module(f"ssm_forge.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the tasks with their lines of help, without importing their modules."""
        with formatter.section("Tasks"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.command(cls=Tasks, context_settings={"help_option_names": ["-h", "--help"]})
def tasks() -> None:
    """causal-conv1d and mamba-ssm as conda packages with real CUDA kernels: built, installed, proven."""


def _save_traceback() -> Path:
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    text = redact(f"command: {' '.join(sys.argv)}\n\n{traceback.format_exc()}")
    for logs in (workspace().logs, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            logs.mkdir(parents=True, exist_ok=True)
            (logs / name).write_text(text, encoding="utf-8")
            return logs / name
    return Path("(no log: no folder could be written)")


def _fail(message: str, code: int) -> int:
    console.print("error:", style="red", end=" ")
    console.print(redact(message))
    return code


def _go_to_caller() -> None:
    """Change to the folder that the user is in: pixi runs its tasks in the workspace and says where it was called."""
    root, caller = os.environ.get("PIXI_PROJECT_ROOT", ""), os.environ.get("INIT_CWD", "")
    if root and caller and Path(root).resolve() == workspace().root == Path.cwd():
        os.chdir(caller)


def run() -> int:
    """Run the task that the command line names; every outcome is an exit code and at most one clear message."""
    try:
        _go_to_caller()
        code = tasks.main(prog_name=launcher(), standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (click.Abort, KeyboardInterrupt):
        console.print("stopped", style="yellow", end=": ")
        console.print("run the same command again to go on where it was.")
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else launcher()
        if isinstance(error, click.NoSuchOption) and error.possibilities:
            # Sorted by the alphabet; the nearest one is what was meant.
            nearest = difflib.get_close_matches(error.option_name, error.possibilities, n=1)
            error = click.NoSuchOption(error.option_name, possibilities=nearest, ctx=error.ctx)
        return _fail(f"{error.format_message()} {_nearest(error)}See '{path} --help'.", error.exit_code)
    except ForgeError as error:
        code = _fail(str(error), error.exit_code)
        if error.advice:
            console.print(redact(error.advice))
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        # The reader went away (`| head`); nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno in _MACHINE_ERRORS:
            message = f"{error.filename or 'a file'} can't be written or read ({error.strerror})."
            return _fail(f"{message} Correct the rights or free space, and run again.", MachineError.exit_code)
        if error.errno in NOT_THERE:
            message = f"the file system of {error.filename or 'a folder'} can't do what is needed ({error.strerror})."
            fix = "Set SSM_FORGE_CACHE_DIR, or the folder that you named, to one on a local disk, and run again."
            return _fail(f"{message} {fix}", MachineError.exit_code)
        return _crash(error)
    except Exception as error:
        return _crash(error)


def _nearest(error: click.ClickException) -> str:
    """The task, subcommand or choice that a mistyped one is near to; click itself does it for options."""
    message = error.format_message()
    context, kind = getattr(error, "ctx", None), getattr(getattr(error, "param", None), "type", None)
    names: Sequence[str] = ()
    if "No such command" in message and context and isinstance(context.command, click.Group):
        names = context.command.list_commands(context)
    elif "is not one of" in message and isinstance(kind, click.Choice):
        names = [str(choice) for choice in kind.choices]
    word = re.search(r"'([^']+)'(?:\.| is not one of)", message)
    # Newer releases of click name the nearest subcommand themselves.
    return did_you_mean(word.group(1), names) if word and "Did you mean" not in message else ""


def _crash(error: Exception) -> int:
    path = _save_traceback()
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return _fail(f"{message} This is a bug in ssm-forge; please report it with {path}.", 70)


def main() -> None:
    """Run a task and end the process with its exit code."""
    end(run())
