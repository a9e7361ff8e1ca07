"""What one machine compiled another finds, where they share a folder, Redis or S3: with real servers and ccache."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from real_servers import free_port, s3
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.build import compile_cache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine to compile with"),
]


@contextmanager
def folder(scratch: Path) -> Iterator[str]:
    yield (scratch / "shared").as_uri()


@contextmanager
def bucket(scratch: Path) -> Iterator[str]:
    """One that takes unsigned requests, as a bucket does whose policy lets a network in."""
    with s3(scratch) as url:
        assert httpx.put(f"{url}/objects", timeout=30).is_success
        allowed = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": "arn:aws:s3:::objects/*"}
        policy = {"Version": "2012-10-17", "Statement": [allowed]}
        assert httpx.put(f"{url}/objects?policy", json=policy, timeout=30).is_success
        yield f"{url}/objects/ccache"


@contextmanager
def redis(scratch: Path) -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        _install("redis-server")
        program = shutil.which("redis-server")
    assert program is not None
    port = free_port()
    command = [program, "--port", str(port), "--save", "", "--bind", "127.0.0.1", "--dir", str(scratch)]
    with (scratch / "redis.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while "Ready to accept connections" not in (scratch / "redis.log").read_text():
                assert server.poll() is None, (scratch / "redis.log").read_text()
                time.sleep(0.05)
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def _install(package: str) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"not run: {package} can't be installed, because this is not Debian, or not root")
    command = ["apt-get", "install", "-qy", "--no-install-recommends", package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"not run: {package} could not be installed ({done.stderr.strip().splitlines()[-1]})")


def compiled(machine: Path, remote: str) -> dict[str, int]:
    """Compile a file on a machine with nothing of its own, as the recipes do; returns what ccache counted."""
    place = Workspace(workspace().root, machine)
    shared = Path(workspace().cache / "tools")
    shared.mkdir(parents=True, exist_ok=True)
    machine.mkdir()
    (machine / "tools").symlink_to(shared)
    cache = compile_cache.environment(place)
    if not cache["SSM_FORGE_CCACHE"]:
        pytest.skip("not run: ccache can't be installed, because Debian's archive can't be reached")
    # As recipes/*/recipe.yaml hands them on.
    settings = {"CCACHE_DIR": cache["SSM_FORGE_CCACHE_DIR"], "CCACHE_REMOTE_STORAGE": remote, "CCACHE_NOHASHDIR": "1"}
    environment = {**os.environ, **settings}
    (machine / "a.cpp").write_text("int f() { return 42; }\n")
    command = [cache["SSM_FORGE_CCACHE"], "g++", "-c", "a.cpp", "-o", "a.o"]
    subprocess.run(command, cwd=machine, env=environment, check=True)
    stats = [cache["SSM_FORGE_CCACHE"], "--print-stats"]
    told = subprocess.run(stats, env=environment, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in (line.split() for line in told.splitlines())}


# A change is not held up by a system package: Redis' own server is for the nights.
@pytest.mark.parametrize(
    "store",
    [folder, bucket, pytest.param(redis, marks=pytest.mark.nightly)],
    ids=lambda store: getattr(store, "__name__", ""),
)
def test_what_one_machine_compiled_another_one_finds(store: object, tmp_path: Path) -> None:
    assert callable(store)
    with store(tmp_path) as remote:
        first = compiled(tmp_path / "one", remote)
        assert (first["cache_miss"], first["remote_storage_write"] > 0) == (1, True)
        second = compiled(tmp_path / "two", remote)
        assert second["cache_miss"] == 0
        assert second["remote_storage_hit"] >= 1
        assert (tmp_path / "one/a.o").read_bytes() == (tmp_path / "two/a.o").read_bytes()
