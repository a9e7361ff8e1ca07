"""Works on a channel of many synthetic packages: ``large_channel.py TASK FOLDER COUNT``, one task a process.

Prints what it took as JSON: CPU seconds, the peak of its memory, calls of functions written in Python, and for a solve
what was read over HTTP. A package is small, but whole: of two in a row the second replaces the first, and every tenth
name needs another package.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import resource
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import zstandard

from ssm_forge.channel import check as channel_check
from ssm_forge.channel import folder as channels
from ssm_forge.channel import prune as channel_prune
from ssm_forge.channel.source import FolderSource
from ssm_forge.solve.solver import Request, solve

_BUILDS_OF_A_NAME = 20


def record(number: int) -> dict[str, Any]:
    """The index.json of a package: twenty builds of each name, in pairs that differ by their build number."""
    name, build = divmod(number, _BUILDS_OF_A_NAME)
    variant, newer = divmod(build, 2)
    return {
        "arch": "x86_64",
        "build": f"cuda130_py3{variant}_sm90_h{number - newer:07x}_{newer}",
        "build_number": newer,
        "depends": [f"lib{name - 1} >=1.0", "__glibc >=2.17,<3.0.a0"] if name % 10 else [],
        "license": "MIT",
        "name": f"lib{name}",
        "platform": "linux",
        "subdir": "linux-64",
        "timestamp": 1_700_000_000_000 + newer,
        "version": "1.0",
    }


def make(folder: Path, count: int) -> None:
    """Write the packages; they are not indexed."""
    target = folder / "linux-64"
    target.mkdir(parents=True)
    for number in range(count):
        write(target, record(number))


def write(target: Path, index: dict[str, Any]) -> None:
    """One package, with one file in it."""
    stem = f"{index['name']}-{index['version']}-{index['build']}"
    data = f"{stem}\n".encode()
    entry = {"_path": "share/n.txt", "path_type": "hardlink", "sha256": hashlib.sha256(data).hexdigest()}
    paths = {"paths": [{**entry, "size_in_bytes": len(data)}], "paths_version": 1}
    info = {"info/index.json": json.dumps(index), "info/paths.json": json.dumps(paths)}
    with zipfile.ZipFile(target / f"{stem}.conda", "w") as archive:
        archive.writestr("metadata.json", '{"conda_pkg_format_version": 2}')
        archive.writestr(f"info-{stem}.tar.zst", _tar({name: text.encode() for name, text in info.items()}))
        archive.writestr(f"pkg-{stem}.tar.zst", _tar({"share/n.txt": data}))


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return zstandard.compress(stream.getvalue(), 1)


class _Counting(http.server.SimpleHTTPRequestHandler):
    """Serves the channel, and adds up what it gives away."""

    requests = 0
    sent = 0

    def log_message(self, *args: object) -> None: ...

    def copyfile(self, source: Any, outputfile: Any) -> None:
        data = source.read()
        _Counting.requests += 1
        _Counting.sent += len(data)
        outputfile.write(data)


def solved(folder: Path) -> dict[str, int]:
    """Solve one package and what it needs, as a client of the served channel; its last index is the sharded one."""
    handler = functools.partial(_Counting, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = solve(Request(specs=("lib5",), channels=(f"http://127.0.0.1:{server.server_port}",)))
        server.shutdown()
    assert [r.name.normalized for r in found] == [f"lib{number}" for number in range(6)]
    return {"requests": _Counting.requests, "bytes": _Counting.sent}


def checked(folder: Path) -> dict[str, int]:
    problems, count = channel_check.check(FolderSource(folder))
    assert not problems
    return {"packages": count}


def pruned(folder: Path) -> dict[str, int]:
    return {"packages": len(channel_prune.prune(folder, keep=1, dry_run=False).packages)}


def again(folder: Path) -> dict[str, int]:
    """Index it once more, when one package is new."""
    write(folder.parent, {**record(0), "name": "extra", "build": "0", "depends": []})
    channels.add(folder, folder.parent / "extra-1.0-0.conda")
    return {}


def calls_of(work: Callable[[], dict[str, int]]) -> dict[str, Any]:
    """Do it, and count."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    cpu, started = used(), time.monotonic()
    sys.setprofile(profile)
    told = work()
    sys.setprofile(None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cpu": used() - cpu, "wall": time.monotonic() - started, "memory": peak, "calls": count, **told}


def indexed(folder: Path) -> dict[str, int]:
    channels.index(folder)
    return {}


_TASKS: dict[str, Callable[[Path], dict[str, int]]] = {
    "index": indexed,
    "add": again,
    "check": checked,
    "prune": pruned,
    "solve": solved,
}

if __name__ == "__main__":
    task, place, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if task == "make":
        make(place, size)
    else:
        print(json.dumps(calls_of(lambda: _TASKS[task](place))))
