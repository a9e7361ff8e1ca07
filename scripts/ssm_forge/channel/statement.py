"""Signed statements of what a package was built from, and the policy that asks for them on install.

A statement is an in-toto Statement with a SLSA provenance predicate, in a DSSE envelope, in a sigstore
bundle. It lies beside the package in the engine's own layout (``NAME.conda.sigs.SHA256``, whose digest the
index carries as ``attestations_sha256``). An offline ed25519 key signs; bundles that CI made with sigstore can be
stored along, and the engine verifies those.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ssm_forge.base import foreign
from ssm_forge.base.errors import IntegrityError, UsageError
from ssm_forge.base.paths import launcher
from ssm_forge.package.read import material_digest as digest_of
from ssm_forge.package.read import provenance

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


PASSPHRASE_VARIABLE = "SSM_FORGE_SIGN_PASSPHRASE"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:ssm-forge:build:1"
_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"

_MOST_KEY_BYTES = 1 << 20
_PROVENANCE: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("name", "recipe_sha256"), foreign.is_text),
    "variant": lambda value: isinstance(value, dict),
    "materials": lambda value: value is None or isinstance(value, list),
}

Statement = dict[str, Any]


class Subject(Protocol):
    """A file that a statement can be about, a conda package or a wheel: its path, name and sha256 (hex)."""

    @property
    def path(self) -> Path: ...
    @property
    def filename(self) -> str: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class PublicKey:
    """A key that is trusted.

    Attributes:
        name: its file, for messages.
        id: sha256 of the key's DER form.
    """

    name: str
    id: str
    key: Ed25519PublicKey


class KeyPair(NamedTuple):
    """Files of a key pair: the private key, and the public one."""

    private: Path
    public: Path


def make_key(folder: Path, name: str) -> KeyPair:
    """Make a key pair in a folder: ``NAME.key``, readable by its owner alone, and ``NAME.pub``; their paths come out.

    Raises:
        UsageError: when there is such a key already.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    if private.exists() or public.exists():
        raise UsageError(f"{private} or {public} exists; a key is never overwritten.", fix="Choose another name.")
    key = Ed25519PrivateKey.generate()
    phrase = os.environ.get(PASSPHRASE_VARIABLE, "")
    encryption = serialization.BestAvailableEncryption(phrase.encode()) if phrase else serialization.NoEncryption()
    folder.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return KeyPair(private, public)


def load_private(path: Path) -> Ed25519PrivateKey:
    """The key of a PEM file that signs; its passphrase comes from the environment.

    Raises:
        UsageError: when the file is no ed25519 private key, or its passphrase is missing or wrong.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    phrase = os.environ.get(PASSPHRASE_VARIABLE, "")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), phrase.encode() if phrase else None)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} can't be used as a private key ({type(error).__name__}).",
            fix=f"A passphrase goes into {PASSPHRASE_VARIABLE}; '{launcher()} channel keygen' makes a key.",
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is not an ed25519 key.", fix=f"'{launcher()} channel keygen' makes one.")
    return key


def load_public(path: Path) -> PublicKey:
    """The key of a PEM file that signatures are checked with.

    Raises:
        UsageError: when the file is no ed25519 public key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(foreign.read_bytes(path, _MOST_KEY_BYTES))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} can't be read as a public key ({type(error).__name__}).") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path} is not an ed25519 key.")
    return PublicKey(path.name, _key_id(key), key)


def statement(package: Subject, build_record: dict[str, Any] | None = None) -> Statement:
    """The statement, not signed yet, of what ``package`` was built from.

    Args:
        build_record: what the package says of its build, empty where it says nothing; by default what a conda package
            has in it.

    Raises:
        IntegrityError: when it says nothing, or something that is not understood: there is nothing to sign for.
    """
    build_record = provenance(package.path) if build_record is None else build_record
    _require_signable(build_record, package.filename)
    materials = [
        {"uri": item["uri"], "digest": dict([digest_of(item)]), "annotations": {"role": item["role"]}}
        for item in (build_record.get("materials") or [])
    ]
    recipe = {
        "uri": f"recipes/{build_record['name']}",
        "digest": {"sha256": build_record["recipe_sha256"]},
        "annotations": {"role": "recipe and patches"},
    }
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": package.filename, "digest": {"sha256": package.sha256}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": build_record["name"], "variant": build_record["variant"]},
                "internalParameters": {
                    key: build_record[key] for key in ("cuda_arch_list", "glibc", "compiler") if key in build_record
                },
                "resolvedDependencies": [recipe, *materials],
            },
            "runDetails": {"builder": {"id": "urn:ssm-forge"}},
        },
    }


def _require_signable(build_record: dict[str, Any], filename: str) -> None:
    """Refuse what does not say its origin, or says it in a way that is not understood."""
    if not build_record:
        raise IntegrityError(
            f"{filename} does not say what it was built from, so there is nothing to sign for.",
            fix=f"Build it with '{launcher()} install-mamba', or publish it without --sign-key.",
        )
    try:
        foreign.require(build_record, _PROVENANCE)
        for item in build_record.get("materials") or []:
            # NVIDIA's packages for CUDA 11.8 have no sha256.
            digest = "sha256" if isinstance(item, dict) and "sha256" in item else "md5"
            foreign.require(item, dict.fromkeys(("uri", digest, "role"), foreign.is_text))
    except ValueError as error:
        raise IntegrityError(
            f"{filename} does not say what it was built from in a way that can be signed for ({error}).",
            fix="Build it again, or publish it without --sign-key.",
        ) from error


def sign(content: Statement, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The bundle for a statement. ed25519 is deterministic: the same statement gives the same bundle."""
    payload = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    signature = key.sign(_pre_authentication(payload))
    return {
        "mediaType": _BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _key_id(key.public_key())}},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }


def writer(
    sign_key: Path | None,
    attestations: Sequence[Path],
    build_record_of: Callable[[Any], dict[str, Any] | None] = lambda package: None,
) -> Callable[[Subject], bytes]:
    """A function that gives each package its sidecar: our statement when there is a key, and the bundles about it.

    Args:
        build_record_of: gives what a package says of its build, as :func:`statement` takes it.
    """
    key = load_private(sign_key) if sign_key else None
    made_elsewhere = [(path, bundles_of(path.read_bytes(), str(path))) for path in attestations]

    def sidecar(package: Subject) -> bytes:
        bundles = [sign(statement(package, build_record_of(package)), key)] if key else []
        bundles += [
            b
            for _, bundles_there in made_elsewhere
            for b in bundles_there
            if about(b, package.filename, package.sha256)
        ]
        return json.dumps(bundles, sort_keys=True).encode() if bundles else b""

    return sidecar


def verify(sidecar: bytes, filename: str, sha256: str, keys: Sequence[PublicKey]) -> tuple[PublicKey, Statement]:
    """The first statement about exactly this file that a trusted key signed, and that key.

    Args:
        sidecar: the bytes that lie beside the file.
        sha256: the file's, hex.

    Raises:
        IntegrityError: when there is no such statement; says which ones there are instead.
    """
    rejected = []
    for bundle in bundles_of(sidecar, f"the statement of {filename}"):
        envelope = bundle.get("dsseEnvelope")
        envelope = envelope if isinstance(envelope, dict) else {}
        signed_by = _signer(envelope, keys)
        if signed_by is None:
            hint = _hint(bundle)
            rejected.append(f"one signed by another key ({hint[:16]!r})" if hint else "one without a key of ours")
        elif not about(bundle, filename, sha256):
            rejected.append("one about another file")
        else:
            content: Statement = foreign.json_from(base64.b64decode(envelope["payload"]))
            return signed_by, content
    raise IntegrityError(
        f"{filename} (sha256 {sha256}) has no statement signed by {' or '.join(k.name for k in keys)}: "
        f"found {', '.join(rejected) or 'none'}. Nothing was installed.",
        fix="Ask whoever runs the channel; do not install it.",
    )


def _hint(bundle: dict[str, Any]) -> str:
    """Which key a bundle says that it was signed with; nobody vouches for it."""
    try:
        return str(bundle["verificationMaterial"]["publicKey"]["hint"])
    except (KeyError, TypeError):
        return ""


def _signer(envelope: dict[str, Any], keys: Sequence[PublicKey]) -> PublicKey | None:
    from cryptography.exceptions import InvalidSignature

    if envelope.get("payloadType") != PAYLOAD_TYPE:
        return None
    try:
        message = _pre_authentication(base64.b64decode(envelope["payload"], validate=True))
        signatures = [base64.b64decode(item["sig"], validate=True) for item in envelope["signatures"]]
    except (KeyError, TypeError, ValueError):
        return None
    for key in keys:
        for signature in signatures:
            try:
                key.key.verify(signature, message)
            except InvalidSignature:
                continue
            return key
    return None


def about(bundle: dict[str, Any], filename: str, sha256: str) -> bool:
    """Whether a bundle's statement is about exactly this file; who signed it is another question."""
    try:
        content = foreign.json_from(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        subjects = content["subject"] if content["_type"] == STATEMENT_TYPE else []
        return any(s["name"] == filename and s["digest"]["sha256"] == sha256 for s in subjects)
    except (KeyError, TypeError, ValueError):
        return False


def bundles_of(data: bytes, address: str) -> list[dict[str, Any]]:
    """The bundles of a sidecar, or the single one of a ``.sigstore.json``.

    Raises:
        IntegrityError: when ``data`` is not JSON, or no list of objects; ``address`` names the file in the message.
    """
    try:
        content = foreign.json_from(data)
    except ValueError as error:
        raise IntegrityError(f"{address} is not JSON ({error}).") from error
    bundles = content if isinstance(content, list) else [content]
    if not all(isinstance(item, dict) for item in bundles):
        raise IntegrityError(f"{address} is not a list of signed statements.")
    return bundles


def _pre_authentication(payload: bytes) -> bytes:
    """DSSE's encoding of what is signed (PAE, protocol version 1)."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _key_id(key: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives import serialization

    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
