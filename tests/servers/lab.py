"""A small lab for the tests: packages of a few bytes, our own server as users start it, readers."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from rattler_build import assemble_package

from ssm_forge.package.read import PROVENANCE
from ssm_forge.package.write import dump_json, rewrite_info
from ssm_forge.serve.tokens import TokenStore

ROOT = Path(__file__).resolve().parents[2]

_ADDRESS = re.compile(r" on (https?://\S+)")


def make_package(
    folder: Path,
    name: str = "tool",
    *,
    version: str = "1.0",
    build: str = "h1_0",
    text: str = "data\n",
    size: int = 0,
    depends: tuple[str, ...] = (),
    provenance: bool = False,
    subdir: str = "linux-64",
) -> Path:
    """A whole package in ``folder``; ``size`` adds that many bytes that do not compress."""
    with tempfile.TemporaryDirectory() as scratch:
        content = Path(scratch) / "content"
        (content / "share").mkdir(parents=True)
        (content / "share" / f"{name}.txt").write_text(text)
        if size:
            (content / "share" / f"{name}.bin").write_bytes(os.urandom(size))
        made = Path(
            assemble_package(
                name=name,
                version=version,
                build_string=build,
                target_platform=subdir,
                output_dir=str(Path(scratch) / "out"),
                files_dir=str(content),
                depends=list(depends),
                timestamp=datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
                compression_level=1,
            ).path
        )
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / made.name
        told = {
            "format": 1,
            "name": name,
            "recipe_sha256": "ab" * 32,
            "variant": {"forge_variant": "cu130", "python": "3.12.* *_cpython"},
            "cuda_arch_list": "9.0",
            "glibc": "2.28",
            "materials": [{"uri": "https://example.org/tool.tar.gz", "sha256": "cd" * 32, "role": "source"}],
        }
        # The engine's uploads read about.json, which assembled packages lack.
        extra = {
            "info/about.json": dump_json({"summary": name}),
            **({PROVENANCE: dump_json(told)} if provenance else {}),
        }
        rewrite_info(made, target, lambda files: {**files, **extra})
    return target


def environment(home: Path, **extra: str) -> dict[str, str]:
    """What a command is started with: no credentials of the developer's machine get in."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RATTLER_"))}
    kept.pop("NETRC", None)
    return {
        **kept,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT / "scripts"),
        "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",
        "SSM_FORGE_CACHE_DIR": str(home / "cache"),
        "SSM_FORGE_LOG_DIR": str(home / "logs"),
        **extra,
    }


def auth_file(folder: Path, token: str, host: str = "127.0.0.1") -> Path:
    """A file as RATTLER_AUTH_FILE names it."""
    path = folder / "auth.json"
    path.write_text(json.dumps({host: {"BearerToken": token}}))
    return path


@dataclass
class Running:
    """A server that was started.

    Attributes:
        url: where it answers.
        process: to be killed by a test that wants to.
    """

    url: str
    process: subprocess.Popen[str]

    @property
    def host(self) -> str:
        return self.url.split("//")[1].split(":")[0]


@contextmanager
def serving(channel: Path, store: TokenStore, home: Path, *options: str, port: int = 0) -> Iterator[Running]:
    """``./run serve`` on a free port of 127.0.0.1; always stopped."""
    command = [sys.executable, "-m", "ssm_forge", "serve", "--channel", str(channel), "--port", str(port)]
    command += ["--tokens", str(store.path), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(home))
    try:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if found := _ADDRESS.search(line):
                break
        else:
            raise AssertionError("the server did not start: " + "".join(told))
        url = found.group(1)
        wait_until_up(url)
        yield Running(url, process)
    finally:
        stop(process)


def wait_until_up(url: str) -> None:
    """Wait for ``/health``."""
    import httpx

    for _ in range(2400):
        try:
            if httpx.get(f"{url}/health", verify=False, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{url} did not come up")


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stderr:
        process.stderr.close()


def read_channel(url: str, token: str = "") -> dict[str, str]:
    """Be a reader: fetch the index and every package it names, check each hash. Returns name -> sha256."""
    import hashlib

    import httpx

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(headers=headers, timeout=600) as client:
        answer = client.get(f"{url}/linux-64/repodata.json")
        answer.raise_for_status()
        found = {}
        for name, record in answer.json()["packages.conda"].items():
            package = client.get(f"{url}/linux-64/{name}")
            package.raise_for_status()
            found[name] = hashlib.sha256(package.content).hexdigest()
            assert found[name] == record["sha256"], name
        return found


def check_folder(channel: Path) -> set[str]:
    """Every listed file is there and is what the index says, in all forms of the index. Returns the names."""
    import hashlib

    import zstandard

    folder = channel / "linux-64"
    plain = json.loads((folder / "repodata.json").read_text())
    packed = zstandard.ZstdDecompressor().stream_reader((folder / "repodata.json.zst").read_bytes()).read()
    assert json.loads(packed) == plain
    for name, record in plain["packages.conda"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == record["sha256"], name
    return set(plain["packages.conda"])


@dataclass
class Lab:
    """A channel that our own server serves, and who may do what there."""

    channel: Path
    server: Running
    store: TokenStore
    read: str
    write: str
    home: Path

    @property
    def url(self) -> str:
        return self.server.url

    def login(self, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RATTLER_AUTH_FILE", str(auth_file(self.home, token)))
