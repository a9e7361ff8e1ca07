"""The one HTTP client: who we are to each host, redirects, and which failures may pass.

A request for reading follows redirects, as hosted channels and their CDNs need it. Credentials are found by the host
that *we* name, once per host; a redirect to another host gets none (httpx drops the header there), not even those that
we have for that host: a server must not be able to make us introduce ourselves elsewhere.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from ssm_forge.base.credentials import Credential, find, redact
from ssm_forge.base.errors import NetworkError
from ssm_forge.base.foreign import MOST_SMALL_BYTES

_TIMEOUT = httpx.Timeout(60, connect=10)
# The answer to an upload comes after the server has checked and indexed the package.
_CHANNEL_TIMEOUT = httpx.Timeout(60, connect=10, read=600)
ATTEMPTS = 5
_T = TypeVar("_T")
_PASSING = (408, 423, 425, 429, 500, 502, 503, 504)

HOW_TO_LOG_IN = "Put a token for it into RATTLER_AUTH_FILE, netrc, the keyring or SSM_FORGE_CHANNEL_TOKEN=HOST=TOKEN."


class TransientError(NetworkError):
    """A failure that may pass: worth another attempt."""


def retrying(action: Callable[[], _T], log: Callable[[str], None] = lambda line: None) -> _T:
    """``action``'s result; transient failures are waited out: 0.5, 1, 2, 4 s, each with some randomness.

    Raises:
        TransientError: the last attempt's.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except TransientError as error:
            log(f"attempt {attempt} of {ATTEMPTS}: {error}")
            time.sleep(0.25 * 2**attempt * random.uniform(0.5, 1.5))
    return action()


class HostAuth(httpx.Auth):
    """Shows each host its own credential. httpx asks once a request, so never for where a redirect leads."""

    def __init__(self) -> None:
        self._found: dict[str, Credential | None] = {}
        self._lock = threading.Lock()

    def credential(self, host_url: str) -> Credential | None:
        """The credential for a URL's host; the places that hold them are read once a host."""
        host = httpx.URL(host_url).host
        with self._lock:
            if host not in self._found:
                self._found[host] = find(host_url)
            return self._found[host]

    def learn(self, host_url: str, credential: Credential) -> None:
        """Show this credential to a URL's host from now on."""
        with self._lock:
            self._found[httpx.URL(host_url).host] = credential

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add what the host wants to see: a header, or a token in front of the path."""
        credential = self.credential(str(request.url))
        if credential is not None:
            show(request, credential)
        yield request


def show(request: httpx.Request, credential: Credential) -> None:
    """Put a credential into a request."""
    if credential.kind == "conda":
        path = b"/t/" + credential.secret.encode() + request.url.raw_path
        request.url = request.url.copy_with(raw_path=path)
    else:
        request.headers["Authorization"] = credential.header


def session(**options: Any) -> httpx.Client:
    """A client with credentials and redirects; ``options`` are httpx's, a timeout for example."""
    return httpx.Client(**{"timeout": _TIMEOUT, "follow_redirects": True, "auth": HostAuth(), **options})


def refused(error: httpx.HTTPError) -> bool:
    """Whether the server answered that it wants to know who we are, or to somebody else."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403)


def get(url: str, most: int = MOST_SMALL_BYTES, **options: Any) -> httpx.Response:
    """One answer to one question, read whole.

    Raises:
        NetworkError: when it is larger than ``most`` bytes.
        httpx.HTTPError: when there is none.
    """
    with session() as client:
        return read(client, url, most, **options)


def read(client: httpx.Client, url: str, most: int, **options: Any) -> httpx.Response:
    """As :func:`get`, with a client that asks more than once."""
    with client.stream("GET", url, **options) as answer:
        body = whole(answer, most)
        # The body is unpacked already, and no longer as long as the header says.
        headers = [(k, v) for k, v in answer.headers.multi_items() if k not in ("content-encoding", "content-length")]
        return httpx.Response(answer.status_code, headers=headers, content=body, request=answer.request)


class Client:
    """Requests to one channel, with errors in our words."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._auth = HostAuth()
        self.has_credential = self._auth.credential(self.url) is not None
        self._client = session(timeout=_CHANNEL_TIMEOUT, auth=self._auth)

    def use(self, credential: Credential) -> None:
        """Show this credential from now on."""
        self._auth.learn(self.url, credential)

    def close(self) -> None:
        """Hang up: a server that is told to stop waits for whoever is connected."""
        self._client.close()

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The whole answer to a request.

        Raises:
            TransientError: when the connection fails, or the server says that it is a passing matter.
            NetworkError: when the token is missing, wrong, expired or too weak, or redirects lead nowhere.
        """
        with self.stream(method, path, **options) as answer:
            answer.read()
            return answer

    @contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """The answer to a request, its body to be read while inside. Raises as :meth:`send` does."""
        where = redact(f"{self.url}/{path}")
        # A redirect turns an upload into a question, and its body was read already.
        options["follow_redirects"] = method in ("GET", "HEAD")
        try:
            with self._client.stream(method, f"{self.url}/{path}", **options) as answer:
                if answer.status_code not in (200, 206):
                    answer.read()
                self._require_welcome(answer, method, where)
                yield answer
        except httpx.TransportError as error:
            raise TransientError(
                redact(f"{where} could not be reached ({error or type(error).__name__})."),
                fix="Check the network and run the same command again; it goes on where it was.",
            ) from error
        except httpx.RequestError as error:
            raise NetworkError(redact(f"{where} could not be read ({error or type(error).__name__}).")) from error

    def _require_welcome(self, answer: httpx.Response, method: str, where: str) -> None:
        if answer.status_code in _PASSING:
            raise TransientError(redact(f"{where} answered {answer.status_code}: {reason(answer)}"))
        if answer.has_redirect_location:
            there = redact(answer.headers["Location"])
            raise NetworkError(
                f"{where} sends {method} on to {there} ({answer.status_code}), and only reading follows redirects.",
                fix="Name the address that it leads to.",
            )
        if answer.status_code in (401, 403):
            if answer.history and answer.url.host != httpx.URL(self.url).host:
                # It is no business of our token, which that host was never shown.
                raise NetworkError(
                    f"{where} leads to {answer.url.host}, which refused {method} ({answer.status_code})."
                )
            raise NetworkError(
                redact(f"{self.url} refused {method} ({answer.status_code}): {reason(answer)}"),
                fix="Put a token with this right into RATTLER_AUTH_FILE, netrc, the keyring or "
                "SSM_FORGE_CHANNEL_TOKEN=HOST=TOKEN.",
            )


def whole(answer: httpx.Response, most: int) -> bytes:
    """The body of an answer that is still to be read, unpacked where it came compressed.

    Raises:
        NetworkError: when it is larger than ``most``: a server must not fill the memory of who asks it.
    """
    body = bytearray()
    for chunk in answer.iter_bytes(1 << 20):
        body += chunk
        if len(body) > most:
            raise NetworkError(f"{redact(str(answer.url))} answered with more than {most} bytes.")
    return bytes(body)


def reason(answer: httpx.Response) -> str:
    """Why a server refused, in its own words."""
    text = answer.text.strip() if "text" in answer.headers.get("content-type", "") else ""
    return text[:500] or answer.headers.get("SSM-Forge-Reason") or answer.reason_phrase
