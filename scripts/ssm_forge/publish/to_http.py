"""Publishing over HTTP: to our own server, which resumes and indexes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from ssm_forge.base.credentials import redact
from ssm_forge.base.errors import ForgeError, IntegrityError, MachineError, NetworkError, UsageError
from ssm_forge.base.web import Client, TransientError, reason
from ssm_forge.channel.source import records_at
from ssm_forge.publish.target import Advance, Outcome, Parcel, Publishable, Target, compare

_CHUNK_BYTES = 1 << 18


def target(url: str) -> Target:
    """The publisher for the kind of server that answers at ``url``.

    Raises:
        NetworkError: when nobody answers.
        UsageError: when the server takes no uploads that we know.
    """
    client = Client(url)
    answer = client.send("OPTIONS", "")
    if answer.headers.get("SSM-Forge-Channel") == "1":
        return ServeTarget(client)
    raise UsageError(
        f"{redact(url)} answers, but takes no uploads that we know.",
        fix="For a Quetz or Artifactory server write quetz://HOST/CHANNEL or artifactory://HOST/REPOSITORY; "
        "a plain web server is filled through its folder.",
    )


class ServeTarget:
    """Our own server, which resumes, checks and indexes by itself; the methods are those of :class:`Target`."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def present(self, package: Publishable) -> str | None:
        return compare(package, records_at(self.client, package.subdir).get(package.filename))

    def upload(self, parcel: Parcel, advance: Advance) -> Outcome:
        package = parcel.package
        path = f"{package.subdir}/{package.filename}"
        digest = {"Repr-Digest": _digest(package.sha256)}
        first = int(self.client.send("HEAD", path, headers=digest).headers.get("Upload-Offset", "0"))
        advance(first)
        headers = {**digest, **_extent(first, package.size)}
        answer = self.client.send("PUT", path, headers=headers, content=_body(package.path, first, advance))
        if answer.status_code == httpx.codes.CONFLICT and "Upload-Offset" in answer.headers:
            raise TransientError(redact(f"{self.client.url}: {reason(answer)}"))
        return "added" if _accepted(answer, package.filename, self.client.url) == 201 else "was there"

    def attach(self, parcel: Parcel) -> bool:
        package = parcel.package
        sha256 = hashlib.sha256(parcel.statements).hexdigest()
        listed = records_at(self.client, package.subdir).get(package.filename)
        if listed is not None and listed.attestations_sha256 == sha256:
            return True
        self.send_statement(parcel)
        return True

    def send_statement(self, parcel: Parcel) -> None:
        """Upload the statements of a package, from where an earlier attempt was cut.

        Raises:
            TransientError: when the upload was cut.
            IntegrityError, MachineError, NetworkError: when the server refuses it.
        """
        package = parcel.package
        sha256 = hashlib.sha256(parcel.statements).hexdigest()
        path = f"{package.subdir}/{package.filename}.sigs"
        digest = {"Repr-Digest": _digest(sha256)}
        first = int(self.client.send("HEAD", path, headers=digest).headers.get("Upload-Offset", "0"))
        headers = {**digest, **_extent(first, len(parcel.statements))}
        answer = self.client.send("PUT", path, headers=headers, content=parcel.statements[first:])
        _accepted(answer, f"{package.filename}.sigs", self.client.url)

    def finish(self, parcels: Sequence[Parcel]) -> None:
        """Nothing is left to do: the server indexed each package before it said yes."""
        self.client.close()


def _accepted(answer: httpx.Response, filename: str, url: str) -> int:
    """The status of an accepted upload.

    Raises:
        IntegrityError: when another file has that name, or the server found the package wanting.
        MachineError: when the server's disk is full.
    """
    status, explanation = answer.status_code, reason(answer)
    if status in (200, 201):
        return status
    kinds: dict[int, type[ForgeError]] = {409: IntegrityError, 422: IntegrityError, 507: MachineError}
    if "was cut" in explanation or "other bytes than were announced" in explanation:
        raise TransientError(redact(f"{url}: {explanation}"))
    raise kinds.get(status, NetworkError)(redact(f"{url} did not take {filename} ({status}): {explanation}"))


def _digest(sha256: str) -> str:
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def _extent(first: int, total: int) -> dict[str, str]:
    """Headers for the bytes from ``first`` on; a server that has them all is asked to go on without any."""
    reach = f"{first}-{total - 1}" if first < total else "*"
    return {"Content-Length": str(max(0, total - first)), "Content-Range": f"bytes {reach}/{total}"}


def _body(path: Path, first: int, advance: Advance) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(first)
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk
            advance(len(chunk))
