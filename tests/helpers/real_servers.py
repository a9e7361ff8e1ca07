"""Servers that are not ours, from package registries: an S3 server, Quetz, nginx. Each on a free local port."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import platformdirs
import pytest

# Now: the tests get a home of their own, and the servers are to be installed once.
_CACHE = platformdirs.user_cache_path("ssm-forge") / "test-servers"

QUETZ = ("quetz-server==0.10.4", "sqlalchemy<2", "httpx<0.28", "setuptools<70", "fastapi<0.116")
MOTO = ("moto[server,s3]>=5,<6",)


def tool(name: str, *requirements: str) -> Path:
    """A program in a venv of its own, made once from the package registry.

    Skips the test, saying why, where the registry can't be reached.
    """
    tag = hashlib.sha256(repr((requirements, sys.version)).encode()).hexdigest()[:12]
    folder = _CACHE / tag
    program = folder / "bin" / name
    if not program.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if uv is None:
            pytest.skip(f"not run: {name} can't be installed, because there is no uv")
        command = [uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", *requirements]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"not run: {name} could not be installed ({done.stderr.strip().splitlines()[-1]})")
    return program


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: list[str | Path], url: str, folder: Path) -> Iterator[str]:
    """A server, from when it answers until it is stopped."""
    log = folder / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            for _ in range(1200):
                assert process.poll() is None, log.read_text()
                try:
                    httpx.get(url, timeout=2)
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            else:
                raise AssertionError(log.read_text())
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            # Quetz has workers of its own, which outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """An S3 server in memory."""
    port = free_port()
    command: list[str | Path] = [tool("moto_server", *MOTO), "-H", "127.0.0.1", "-p", str(port)]
    with running(command, f"http://127.0.0.1:{port}", folder) as url:
        yield url


@contextmanager
def quetz(folder: Path) -> Iterator[tuple[str, str]]:
    """A Quetz server with the private channel ``lab``; yields its URL and the key of an owner."""
    program, port = tool("quetz", *QUETZ), free_port()
    made = subprocess.run(
        [program, "create", "server", "--create-conf", "--dev"], cwd=folder, capture_output=True, text=True, check=True
    )
    found = re.search(r'API key created for user "\w+": (\w+)', made.stdout + made.stderr)
    assert found, made.stdout + made.stderr
    with sqlite3.connect(folder / "server" / "quetz.sqlite") as database:
        database.execute("UPDATE users SET role = 'owner'")
    key = found.group(1)
    with running([program, "start", "server", "--port", str(port)], f"http://127.0.0.1:{port}", folder) as url:
        answer = httpx.post(
            f"{url}/api/channels", json={"name": "lab", "private": True}, headers={"X-API-Key": key}, timeout=30
        )
        assert answer.status_code == 201, answer.text
        yield url, key


_NGINX = """
{user} daemon off; worker_processes 2; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  map $http_authorization $known {{ default 0; "Bearer {token}" 1; }}
  server {{
    listen 127.0.0.1:{port};
    location /basic/ {{ alias {channel}/; auth_basic lab; auth_basic_user_file {folder}/users; }}
    location /bearer/ {{ alias {channel}/; if ($known = 0) {{ return 401; }} }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path, channel: Path, token: str) -> Iterator[str]:
    """nginx on a channel folder: ``/basic`` for user ``lab`` with ``token`` as password, ``/bearer`` for the token."""
    import base64

    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "--no-install-recommends", "nginx-light"]
        subprocess.run(
            install, capture_output=True, check=False, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        )
        program = shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("not run: there is no nginx, and it can't be installed (no root, or no Debian archive)")
    port = free_port()
    salted = base64.b64encode(hashlib.sha1(token.encode() + b"salt").digest() + b"salt").decode()
    (folder / "users").write_text(f"lab:{{SSHA}}{salted}\n")
    (folder / "users").chmod(0o644)
    config = folder / "nginx.conf"
    # Root's workers would be nobody, whom other runs of pytest keep out of the temporary folders.
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(_NGINX.format(folder=folder, channel=channel, token=token, port=port, user=user))
    command: list[str | Path] = [program, "-c", config, "-e", folder / "error.log"]
    with running(command, f"http://127.0.0.1:{port}", folder) as url:
        yield url


@contextmanager
def recorder(folder: Path) -> Iterator[str]:
    """A server that agrees to everything and writes what it was asked to ``asked.jsonl``.

    A process of its own: the engine's uploads hold this one's interpreter lock while they wait for an answer.
    """
    port = free_port()
    script = Path(__file__).with_name("recorder.py")
    command: list[str | Path] = [sys.executable, script, str(port), folder / "asked.jsonl"]
    with running(command, f"http://127.0.0.1:{port}", folder) as url:
        (folder / "asked.jsonl").write_text("")
        yield url


def asked(folder: Path) -> list[tuple[str, str, str]]:
    """What the recorder was asked: method, path, and who asked."""
    import json

    return [tuple(json.loads(line)) for line in (folder / "asked.jsonl").read_text().splitlines()]
