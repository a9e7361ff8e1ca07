"""Publishing over HTTP: to our own server, which resumes and indexes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from ssm_forge import repodata
from ssm_forge.credentials import Credential, find, redact
from ssm_forge.errors import ForgeError, IntegrityError, MachineError, NetworkError, UsageError
from ssm_forge.inspection import Package
from ssm_forge.publish import Advance, Outcome, Parcel, Target, TransientError, compare

_CHUNK = 1 << 18
# The answer to an upload comes after the server has checked and indexed the package.
_TIMEOUT = httpx.Timeout(60, connect=10, read=600)
_PASSING = (408, 423, 425, 429, 500, 502, 503, 504)


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


class Client:
    """Requests to one channel, with the credentials for its host, and errors in our words."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        credential = find(url)
        self.has_credential = credential is not None
        self._address = self.url
        self._client = httpx.Client(timeout=_TIMEOUT)
        if credential:
            self.use(credential)

    def use(self, credential: Credential) -> None:
        """Show this credential from now on."""
        if credential.kind == "conda":
            parts = urlsplit(self.url)
            self._address = parts._replace(path=f"/t/{credential.secret}{parts.path}").geturl()
        else:
            self._client.headers["Authorization"] = credential.header

    def close(self) -> None:
        """Hang up: a server that is told to stop waits for whoever is connected."""
        self._client.close()

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The whole answer to a request.

        Raises:
            TransientError: when the connection fails, or the server says that it is a passing matter.
            NetworkError: when the token is missing, wrong, expired or too weak.
        """
        with self.stream(method, path, **options) as answer:
            answer.read()
            return answer

    @contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """The answer to a request, its body to be read while inside. Raises as :meth:`send` does."""
        address = f"{self._address}/{path}"
        try:
            # A keyring or auth file decides who we are, not httpx's own reading of netrc.
            with self._client.stream(method, address, auth=_no_auth, **options) as answer:
                if answer.status_code not in (200, 206):
                    answer.read()
                self._require_welcome(answer, method, path)
                yield answer
        except httpx.TransportError as error:
            raise TransientError(
                redact(f"{self.url}/{path} could not be reached ({error or type(error).__name__})."),
                fix="Check the network and run the same command again; it goes on where it was.",
            ) from error

    def _require_welcome(self, answer: httpx.Response, method: str, path: str) -> None:
        if answer.status_code in _PASSING:
            raise TransientError(redact(f"{self.url}/{path} answered {answer.status_code}: {_reason(answer)}"))
        if answer.status_code in (401, 403):
            raise NetworkError(
                redact(f"{self.url} refused {method} ({answer.status_code}): {_reason(answer)}"),
                fix="Put a token with this right into RATTLER_AUTH_FILE, netrc, the keyring or "
                "SSM_FORGE_CHANNEL_TOKEN.",
            )

    def records(self, subdir: str) -> repodata.Records:
        """What the channel's index lists; nothing when it has no index for ``subdir`` yet."""
        answer = self.send("GET", f"{subdir}/repodata.json")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return {}
        if answer.status_code != httpx.codes.OK:
            raise NetworkError(redact(f"{self.url}/{subdir}/repodata.json answered {answer.status_code}."))
        return repodata.records(answer.content, redact(f"{self.url}/{subdir}/repodata.json"))


class ServeTarget:
    """Our own server: it resumes, checks and indexes by itself."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def present(self, package: Package) -> str | None:
        return compare(package, self._client.records(package.subdir).get(package.filename))

    def upload(self, parcel: Parcel, advance: Advance) -> Outcome:
        package = parcel.package
        path = f"{package.subdir}/{package.filename}"
        digest = {"Repr-Digest": _digest(package.sha256)}
        held = int(self._client.send("HEAD", path, headers=digest).headers.get("Upload-Offset", "0"))
        advance(held)
        headers = {**digest, **_extent(held, package.size)}
        answer = self._client.send("PUT", path, headers=headers, content=_body(package.path, held, advance))
        if answer.status_code == httpx.codes.CONFLICT and "Upload-Offset" in answer.headers:
            raise TransientError(redact(f"{self._client.url}: {_reason(answer)}"))
        return "added" if _accepted(answer, package.filename, self._client.url) == 201 else "was there"

    def attach(self, parcel: Parcel) -> bool:
        package = parcel.package
        sha256 = hashlib.sha256(parcel.statements).hexdigest()
        if self._client.records(package.subdir).get(package.filename, {}).get("attestations_sha256") == sha256:
            return True
        path = f"{package.subdir}/{package.filename}.sigs"
        digest = {"Repr-Digest": _digest(sha256)}
        first = int(self._client.send("HEAD", path, headers=digest).headers.get("Upload-Offset", "0"))
        headers = {**digest, **_extent(first, len(parcel.statements))}
        answer = self._client.send("PUT", path, headers=headers, content=parcel.statements[first:])
        _accepted(answer, f"{package.filename}.sigs", self._client.url)
        return True

    def finish(self, parcels: Sequence[Parcel]) -> None:
        """Nothing is left to do: the server indexed each package before it said yes."""
        self._client.close()


def _accepted(answer: httpx.Response, filename: str, url: str) -> int:
    """The status of an accepted upload.

    Raises:
        IntegrityError: when another file has that name, or the server found the package wanting.
        MachineError: when the server's disk is full.
    """
    status, reason = answer.status_code, _reason(answer)
    if status in (200, 201):
        return status
    kinds: dict[int, type[ForgeError]] = {409: IntegrityError, 422: IntegrityError, 507: MachineError}
    if "was cut" in reason or "other bytes than were announced" in reason:
        raise TransientError(redact(f"{url}: {reason}"))
    raise kinds.get(status, NetworkError)(redact(f"{url} did not take {filename} ({status}): {reason}"))


def _digest(sha256: str) -> str:
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def _extent(first: int, total: int) -> dict[str, str]:
    """Headers for the bytes from ``first`` on; a server that has them all is asked to go on without any."""
    reach = f"{first}-{total - 1}" if first < total else "*"
    return {"Content-Length": str(max(0, total - first)), "Content-Range": f"bytes {reach}/{total}"}


def _body(path: Path, first: int, advance: Advance) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(first)
        while chunk := stream.read(_CHUNK):
            yield chunk
            advance(len(chunk))


def _no_auth(request: httpx.Request) -> httpx.Request:
    return request


def _reason(answer: httpx.Response) -> str:
    text = answer.text.strip() if "text" in answer.headers.get("content-type", "") else ""
    return text[:500] or answer.headers.get("SSM-Forge-Reason") or answer.reason_phrase
