"""One of several machines that share a folder: ``shared_host.py FOLDER NAME ROUNDS SEED``, in namespaces of its own.

Works in forked children, of which many are killed: some at a random step (a call that our own modules make), some at
a random moment, which also hits the engine. Then obeys what it reads from stdin: ``finish`` does each kind of work
once more and undisturbed, ``hang`` starts a build that does not end. Prints one JSON object a line.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import http.server
import json
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Imported here, once, not in each child.
import rattler.index  # noqa: F401
from killed_publisher import Steps, end_after
from lab import serving

from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import ForgeError
from ssm_forge.base.fetch import Artifact, fetch_all
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.base.ui import open_log
from ssm_forge.build import request as build_request
from ssm_forge.build import run as builds
from ssm_forge.channel import folder as channels
from ssm_forge.channel import prune as channel_prune
from ssm_forge.install import marker, swap
from ssm_forge.install import prefix as install
from ssm_forge.manifest import variants
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.recipe import Rendered
from ssm_forge.package import installed as package_installed
from ssm_forge.publish.send import publish
from ssm_forge.serve.tokens import TokenStore
from ssm_forge.solve.solver import Request, solve

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


@dataclass(frozen=True)
class Machine:
    """This machine.

    Attributes:
        folder: what all machines share.
        name: of this one.
        files: address of a server of files, on this machine.
        server: address of this machine's server of the channel.
    """

    folder: Path
    name: str
    files: str
    server: str

    @property
    def place(self) -> Workspace:
        return Workspace(root=self.folder, cache=self.folder / "cache")

    @property
    def channel(self) -> Path:
        return self.folder / "channel"

    def made(self, kind: str, number: int) -> Path:
        return self.folder / "made" / f"{kind}{self.name}-{number}.0-h1_0.conda"

    # Each kind of work; ``number`` says which one it is.

    def build(self, number: int) -> None:
        os.environ["PYTHONPATH"] = str(self.folder / "fake")  # Where the worker is another one.
        filename = self.made("built", number).name
        key = variants.load(workspace().variants).get("cu130", "bridge").key("3.12", ArchList.parse("9.0"))
        key = BuildKey.from_settings({**key.settings, "package": filename})
        request = build_request.BuildRequest(
            Rendered(*filename.removesuffix(".conda").rsplit("-", 2), engine=None), key, ()
        )
        with open_log(self.folder / "logs" / self.name, "build") as log:
            builds.build(request, channel=self.channel, jobs=1, workspace=self.place, log=log)

    def publish(self, number: int) -> None:
        publish([self.made("sent", number)], self.server if number % 2 else str(self.channel))

    def prune(self, number: int) -> None:
        channel_prune.prune(self.channel, keep=2, dry_run=False)

    def fetch(self, number: int) -> None:
        path = self.made("sent", number)
        wanted = Artifact(f"{self.files}/{path.name}", sha256_of(path), path.stat().st_size, path.name)
        assert sha256_of(fetch_all([wanted], self.place)[wanted]) == wanted.sha256

    def install(self, number: int) -> None:
        names = sorted({record.name for record in channels.records(self.channel).values()})
        prefix = self.folder / "envs" / ("all" if number % 3 else self.name)
        records = solve(Request(specs=tuple(names), channels=(self.channel.as_uri(),)))
        made = marker.Installed("", "", "conda", tuple(record.file_name for record in records), created=True)
        try:
            with open_log(self.folder / "logs" / self.name, "install") as log:
                install.install(records, prefix, made, self.place, log)
        except ForgeError:
            # Another machine may have pruned what this one had just chosen; nothing else is an excuse.
            if all((self.channel / "linux-64" / record.file_name).exists() for record in records):
                raise
            os._exit(3)
        with swap.locked(prefix):
            require_right(prefix)


def require_right(prefix: Path) -> None:
    """An environment holds exactly what its records say, and the right bytes of each package."""
    if not prefix.exists():
        return
    told = marker.read_marker(prefix)
    assert told is not None, f"{prefix} has no marker"
    records = package_installed.records(prefix)
    assert {record.filename for record in records.values()} == set(told.packages), f"{prefix} has other packages"
    texts = {path.stem: path.read_text() for path in (prefix / "share").glob("*.txt")}
    assert texts == {name: f"{name} {record.version}\n" for name, record in records.items()}, f"{prefix}: {texts}"


def run(work: Callable[[int], None], number: int, steps: Steps, last: int | None, seconds: float | None) -> str:
    """Do it in a child, killed at a step or after a time where one is given; says how it ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            if seconds is None:
                steps.follow(last)
            work(number)
            status = 0
        except BaseException as error:
            sys.setprofile(None)
            os.write(write, f"{type(error).__name__}: {error}".encode()[:4_000])
            status = 1
        os._exit(status)
    os.close(write)
    status = os.waitpid(child, 0)[1] if seconds is None else end_after(child, seconds)
    told = os.read(read, 4_000).decode(errors="replace")
    os.close(read)
    if os.WIFSIGNALED(status):
        return "killed"
    return {0: "ended", 3: "pruned"}.get(os.WEXITSTATUS(status), f"failed: {told}")


def say(**told: object) -> None:
    print(json.dumps(told), flush=True)


def others() -> list[str]:
    """Processes of this machine but its first and its server; those that ended are asked after."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if int(folder.name) != os.getpid() and " serve " not in command:
                found.append(command)
    return found


def lasting() -> list[str]:
    """Commands of other processes; what a build started and was killed for takes a moment to go."""
    deadline = time.monotonic() + 30
    while True:
        found = others()
        of_builds = [command for command in found if "sleep" in command or "worker" in command]
        if not of_builds or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def obey(machine: Machine, works: dict[str, Callable[[int], None]], steps: Steps) -> None:
    for line in sys.stdin:
        if line.strip() == "finish":
            for name, work in works.items():
                say(work=name, end=run(work, 0, steps, None, None))
            say(finished=lasting())
        elif line.strip() == "hang":
            os.environ["SHARED_HOST_HANG"] = "1"
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    machine.build(0)
                os._exit(1)
            while not list((machine.place.cache / "build").glob("*/hanging")):
                time.sleep(0.02)
            say(hangs=True)


def main(folder: Path, name: str, rounds: int, seed: int) -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14s", b"lo", _IFF_UP, b""))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder / "made"))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # As the real one but for what it is about: nothing here was compiled.
    builds.finalize = lambda package, *_, **__: package  # type: ignore[assignment]
    home = folder / f"home-{name}"
    home.mkdir()
    store = TokenStore(home / "tokens.json")
    os.environ["SSM_FORGE_CHANNEL_TOKEN"] = f"127.0.0.1={store.add(name, 'write', 1)}"
    with serving(folder / "channel", store, home) as server:
        # A process of its own: a child that is forked has none of the threads.
        pid = os.fork()
        if pid == 0:
            sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
            files.serve_forever()
        machine = Machine(folder, name, f"http://127.0.0.1:{files.server_port}", server.url)
        works = {
            work.__name__: work
            for work in (machine.build, machine.publish, machine.fetch, machine.install, machine.prune)
        }
        steps, chance = Steps(), random.Random(f"{seed} {name}")
        whole: dict[str, int] = {}
        longest: dict[str, float] = {}
        for kind, work in works.items():
            started = time.monotonic()
            say(work=kind, end=run(work, 1, steps, None, None))
            whole[kind], longest[kind] = steps.count, time.monotonic() - started
        for number in range(rounds):
            kind = chance.choice(list(works))
            way = chance.choice(("step", "step", "clock", "live"))
            last = chance.randint(1, max(1, whole[kind])) if way == "step" else None
            seconds = chance.uniform(0, longest[kind]) if way == "clock" else None
            say(work=kind, end=run(works[kind], number + 2, steps, last, seconds))
        say(rounds=rounds)
        obey(machine, works, steps)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
