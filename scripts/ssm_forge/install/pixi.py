"""pixi makes its own environments from a lock, so that it knows them again; seen by the user, told in our errors."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ssm_forge.base.errors import ForgeError, InstallError, NetworkError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import Log
from ssm_forge.manifest import environments as manifests
from ssm_forge.solve.prefix import machine_virtual_packages

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\\\)")
_FRAME = re.compile(r"^[\s×│├╰─▶]+")
_NETWORK = re.compile(
    r"error sending request|failed to download|failed to fetch|dns error|timed out|connection (refused|reset)"
    r"|status (client|server) error",
    re.IGNORECASE,
)


def made(prefix: Path) -> bool:
    """Whether the environment in ``prefix`` was made by pixi."""
    return (prefix / "conda-meta/pixi").exists()


def prefix_for_kernels(prefix: Path, workspace: Workspace) -> Path:
    """``prefix``, or one beside it for the kernels where ``prefix`` is pixi's, for an environment of pixi.toml."""
    in_manifest = any(e.name == prefix.name for e in manifests.load(workspace.manifest).environments)
    kept_by_pixi = in_manifest and (bool(os.environ.get("PIXI_EXE")) or made(prefix))
    return prefix.with_name(f"{prefix.name}-kernels") if kept_by_pixi else prefix


def check_not_its_own(prefix: Path, workspace: Workspace) -> None:
    """Refuse a prefix that pixi itself keeps.

    Raises:
        UsageError: when the prefix is one that pixi keeps as a lock of this checkout says: it would take out again
            whatever was added.
    """
    if prefix.parent in (workspace.envs, workspace.source_envs) and made(prefix):
        raise UsageError(
            f"{prefix} is pixi's, which keeps it as its pixi.lock says and would take the kernels out again.",
            fix="Leave --prefix out, or name another folder.",
        )


class PixiError(Exception):
    """Raised when pixi fails, with what it printed.

    Attributes:
        error: what a user is told.
        reason: pixi's own explanation, as one line.
        output: all that pixi printed, without control characters.
    """

    def __init__(self, error: ForgeError, reason: str, output: str) -> None:
        super().__init__(str(error))
        self.error = error
        self.reason = reason
        self.output = output


def install_environment(
    variant: str, cuda: str, manifest: Path, log: Log, environment: Mapping[str, str] | None = None
) -> None:
    """Let pixi make an environment of a manifest from its lock, in the folder where pixi keeps it.

    Args:
        variant: the environment's name.
        cuda: CUDA release to assume where there is no driver: pixi refuses an environment for another machine.
        environment: more variables for pixi.

    Raises:
        PixiError: when it fails.
    """
    command = [os.environ["PIXI_EXE"], "install", "--locked", "-e", variant, "--manifest-path", str(manifest)]
    driver_cuda = next((v.version for v in machine_virtual_packages() if v.name == "__cuda"), cuda)
    code, output = _shown(command, {**os.environ, **(environment or {}), "CONDA_OVERRIDE_CUDA": driver_cuda})
    log(output)
    if code:
        reason = _reason(code, output)
        raise PixiError(_explained(command, reason, output, log), reason, output)


def why_out_of_date(manifest: Path) -> str:
    """One line on why pixi takes a manifest's lock for out of date, which it says only where it would lock anew.

    Empty where pixi says nothing. It can't tell a lock that is out of date from recipes that it can't read, for want of
    a backend for example.
    """
    command = [os.environ["PIXI_EXE"], "lock", "--dry-run", "--check", "--manifest-path", str(manifest)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return _reason(done.returncode, done.stderr) if "Error:" in done.stderr else ""


def _reason(code: int, output: str) -> str:
    """pixi's own explanation, from "Error:" on, as one line."""
    block = output.partition("Error:")[2] or output.strip().rpartition("\n")[2]
    lines = [_FRAME.sub("", line).strip() for line in block.splitlines()]
    return "; ".join(line for line in lines if line) or f"exit code {code}"


def _explained(command: Sequence[str], reason: str, output: str, log: Log) -> ForgeError:
    what = f"'{' '.join(command)}' failed: {reason.rstrip('.')}."
    if _NETWORK.search(output):
        return NetworkError(what, fix="Check the network, and the mirrors in pixi's configuration.", log=log.path)
    return InstallError(what, log=log.path)


class _Ended(NamedTuple):
    """A program that has ended: its exit code, and what it printed, without control characters."""

    code: int
    output: str


def _shown(command: Sequence[str], environment: Mapping[str, str]) -> _Ended:
    """Run a program that the user sees at work, progress bars included."""
    terminal = sys.stderr.isatty()
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
        fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
    process = subprocess.Popen(command, stdout=writer, stderr=writer, env=dict(environment))
    os.close(writer)
    output = b""
    # A terminal whose other end was closed answers with an error, a pipe with nothing.
    with contextlib.suppress(OSError):
        while chunk := os.read(reader, 1 << 16):
            output += chunk
            sys.stderr.write(chunk.decode(errors="replace"))
            sys.stderr.flush()
    os.close(reader)
    text = _CONTROL.sub("", output.decode(errors="replace")).replace("\r\n", "\n").replace("\r", "\n")
    return _Ended(process.wait(), text)
