"""Tokens of our own channel server: random, with an expiry and one right each; only their hashes are kept."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ssm_forge.base import foreign, locks
from ssm_forge.base.errors import UsageError, did_you_mean

Right = Literal["read", "write"]

_DAY_SECONDS = 86_400
# conda takes a token in a channel's URL for as long as it consists of [a-zA-Z0-9-] only, and crashes on the rest.
# Tokens of before that held "_" are still found: a token is looked up whatever it looks like.
_PREFIX = "ssmf-"
_LETTERS = string.ascii_letters + string.digits
_SECRET_LETTERS = 43  # As many as 256 random bits need.
_FIELDS = {
    "name": foreign.is_text,
    "right": lambda value: value in ("read", "write"),
    "sha256": foreign.is_hex(64),
    "expires": foreign.is_number,
}


@dataclass(frozen=True)
class Token:
    """One token, as stored.

    Attributes:
        name: who it was given to.
        right: ``write`` includes ``read``.
        sha256: of the token itself, which is not kept.
        expires: seconds since the epoch.
    """

    name: str
    right: Right
    sha256: str
    expires: int

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return time.time() >= self.expires


class TokenStore:
    """A JSON file of tokens, readable by its owner alone. A running server sees changes at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._tokens: dict[str, Token] = {}

    def all(self) -> list[Token]:
        """Every token, expired ones too.

        Raises:
            UsageError: when the file can't be read.
        """
        self._refresh()
        return sorted(self._tokens.values(), key=lambda token: token.name)

    def find(self, secret: str) -> Token | None:
        """The stored token for a secret that somebody shows, expired or not; None when no token fits.

        Raises:
            UsageError: when the file can't be read.
        """
        self._refresh()
        # Looked up by hash: how long it takes says nothing about the secrets that are stored.
        return self._tokens.get(_hash(secret))

    def add(self, name: str, right: Right, days: float) -> str:
        """Make a token that is valid for ``days``, store its hash and return it: the only time it is seen.

        Raises:
            UsageError: when the name is taken.
        """
        secret = _PREFIX + "".join(secrets.choice(_LETTERS) for _ in range(_SECRET_LETTERS))
        with self._changing() as tokens:
            if any(token.name == name for token in tokens):
                raise UsageError(f"there is a token '{name}' already.", fix="Choose another name, or revoke it first.")
            tokens.append(Token(name, right, _hash(secret), int(time.time() + days * _DAY_SECONDS)))
        return secret

    def revoke(self, name: str) -> None:
        """Remove a token: whoever has it is refused from the next request on.

        Raises:
            UsageError: when there is no such token.
        """
        with self._changing() as tokens:
            kept = [token for token in tokens if token.name != name]
            if len(kept) == len(tokens):
                suggestion = did_you_mean(name, [token.name for token in tokens])
                raise UsageError(
                    f"there is no token '{name}'.", fix=f"{suggestion}'serve token list' shows those there are."
                )
            tokens[:] = kept

    @contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locks.held(self.path.with_name(f".{self.path.name}.lock"), "name --tokens on another file system"):
            tokens = self.all()
            yield tokens
            partial = self.path.with_name(f".{self.path.name}.part")
            partial.unlink(missing_ok=True)
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                json.dump([asdict(token) for token in tokens], stream, indent=2)
            partial.replace(self.path)
            self._seen = None

    def _refresh(self) -> None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._seen, self._tokens = None, {}
            return
        state = (status.st_mtime_ns, status.st_size, status.st_ino)
        if state == self._seen:
            return
        try:
            tokens = _read(foreign.read_bytes(self.path))
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path}, the file with the server's tokens, can't be read ({error}).") from error
        self._seen, self._tokens = state, {token.sha256: token for token in tokens}


def _read(data: bytes) -> list[Token]:
    entries = foreign.json_from(data)
    if not isinstance(entries, list):
        raise ValueError("it is no list")
    for entry in entries:
        foreign.require(entry, _FIELDS)
    return [Token(**{name: entry[name] for name in _FIELDS}) for entry in entries]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
