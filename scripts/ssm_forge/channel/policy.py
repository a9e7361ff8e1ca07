"""Which channels must prove what their packages were built from; asked before anything is linked, wherever it is.

Both ways to an environment, from a solve and from a lock, take :class:`Admitted` packages only, and :func:`admit` makes
them.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssm_forge.base import foreign
from ssm_forge.base.credentials import redact
from ssm_forge.base.errors import IntegrityError, UsageError
from ssm_forge.base.own_tools import require
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import say
from ssm_forge.base.urls import canonical, is_under, local_path
from ssm_forge.base.web import Client, whole
from ssm_forge.channel.statement import PublicKey, load_public, verify
from ssm_forge.manifest.virtual import channel_url
from ssm_forge.package.intact import require_intact

if TYPE_CHECKING:
    from rattler import RepoDataRecord


VARIABLE = "SSM_FORGE_TRUST"
Requirement = Literal["signature", "sigstore"]
# Where a package's file is on this machine, when it is not to be taken from its URL.
Beside = Callable[["RepoDataRecord"], "Path | None"]


def _nowhere(record: RepoDataRecord) -> Path | None:
    return None


def _to_nobody(line: str) -> None:
    """A log that nobody reads."""


@dataclass(frozen=True)
class Rule:
    """What one channel's packages need.

    Attributes:
        url: the channel in its one spelling (:func:`ssm_forge.base.urls.canonical`); everything under it is meant.
        require: ``signature`` by one of ``keys``, or ``sigstore`` for a bundle of an identity.
        keys: trusted public keys.
        identity: for sigstore: certificate identity, ``*`` allowed.
        issuer: for sigstore: OIDC issuer's URL.
    """

    url: str
    require: Requirement
    keys: tuple[PublicKey, ...] = ()
    identity: str = ""
    issuer: str = ""


def find(explicit: Path | None, workspace: Workspace) -> tuple[Rule, ...]:
    """The rules in force: of ``--trust``, else ``SSM_FORGE_TRUST``, else ``recipes/trust.toml``, else none.

    Raises:
        UsageError: as :func:`load`.
    """
    named = explicit or (Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None)
    if named is None:
        default = workspace.recipes / "trust.toml"
        return load(default) if default.exists() else ()
    return load(named.expanduser())


def load(path: Path) -> tuple[Rule, ...]:
    """The rules in a policy's file: ``[[channel]]`` tables with ``url``, ``require``, ``keys`` (files beside it), ...

    Raises:
        UsageError: when the file is missing or not understood in full; a policy is never half obeyed.
    """
    try:
        data = foreign.toml_from(foreign.read_bytes(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}, the trust policy, can't be read ({error}).") from error
    if set(data) - {"channel"} or not isinstance(data.get("channel"), list):
        raise UsageError(f"{path} must consist of [[channel]] tables.")
    require("cryptography")
    return tuple(_rule(entry, path) for entry in data["channel"])


def _rule(entry: Any, path: Path) -> Rule:

    requirement: Requirement = (
        "sigstore" if isinstance(entry, dict) and entry.get("require") == "sigstore" else "signature"
    )
    needed_keys = {"identity", "issuer"} if requirement == "sigstore" else {"keys"}
    is_understood = isinstance(entry, dict) and entry.get("require", requirement) == requirement
    if not is_understood or set(entry) - {"require"} != {"url", *needed_keys} or not entry["url"]:
        raise UsageError(
            f'{path}: a [[channel]] has url and keys, or url, require = "sigstore", identity and issuer, '
            f"but this one says {entry!r:.500}."
        )
    names = entry.get("keys", [])
    texts = [value for key, value in entry.items() if key != "keys"]
    if not isinstance(names, list) or not all(isinstance(text, str) for text in (*texts, *names)):
        raise UsageError(f"{path}: keys is a list of files, everything else is text, but this one says {entry!r:.500}.")
    keys = tuple(load_public(path.parent / name) for name in names)
    if not all(texts):
        raise UsageError(f"{path}: identity and issuer say whose bundles are taken, but this one says {entry!r:.500}.")
    if requirement == "signature" and not keys:
        raise UsageError(f"{path}: channel {entry['url']} requires a signature, but names no keys.")
    return Rule(_rule_url(entry["url"], path), requirement, keys, entry.get("identity", ""), entry.get("issuer", ""))


def _rule_url(text: str, path: Path) -> str:
    """What ``url`` means: an URL, a folder (beside the policy, unless it is absolute), or a channel's name."""

    try:
        if "://" not in text:
            folder = path.parent / Path(text).expanduser()
            if folder.is_dir() or text.startswith((".", "/", "~")):
                return canonical(folder.resolve().as_uri())
        return canonical(channel_url(text))
    except Exception as error:  # The engine has an error of its own for each thing that is wrong with an URL.
        raise UsageError(f"{path}: '{redact(text):.200}' is no channel ({error}).") from error


def require_used(rules: Sequence[Rule], channels: Sequence[str]) -> None:
    """Make sure that every rule is about a channel that packages are taken from.

    Raises:
        UsageError: when one is not: it may be misspelled, and would protect nothing without anybody noticing.
    """
    for rule in rules:
        if not any(is_under(channel, rule.url) for channel in channels):
            raise UsageError(
                f"the trust policy has a rule for {redact(rule.url)}, and no channel in use is there: "
                f"{', '.join(map(redact, channels))}.",
                fix="Name that channel with --channel, correct the rule, or choose another policy with --trust.",
            )


def for_channels(explicit: Path | None, channels: Sequence[str], workspace: Workspace) -> tuple[Rule, ...]:
    """The policy for what a lock describes: one that is named must be about it, one that is in force need not.

    The policy in force is about every installation on this machine, and few locks name the same channels.

    Raises:
        UsageError: when it is not understood, or a rule of one that was named is about no channel of the lock.
    """
    rules = find(explicit, workspace)
    if explicit is not None:
        require_used(rules, channels)
    return rules


@dataclass(frozen=True)
class Admitted:
    """Packages that the policy in force lets in; only :func:`admit` makes one."""

    records: tuple[RepoDataRecord, ...]


def admit(
    records: Sequence[RepoDataRecord],
    workspace: Workspace,
    rules: Sequence[Rule] | None,
    log: Callable[[str], None] = _to_nobody,
    beside: Beside = _nowhere,
) -> Admitted:
    """Let packages in that the policy allows; the gate in front of every installation.

    Args:
        rules: the policy; None for the one that is in force here (:func:`find`).
        beside: where a package's file is, and its statement with it, when that is not its URL: in a mirror's folder
            or in an archive. Nothing is asked from the network for such a package.

    Raises:
        IntegrityError: for the first package that lacks what its channel's rule asks for.
        UsageError: when the policy in force is not understood.
    """
    checked = enforce(records, find(None, workspace) if rules is None else rules, log, beside)
    if checked:
        say(f"{checked} packages come with the signed statements that the trust policy asks for")
    return Admitted(tuple(records))


def enforce(
    records: Sequence[RepoDataRecord], rules: Sequence[Rule], log: Callable[[str], None], beside: Beside = _nowhere
) -> int:
    """Check every record that rules are about, against each of them; returns how many records there were.

    Raises:
        IntegrityError: for the first package that lacks what its channel's rule asks for.
    """
    checked = 0
    for record in records:
        applying = [rule for rule in rules if is_under(record.url, rule.url)]
        for rule in applying:
            log(f"{record.file_name}: {_check(record, rule, beside(record))}")
        checked += bool(applying)
    return checked


def _check(record: RepoDataRecord, rule: Rule, local_file: Path | None) -> str:
    sha256 = record.sha256.hex() if record.sha256 else ""
    # py-rattler 0.25 (conda-forge, August 2026) does not know the digest; the signature is what counts.
    advertised = getattr(record, "attestations_sha256", None)
    digest = f".{advertised.hex()}" if advertised else ""
    sidecar = _fetch(f"{local_file.absolute().as_uri() if local_file else record.url}.sigs{digest}") if sha256 else None
    if sidecar is None:
        raise IntegrityError(
            f"{record.file_name} from {redact(rule.url)} comes without a signed statement, and the "
            "trust policy asks for one. Nothing was installed.",
            fix="Ask whoever runs the channel to publish it with --sign-key.",
        )
    if rule.require == "sigstore":
        return _check_sigstore(record, rule, local_file)
    if advertised and hashlib.sha256(sidecar).digest() != advertised:
        raise IntegrityError(f"the statement of {record.file_name} is not the one that the index names.")

    key, _ = verify(sidecar, record.file_name, sha256, rule.keys)
    _require_local_intact(record, local_file)
    return f"signed by {key.name}"


def _check_sigstore(record: RepoDataRecord, rule: Rule, local_file: Path | None) -> str:
    """The engine's own verification, against sigstore's public roots."""
    from rattler import RepoDataRecord
    from rattler.sigstore import ChannelCheck, Issuer, Publisher, VerificationPolicy, verify_attestation

    publisher = Publisher(rule.identity, Issuer(rule.issuer))
    policy = VerificationPolicy.require(publisher, channel_check=ChannelCheck.WARN)
    try:
        url = local_file.absolute().as_uri() if local_file else record.url
        local_record = RepoDataRecord(record, record.file_name, url, str(record.channel or ""))
        outcome = asyncio.run(verify_attestation(local_record, policy))
    except Exception as error:
        raise IntegrityError(
            redact(f"{record.file_name} has no valid sigstore attestation: {error} Nothing was installed.")
        ) from error
    if outcome.attestation is None:
        raise IntegrityError(f"{record.file_name} has no valid sigstore attestation. Nothing was installed.")
    _require_local_intact(record, local_file)
    return f"sigstore: {outcome.attestation.identity}"


def _require_local_intact(record: RepoDataRecord, local_file: Path | None) -> None:
    """The engine checks the hash of what it downloads, but not of a file:// package."""
    if local_file is not None or record.url.startswith("file://"):
        require_intact(record, local_file or local_path(record.url))


def statement_for(record: RepoDataRecord, rules: Sequence[Rule], local_file: Path | None) -> bytes | None:
    """The signed statements that are to travel with a package, or None: those beside it, and what a rule asks for.

    Args:
        local_file: the package on this machine; None when it is to be taken from its URL.

    Raises:
        IntegrityError: when there are some, and they can't be read.
    """
    address = local_file.absolute().as_uri() if local_file else record.url
    if address.startswith("file://") or any(is_under(record.url, rule.url) for rule in rules):
        return _fetch(f"{address}.sigs")
    return None


def _fetch(url: str) -> bytes | None:
    """A statement; None when there is none."""
    if url.startswith("file://"):
        try:
            return foreign.read_bytes(local_path(url))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{redact(url)} can't be read ({error}). Nothing was installed.") from error

    base, _, name = url.rpartition("/")
    with Client(base).stream("GET", name) as answer:
        return whole(answer, foreign.MOST_SMALL_BYTES) if answer.status_code == 200 else None
