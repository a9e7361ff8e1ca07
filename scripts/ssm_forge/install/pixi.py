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
    """Whether pixi made the environment."""
    return (prefix / "conda-meta/pixi").exists()


def beside(prefix: Path, workspace: Workspace) -> Path:
    """A prefix for the kernels: this one, or one beside it where pixi has an environment of the root's pixi.toml."""
    mine = any(e.name == prefix.name for e in manifests.load(workspace.manifest).environments)
    kept = mine and (bool(os.environ.get("PIXI_EXE")) or made(prefix))
    return prefix.with_name(f"{prefix.name}-kernels") if kept else prefix


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
    """pixi failed.

    Attributes:
        error: what a user is told.
        reason: pixi's own explanation, as one line.
        told: all that pixi said.
    """

    def __init__(self, error: ForgeError, reason: str, told: str) -> None:
        super().__init__(str(error))
        self.error = error
        self.reason = reason
        self.told = told


def install_environment(
    variant: str, cuda: str, manifest: Path, log: Log, environment: Mapping[str, str] | None = None
) -> None:
    """Let pixi make an environment of a manifest from its lock.

    Args:
        cuda: CUDA release to assume where there is no driver: pixi refuses an environment for another machine.
        environment: more variables for pixi.

    Raises:
        PixiError: when it fails.
    """
    command = [os.environ["PIXI_EXE"], "install", "--locked", "-e", variant, "--manifest-path", str(manifest)]
    driver = next((v.version for v in machine_virtual_packages() if v.name == "__cuda"), cuda)
    code, told = _shown(command, {**os.environ, **(environment or {}), "CONDA_OVERRIDE_CUDA": driver})
    log(told)
    if code:
        reason = _reason(code, told)
        raise PixiError(_explained(command, reason, told, log), reason, told)


def why_out_of_date(manifest: Path) -> str:
    """Why pixi takes a lock for another manifest's, which it says only where it would lock anew; one line.

    It can't tell a lock that is out of date from recipes that it can't read, for want of a backend for example.
    """
    command = [os.environ["PIXI_EXE"], "lock", "--dry-run", "--check", "--manifest-path", str(manifest)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return _reason(done.returncode, done.stderr) if "Error:" in done.stderr else ""


def _reason(code: int, told: str) -> str:
    """pixi's own explanation, from "Error:" on, as one line."""
    block = told.partition("Error:")[2] or told.strip().rpartition("\n")[2]
    lines = [_FRAME.sub("", line).strip() for line in block.splitlines()]
    return "; ".join(line for line in lines if line) or f"exit code {code}"


def _explained(command: Sequence[str], reason: str, told: str, log: Log) -> ForgeError:
    what = f"'{' '.join(command)}' failed: {reason.rstrip('.')}."
    if _NETWORK.search(told):
        return NetworkError(what, fix="Check the network, and the mirrors in pixi's configuration.", log=log.path)
    return InstallError(what, log=log.path)


def _shown(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a program that the user sees at work, progress bars included; its exit code, and what it told as text."""
    terminal = sys.stderr.isatty()
    read, write = pty.openpty() if terminal else os.pipe()
    if terminal:
        size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
        fcntl.ioctl(write, termios.TIOCSWINSZ, size)
    process = subprocess.Popen(command, stdout=write, stderr=write, env=dict(environment))
    os.close(write)
    told = b""
    # A terminal whose other end was closed answers with an error, a pipe with nothing.
    with contextlib.suppress(OSError):
        while chunk := os.read(read, 1 << 16):
            told += chunk
            sys.stderr.write(chunk.decode(errors="replace"))
            sys.stderr.flush()
    os.close(read)
    text = _CONTROL.sub("", told.decode(errors="replace")).replace("\r\n", "\n").replace("\r", "\n")
    return process.wait(), text
