"""The one HTTP client: who we are to each host, and redirects.

A request for reading follows redirects, as hosted channels and their CDNs need it. Credentials are found by the host
that *we* name, once per host; a redirect to another host gets none (httpx drops the header there), not even those that
we have for that host: a server must not be able to make us introduce ourselves elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any

import httpx

from ssm_forge.credentials import Credential, find

_TIMEOUT = httpx.Timeout(60, connect=10)

HOW_TO_LOG_IN = "Put a token for it into RATTLER_AUTH_FILE, netrc, the keyring or SSM_FORGE_CHANNEL_TOKEN."


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


def get(url: str, **options: Any) -> httpx.Response:
    """One answer to one question, read whole."""
    with session() as client:
        return client.get(url, **options)
