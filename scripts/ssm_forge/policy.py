"""Which channels must prove what their packages were built from; asked before anything is linked."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

from ssm_forge.credentials import redact
from ssm_forge.errors import IntegrityError, UsageError
from ssm_forge.paths import Workspace
from ssm_forge.toolbox import require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from rattler import RepoDataRecord

    from ssm_forge.trust import PublicKey

VARIABLE = "SSM_FORGE_TRUST"
Requirement = Literal["signature", "sigstore"]


@dataclass(frozen=True)
class Rule:
    """What one channel's packages need.

    Attributes:
        url: the channel; everything under it is meant.
        require: ``signature`` by one of ``keys``, or ``sigstore`` for a bundle of an identity.
        keys: trusted public keys.
        identity: certificate identity, ``*`` allowed; empty for any.
        issuer: OIDC issuer's URL; empty for any.
    """

    url: str
    require: Requirement
    keys: tuple[PublicKey, ...] = ()
    identity: str = ""
    issuer: str = ""


def find(explicit: Path | None, workspace: Workspace) -> tuple[Rule, ...]:
    """The policy in force: ``--trust``, else ``SSM_FORGE_TRUST``, else ``recipes/trust.toml``, else none."""
    named = explicit or (Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None)
    if named is None:
        default = workspace.recipes / "trust.toml"
        return load(default) if default.exists() else ()
    return load(named.expanduser())


def load(path: Path) -> tuple[Rule, ...]:
    """Read a policy: ``[[channel]]`` tables with ``url``, ``require``, ``keys`` (files beside it), ...

    Raises:
        UsageError: when it is missing or not understood in full; a policy is never half obeyed.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}, the trust policy, can't be read ({error}).") from error
    if set(data) - {"channel"} or not isinstance(data.get("channel"), list):
        raise UsageError(f"{path} must consist of [[channel]] tables.")
    require("cryptography")
    return tuple(_rule(entry, path) for entry in data["channel"])


def _rule(entry: dict[str, Any], path: Path) -> Rule:
    from ssm_forge.trust import load_public

    unknown = set(entry) - {"url", "require", "keys", "identity", "issuer"}
    wanted = entry.get("require", "signature")
    if unknown or "url" not in entry or wanted not in ("signature", "sigstore"):
        raise UsageError(
            f"{path}: a [[channel]] has url, require (signature or sigstore), keys, identity and issuer, "
            f"but this one says {entry}."
        )
    keys = tuple(load_public(path.parent / name) for name in entry.get("keys", []))
    if wanted == "signature" and not keys:
        raise UsageError(f"{path}: channel {entry['url']} requires a signature, but names no keys.")
    url = str(entry["url"])
    if "://" not in url:
        url = (path.parent / url).resolve().as_uri()
    return Rule(url.rstrip("/") + "/", wanted, keys, entry.get("identity", ""), entry.get("issuer", ""))


def enforce(records: Sequence[RepoDataRecord], rules: Sequence[Rule], log: Callable[[str], None]) -> int:
    """Check every record that a rule is about; returns how many there were.

    Raises:
        IntegrityError: for the first package that lacks what its channel's rule asks for.
    """
    checked = 0
    for record in records:
        rule = next((r for r in rules if record.url.startswith(r.url)), None)
        if rule is None:
            continue
        log(f"{record.file_name}: {_check(record, rule)}")
        checked += 1
    return checked


def _check(record: RepoDataRecord, rule: Rule) -> str:
    sha256 = record.sha256.hex() if record.sha256 else ""
    # py-rattler 0.25 (conda-forge, August 2026) does not know the digest; the signature is what counts.
    advertised = getattr(record, "attestations_sha256", None)
    digest = f".{advertised.hex()}" if advertised else ""
    sidecar = _fetch(f"{record.url}.sigs{digest}") if sha256 else None
    if sidecar is None:
        raise IntegrityError(
            f"{record.file_name} from {redact(rule.url)} comes without a signed statement, and the "
            "trust policy asks for one. Nothing was installed.",
            fix="Ask whoever runs the channel to publish it with --sign-key.",
        )
    if rule.require == "sigstore":
        return _check_sigstore(record, rule)
    if advertised and hashlib.sha256(sidecar).digest() != advertised:
        raise IntegrityError(f"the statement of {record.file_name} is not the one that the index names.")
    from ssm_forge.trust import verify

    key, _ = verify(sidecar, record.file_name, sha256, rule.keys)
    _require_local_intact(record)
    return f"signed by {key.name}"


def _check_sigstore(record: RepoDataRecord, rule: Rule) -> str:
    """The engine's own verification, against sigstore's public roots."""
    from rattler.sigstore import ChannelCheck, Issuer, Publisher, VerificationPolicy, verify_attestation

    publisher = Publisher(rule.identity or None, Issuer(rule.issuer) if rule.issuer else None)
    policy = VerificationPolicy.require(publisher, channel_check=ChannelCheck.WARN)
    try:
        outcome = asyncio.run(verify_attestation(record, policy))
    except Exception as error:
        raise IntegrityError(
            redact(f"{record.file_name} has no valid sigstore attestation: {error} Nothing was installed.")
        ) from error
    if outcome.attestation is None:
        raise IntegrityError(f"{record.file_name} has no valid sigstore attestation. Nothing was installed.")
    _require_local_intact(record)
    return f"sigstore: {outcome.attestation.identity}"


def _require_local_intact(record: RepoDataRecord) -> None:
    """The engine checks the hash of what it downloads, but not of a file:// package."""
    if record.url.startswith("file://"):
        from ssm_forge.packages import require_intact

        require_intact(record, Path(unquote(urlsplit(record.url).path)))


def _fetch(url: str) -> bytes | None:
    """A statement; None when there is none."""
    if url.startswith("file://"):
        try:
            return Path(unquote(urlsplit(url).path)).read_bytes()
        except FileNotFoundError:
            return None
    from ssm_forge.web import Client

    base, _, name = url.rpartition("/")
    answer = Client(base).send("GET", name)
    return answer.content if answer.status_code == 200 else None
