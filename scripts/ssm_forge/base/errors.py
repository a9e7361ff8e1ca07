"""Every error a user can be shown: what is wrong, what was found, the command that fixes it.

Each class has its own exit code, so that scripts can tell the causes apart.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ForgeError(Exception):
    """A problem the user can act on.

    Args:
        what: one sentence saying what is wrong, with what was found.
        fix: the command or step that fixes it, as one sentence; may be empty.
        log: path of the full log, where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, fix: str = "", log: object = None) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.log = log
        # What doctor says to it; told after the message.
        self.advice = ""

    def __str__(self) -> str:
        parts = [self.what]
        if self.fix:
            parts.append(self.fix)
        if self.log:
            parts.append(f"(full log: {self.log})")
        return " ".join(parts)


class UsageError(ForgeError):
    """An argument that names nothing that exists."""

    exit_code = 2


class MachineError(ForgeError):
    """The machine lacks something: compiler, Python headers, disk, memory, a tool."""

    exit_code = 3


class NetworkError(ForgeError):
    """A registry or channel could not be reached, or answered with an error."""

    exit_code = 4


class IntegrityError(ForgeError):
    """Bytes that are not the bytes that were locked."""

    exit_code = 5


class SolveError(ForgeError):
    """No set of packages satisfies the requirements."""

    exit_code = 6


class BuildError(ForgeError):
    """Compiling or packaging failed."""

    exit_code = 7


class InstallError(ForgeError):
    """An environment could not be created or changed."""

    exit_code = 8


class VerifyError(ForgeError):
    """A check of an installed environment failed."""

    exit_code = 9


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """``Did you mean 'cu130'? ``, to be put before what else there is to say; empty when no word is near.

    Args:
        words: those that would have been right.
    """
    spelled = {name.lower(): name for name in words}
    near = difflib.get_close_matches(word.lower(), spelled, n=1)
    return f"Did you mean '{spelled[near[0]]}'? " if near else ""
