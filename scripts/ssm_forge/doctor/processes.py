"""Other programs, asked with a time limit: they may fail, hang or write anything."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

_MOST_OUTPUT_BYTES = 4 << 20
_MOST_WRITTEN_BYTES = 64 << 20


@dataclass(frozen=True)
class Answer:
    """How a program ended.

    Attributes:
        code: its exit status, negative for a signal; None where it did not end in time, 127 where it did not start.
        output: what it wrote to standard output, at most 4 MiB.
        errors: what it wrote to standard error.
    """

    code: int | None
    output: str
    errors: str


def _limit() -> None:
    """In the new process: a crash leaves no core file, and a program that writes without end is stopped."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_WRITTEN_BYTES, _MOST_WRITTEN_BYTES))


class Program:
    """A program that was started, in a process group of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: str | None = None) -> None:
        # Files, not pipes: nobody reads while the program runs.
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        self._failure = ""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._out,
                stderr=self._err,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
                preexec_fn=_limit,
            )
        except (OSError, ValueError) as error:
            self._failure = str(error)

    def answer(self, seconds: float) -> Answer:
        """How the program ended, waited for at most ``seconds``; then it is killed with all that it started."""
        if self._process is None:
            return Answer(127, "", self._failure)
        code: int | None
        try:
            code = self._process.wait(max(seconds, 0.05))
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        return Answer(code, self._text(self._out), self._text(self._err))

    def _text(self, stream: IO[bytes]) -> str:
        with stream:
            stream.seek(0)
            return stream.read(_MOST_OUTPUT_BYTES).decode("utf-8", "replace")


def ask(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> Answer:
    """Run a short program with these environment variables to its end, at most ``seconds``."""
    return Program(command, environment).answer(seconds)


class Clock:
    """How much of the time for everything is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, share: float = 1.0) -> float:
        """Seconds until the end, or that share of them; at least 0."""
        return max(0.0, share * (self._end - time.monotonic()))
