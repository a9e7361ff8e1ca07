"""Small conda channels for tests, made with the real engine, and locks over them with canonical URLs."""

from __future__ import annotations

import asyncio
import datetime
import functools
import http.server
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rattler import RepoDataRecord
from rattler.index import index_fs
from rattler_build import assemble_package

from ssm_forge.manifest.environments import Platform
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.solve import prefix as solve_prefix
from ssm_forge.solve.lock import LockedEnvironment, write_locked
from ssm_forge.solve.solver import Request, solve

CANONICAL = "https://example.org/lab/"
PLATFORM = Platform("linux-64", "linux-64", virtual_packages())


def make_package(
    channel: Path, name: str, files: dict[str, str], *, version: str = "1.0", depends: tuple[str, ...] = ()
) -> Path:
    """Put ``name`` with these text files into the channel; returns the archive."""
    content = channel.parent / f"content-{name}-{version}"
    shutil.rmtree(content, ignore_errors=True)
    for path, text in files.items():
        target = content / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    made = assemble_package(
        name=name,
        version=version,
        target_platform="linux-64",
        build_string="h1_0",
        output_dir=str(channel / "linux-64"),
        files_dir=str(content),
        depends=list(depends),
        timestamp=datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    )
    return Path(made.path)


def index(channel: Path) -> None:
    asyncio.run(index_fs(channel))


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...

    def send_head(self) -> Any:
        # Its "not modified" has no headers, which solvers take for a failure.
        del self.headers["If-Modified-Since"]
        return super().send_head()


@contextmanager
def served(channel: Path) -> Iterator[str]:
    """The channel over HTTP; its address."""
    handler = functools.partial(_Handler, directory=str(channel))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def solve_channel(channel: Path, *specs: str) -> list[RepoDataRecord]:
    return solve(Request(specs=specs, channels=(channel.resolve().as_uri(),), snapshot=channel))


def lock_channel(channel: Path, lock: Path, *specs: str, name: str = "demo") -> LockedEnvironment:
    """Lock ``specs`` from a local channel as if it were served under :data:`CANONICAL`."""
    local = channel.resolve().as_uri()
    records = tuple(
        RepoDataRecord(r, r.file_name, r.url.replace(f"{local}/", CANONICAL), CANONICAL)
        for r in solve_channel(channel, *specs)
    )
    locked = LockedEnvironment(name, (CANONICAL,), PLATFORM, records)
    write_locked((locked,), lock)
    return locked


def demo_channel(folder: Path) -> Path:
    """A channel of two packages: ``tool`` (a script with the prefix in it, a data file), needing ``base``."""
    return Path(shutil.copytree(Path(_demo().name) / "channel", folder / "channel"))


@functools.cache
def _demo() -> tempfile.TemporaryDirectory[str]:
    """Made once in a process, for indexing takes long, and never changed: everybody gets a copy."""
    made = tempfile.TemporaryDirectory(prefix="ssm-forge-demo-")
    channel = Path(made.name) / "channel"
    make_package(channel, "base", {"share/base/data.txt": "base\n"})
    make_package(channel, "tool", {"bin/tool": "#!/bin/sh\necho tool\n", "share/tool.txt": "tool\n"}, depends=("base",))
    index(channel)
    return made


def holds(prefix: Path, locked: Sequence[RepoDataRecord]) -> bool:
    """Whether the environment is the locked one, with our packages or without."""
    have = {(r.name.normalized, str(r.version), str(r.build)) for r in solve_prefix.present(prefix)}
    return have == {(r.name.normalized, str(r.version), str(r.build)) for r in locked}
