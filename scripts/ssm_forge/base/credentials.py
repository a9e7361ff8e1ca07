"""Who we are to a server: credentials from the standard places, and their removal from everything we print.

The engine (solve, install, index, hosted uploads) reads ``RATTLER_AUTH_FILE``, the keyring, the file that
``rattler auth login`` writes, and netrc by itself. This module reads the same places, in the same order, for
the requests that we make, and hands ``SSM_FORGE_CHANNEL_TOKEN`` to the engine. Nothing here ever takes a
secret from a command line or from a URL.
"""

from __future__ import annotations

import base64
import contextlib
import json
import netrc
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ssm_forge.base.errors import UsageError
from ssm_forge.base.foreign import json_from, read_bytes

TOKEN_VARIABLE = "SSM_FORGE_CHANNEL_TOKEN"

_USERINFO = re.compile(r"(?<=://)[^/\s@'\"]+@")
_URL = re.compile(r"(?i)\b(?!file:)[a-z][a-z0-9+.-]*://[^\s'\"]*")
_CONDA_TOKEN = re.compile(r"/t/[^/\s'\"]+")
# A request's path as servers and the engine print it, without its host.
_BARE_TOKEN = re.compile(r"(?<![\w./:-])/t/[^/\s'\"]+(?=/(?:noarch|simple|(?:linux|osx|win)-[a-z0-9]+)\b)")
_HEADER = re.compile(r"(?i)(\bbearer\s+|\bauthorization\W{1,4}(?:basic\s+|token\s+)?)[A-Za-z0-9._~+/=-]{8,}")
_QUERY = re.compile(r"(?i)([?&][^=&\s]*(?:token|key|secret|signature|password|credential)[^=&\s]*=)[^&\s'\"]+")
_HIDDEN = "********"
# Neither the end of a header's line, nor, in a path, of a folder's name.
_TOKENS = {"bearer": re.compile(r"[!-~]+"), "conda": re.compile(r"(?!\.+$)[A-Za-z0-9._~%+=:-]+")}


@dataclass(frozen=True)
class Credential:
    """What a server is shown.

    Attributes:
        username: for basic authentication; empty for a token.
        secret: password or token; never part of ``repr``.
        kind: ``basic``, ``bearer`` or ``conda`` (a token in the path, as Quetz and anaconda.org take it).
        source: where it was found, for messages.
    """

    username: str
    secret: str = field(repr=False)
    kind: str
    source: str

    @property
    def header(self) -> str:
        """The value of an ``Authorization`` header."""
        if self.kind == "basic":
            return "Basic " + base64.b64encode(f"{self.username}:{self.secret}".encode()).decode()
        return f"Bearer {self.secret}"


def redact(text: str) -> str:
    """``text`` without user names, passwords and tokens in URLs, headers and queries; a folder ``t`` is no secret."""
    text = _USERINFO.sub(f"{_HIDDEN}@", text)
    text = _URL.sub(lambda url: redact_path(url.group()), text)
    text = _BARE_TOKEN.sub(f"/t/{_HIDDEN}", text)
    text = _QUERY.sub(rf"\g<1>{_HIDDEN}", text)
    return _HEADER.sub(rf"\g<1>{_HIDDEN}", text)


def redact_path(path: str) -> str:
    """The path of a request, or an URL, without a token in it."""
    return _CONDA_TOKEN.sub(f"/t/{_HIDDEN}", path)


def require_clean(url: str) -> str:
    """``url``, when it holds no secret.

    Raises:
        UsageError: when it does: every user of a machine sees command lines, and they end up in logs.
    """
    if redact(url) != url:
        raise UsageError(
            f"{redact(url)} holds a secret, and command lines are no place for one.",
            fix=f"Leave it out, and put it into RATTLER_AUTH_FILE, netrc, the keyring or {TOKEN_VARIABLE}.",
        )
    return url


def find(url: str) -> Credential | None:
    """The credential for a URL's host, or None when no place has one.

    Raises:
        UsageError: when a file that should hold it can't be read.
    """
    host = urlsplit(url).hostname or ""
    if not host:
        return None
    for look_up in (_from_environment, _from_auth_file, _from_keyring, _from_default_file, _from_netrc):
        credential = look_up(host)
        if credential is not None:
            return credential
    return None


# What RATTLER_AUTH_FILE was outside of each for_engine() that is open, the outermost first.
_outside: list[str | None] = []


@contextlib.contextmanager
def for_engine() -> Iterator[None]:
    """While inside, the engine and child processes know the tokens of ``SSM_FORGE_CHANNEL_TOKEN`` too.

    They are passed in a file without a name, in memory, which only this user can read and which is gone with this
    process, however it ends.
    """
    tokens = _environment_tokens()
    if not tokens:
        yield
        return
    before = os.environ.get("RATTLER_AUTH_FILE")
    entries = _read_auth_file(Path(before)) if before else {}
    entries.update({host: {"BearerToken": token} for host, token in tokens.items()})
    with os.fdopen(os.memfd_create("ssm-forge-auth"), "w", encoding="utf-8") as stream:
        os.fchmod(stream.fileno(), 0o600)
        json.dump(entries, stream)
        stream.flush()
        _outside.append(before)
        # Not /proc/self: children read it too.
        os.environ["RATTLER_AUTH_FILE"] = f"/proc/{os.getpid()}/fd/{stream.fileno()}"
        try:
            yield
        finally:
            _outside.pop()
            if before is None:
                os.environ.pop("RATTLER_AUTH_FILE", None)
            else:
                os.environ["RATTLER_AUTH_FILE"] = before


def environment_outside() -> dict[str, str]:
    """The environment for a program that takes this process's place: without what :func:`for_engine` put there."""
    environment = dict(os.environ)
    if _outside:
        environment.pop("RATTLER_AUTH_FILE", None)
        if _outside[0] is not None:
            environment["RATTLER_AUTH_FILE"] = _outside[0]
    return environment


def _environment_tokens() -> dict[str, str]:
    """``HOST=TOKEN`` pairs, separated by spaces: a token without a host would be shown to every server."""
    tokens = {}
    for pair in os.environ.get(TOKEN_VARIABLE, "").split():
        host, equals, token = pair.partition("=")
        if not equals or not host or not token:
            raise UsageError(
                f"{TOKEN_VARIABLE} must be HOST=TOKEN, several separated by spaces.",
                fix=f"For example {TOKEN_VARIABLE}=conda.lab.example=TOKEN.",
            )
        # A colon alone is before a port; an address of IPv6 has more, and brackets only where a port may follow.
        if "/" in host or "[" in host or host.count(":") == 1:
            raise UsageError(
                f"{TOKEN_VARIABLE} gives a token to {host}, but a token belongs to a host, whatever the port.",
                fix=f"Write {TOKEN_VARIABLE}={_host_of(host)}=TOKEN.",
            )
        tokens[host] = token
    return tokens


def _host_of(text: str) -> str:
    """The host's name alone in a text like ``https://host:8400`` or ``host:8400``."""
    try:
        return urlsplit(text if "//" in text else f"//{text}").hostname or "conda.lab.example"
    except ValueError:  # Brackets that don't match.
        return "conda.lab.example"


def _from_environment(host: str) -> Credential | None:
    token = _environment_tokens().get(host)
    return Credential("", token, "bearer", TOKEN_VARIABLE) if token else None


def _from_auth_file(host: str) -> Credential | None:
    path = os.environ.get("RATTLER_AUTH_FILE")
    return _entry(_read_auth_file(Path(path)), host, "RATTLER_AUTH_FILE") if path else None


def _from_default_file(host: str) -> Credential | None:
    path = Path("~/.rattler/credentials.json").expanduser()
    return _entry(_read_auth_file(path), host, str(path)) if path.exists() else None


def _from_keyring(host: str) -> Credential | None:
    try:
        import keyring
        import keyring.errors
    except ImportError:
        return None
    try:
        stored = keyring.get_password("rattler", host)
        return _credential(json_from(stored.encode()), "the keyring") if stored else None
    except (keyring.errors.KeyringError, ValueError):
        return None  # No keyring on this machine (a server, a container) is the normal case.


def _from_netrc(host: str) -> Credential | None:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not path.exists():
        return None
    try:
        entry = netrc.netrc(path).hosts.get(host)
    except (OSError, netrc.NetrcParseError, ValueError, RecursionError) as error:
        # The error quotes the line it stumbled over, which may be a password.
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        raise UsageError(f"{path} can't be read{where}.", fix="Correct the file.") from None
    return _clean(Credential(entry[0], entry[2] or "", "basic", str(path))) if entry else None


def _read_auth_file(path: Path) -> dict[str, Any]:
    try:
        data = json_from(read_bytes(path.expanduser()))
    except OSError as error:
        raise UsageError(
            f"{path}, the file with credentials, can't be read ({error.strerror}).",
            fix="Correct RATTLER_AUTH_FILE.",
        ) from error
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise UsageError(f"{path}, the file with credentials, is not a JSON object.", fix="Correct the file.")
    return data


def _entry(entries: Mapping[str, Any], host: str, source: str) -> Credential | None:
    """The entry of a host, or of the nearest ``*.domain`` above it."""
    names = [host]
    parts = host.split(".")
    names += ["*." + ".".join(parts[index:]) for index in range(len(parts))]
    for name in names:
        if name in entries:
            return _credential(entries[name], source)
    return None


def _credential(entry: Any, source: str) -> Credential | None:
    if not isinstance(entry, dict):
        return None
    basic = entry.get("BasicHTTP")
    if "BearerToken" in entry:
        credential = Credential("", entry["BearerToken"], "bearer", source)
    elif "CondaToken" in entry:
        credential = Credential("", entry["CondaToken"], "conda", source)
    elif isinstance(basic, dict):
        credential = Credential(basic.get("username", ""), basic.get("password", ""), "basic", source)
    else:
        return None
    return _clean(credential)


def _clean(credential: Credential) -> Credential:
    """A credential that a request can hold: a token becomes part of its header or path as it is.

    Raises:
        UsageError: for any other; never says which.
    """
    secret, plain = credential.secret, _TOKENS.get(credential.kind)
    fits = isinstance(credential.username, str) and isinstance(secret, str)
    if not fits or (plain and not plain.fullmatch(secret)) or not _encodes(credential.username, secret):
        raise UsageError(
            f"{credential.source} has a credential that is no text, or that no request can hold.", fix="Correct it."
        )
    return credential


def _encodes(*texts: str) -> bool:
    try:
        return bool([text.encode() for text in texts])
    except UnicodeEncodeError:
        return False
