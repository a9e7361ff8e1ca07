"""What the user sees: one console, progress bars, and a log file for everything else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from ssm_forge.base.credentials import redact

# Progress and messages go to stderr, so that --json and piped results on stdout stay clean. Text is shown as it is:
# paths and other people's words hold brackets and colons too, so that style is given with a Text, never inside a str.
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(message: str | Text) -> None:
    """One line of progress for people."""
    console.print(message)


def note(message: str) -> None:
    """Something that people should know, and that stops nothing."""
    say(Text.assemble(("note:", "yellow"), f" {message}"))


def download_progress() -> Progress:
    """A progress bar that counts bytes."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=not console.is_terminal,
    )


def step_progress() -> Progress:
    """A progress bar that counts things done."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


class Log:
    """A log file with elapsed seconds before each line; secrets in URLs never get into it."""

    def __init__(self, path: Path, stream: IO[str]) -> None:
        self.path = path
        self._stream = stream
        self._start = time.monotonic()

    def __call__(self, message: str) -> None:
        elapsed = time.monotonic() - self._start
        for line in redact(message).rstrip("\n").splitlines():
            self._stream.write(f"[{elapsed:8.1f}] {line}\n")
        self._stream.flush()


@contextmanager
def open_log(folder: Path, name: str) -> Iterator[Log]:
    """Open ``folder/name-<time>.log``; the twenty newest of a name are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob(f"{name}-*.log"))[:-19]:
        old.unlink(missing_ok=True)
    path = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    with path.open("a", encoding="utf-8") as stream:
        log = Log(path, stream)
        log(f"command: {' '.join(sys.argv)}")
        yield log


def human_bytes(count: float) -> str:
    """Bytes as people read them: ``2.4 GB`` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Seconds as people read them: ``4 min 37 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
