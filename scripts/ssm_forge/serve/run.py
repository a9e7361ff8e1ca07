"""Runs the channel server: addresses, TLS, the log, a clean stop."""

from __future__ import annotations

import ipaddress
import resource
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.ui import open_log, say
from ssm_forge.serve.app import create_app
from ssm_forge.serve.tokens import TokenStore

_BACKLOG = 2048
_STOP_SECONDS = 20
# Each reader has a connection and a file open; the usual limit of 1024 is for programs that still use select(2).
_OPEN_FILES = 65_536


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        channel: the folder.
        host: name or address to listen on.
        port: 0 for any free one.
        public: reading needs no token.
        certificate: PEM file with the certificate chain; with ``key`` it makes the server speak TLS.
        behind_proxy: plain HTTP to other machines is wanted.
    """

    channel: Path
    host: str
    port: int
    public: bool
    certificate: Path | None
    key: Path | None
    behind_proxy: bool

    @property
    def scheme(self) -> str:
        """``https`` with a certificate, else ``http``."""
        return "https" if self.certificate else "http"


def run(settings: Settings, tokens: TokenStore, workspace: Workspace) -> None:
    """Serve until stopped (Ctrl-C or SIGTERM); requests under way are finished.

    Raises:
        UsageError: when nobody could read, or tokens would cross a network in the clear.
        MachineError: when the address is not free.
    """
    _check(settings, tokens)
    _allow_many_open_files()
    listener = _listen(settings)
    with open_log(workspace.logs, "serve") as log:
        app = create_app(settings.channel, tokens, public=settings.public, access=log)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # It would write tokens that are part of a path; ours doesn't.
            server_header=False,
            proxy_headers=settings.behind_proxy,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
            timeout_graceful_shutdown=_STOP_SECONDS,
            timeout_keep_alive=30,
            lifespan="off",
        )
        host, port = listener.getsockname()[:2]
        say(f"Serving {settings.channel} on {settings.scheme}://{host}:{port}")
        say(f"Full log: {log.path}")
        uvicorn.Server(config).run(sockets=[listener])


def _check(settings: Settings, tokens: TokenStore) -> None:
    if bool(settings.certificate) != bool(settings.key):
        raise UsageError("--certificate and --key belong together.")
    if settings.certificate and settings.key:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.certificate, settings.key)
        except (ssl.SSLError, OSError) as error:
            raise UsageError(
                f"{settings.certificate} and {settings.key} are no certificate and key: {error}."
            ) from error
    if not settings.public and not [token for token in tokens.all() if not token.expired]:
        raise UsageError(
            "there is no valid token, so nobody could read from this server.",
            fix=f"Make one with '{launcher()} serve token add NAME', or let everybody read with --public.",
        )
    if not settings.certificate and not settings.behind_proxy and not _is_loopback(settings.host):
        raise UsageError(
            f"on {settings.host} tokens would cross the network in the clear.",
            fix="Give --certificate and --key, or --behind-proxy where a proxy in front does TLS.",
        )


def _allow_many_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise MachineError(
            f"{settings.host}:{settings.port} can't be listened on ({error.strerror}).",
            fix="Choose another --port.",
        ) from error
