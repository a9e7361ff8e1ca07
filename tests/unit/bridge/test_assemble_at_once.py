"""The bridge's channel as several runs use it at once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from front_door import own_environment
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import LINUX_64
from ssm_forge.base.ui import open_log
from ssm_forge.bridge import assemble as bridge
from ssm_forge.bridge.package import BridgePackage

PATIENCE_SECONDS = 600


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    def packages(parts: Any, workspace: Workspace) -> list[BridgePackage]:
        def nothing(folder: Path) -> None: ...

        names = ("gxx_linux-64", parts.compiler), (f"wheel-{parts.interpreter.minor}", "1")
        return [BridgePackage(name=name, version=version, inputs=(), stage=nothing) for name, version in names]

    monkeypatch.setattr(bridge, "_packages", packages)
    return Workspace(tmp_path, tmp_path / "cache")


def run(place: Workspace, compiler: str, python: str = "3.12") -> list[str]:
    """Assemble; returns what the index then names."""
    parts: Any = SimpleNamespace(
        interpreter=SimpleNamespace(made_from=None, minor=python),
        compiler=compiler,
        variant=SimpleNamespace(name="cu130", row={}),
        there=None,
        platform=LINUX_64,
        cross=None,
        artifacts=(),
        debs=(),
    )
    with open_log(place.logs, "test") as log:
        return named(bridge.assemble(parts, place, log))


def named(channel: Path) -> list[str]:
    index = json.loads((channel / "linux-64/repodata.json").read_text())
    found = index["packages.conda"]
    assert all((channel / "linux-64" / name).exists() for name in found)
    return sorted(f"{entry['name']} {entry['version']}" for entry in found.values())


def other_process(channel: Path) -> subprocess.Popen[bytes]:
    """Another run that builds from the channel, until its input is closed."""
    script = (
        "import sys; from pathlib import Path; from ssm_forge.bridge import assemble\n"
        f"assemble._use(Path({str(channel)!r})); print('in use', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=own_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"in use\n"
    return process


def test_a_channel_that_an_older_release_assembled_gets_the_packages_that_came_since(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(place, "12.2.0") == ["gxx_linux-64 12.2.0", "wheel-3.12 1"]
    usual = bridge._packages

    def more(parts: Any, workspace: Workspace) -> list[BridgePackage]:
        headers = BridgePackage(name="libcublas-dev", version="13", inputs=(), stage=lambda folder: None)
        return [*usual(parts, workspace), headers]

    monkeypatch.setattr(bridge, "_packages", more)
    monkeypatch.setattr(bridge, "_PACKAGE_SET", bridge._PACKAGE_SET + 1)
    assert run(place, "12.2.0") == ["gxx_linux-64 12.2.0", "libcublas-dev 13", "wheel-3.12 1"]


def test_what_a_running_build_installs_from_stays_until_it_ends(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = place.bridge / "cu130"
    assert run(place, "11") == ["gxx_linux-64 11", "wheel-3.12 1"]
    waits = threading.Event()
    monkeypatch.setattr(bridge, "say", lambda message: waits.set() if "waiting for it" in message else None)
    with other_process(channel) as first, ThreadPoolExecutor(1) as pool:
        second = pool.submit(run, place, "12")
        second.add_done_callback(lambda done: waits.set())
        assert waits.wait(PATIENCE_SECONDS)
        still = not second.done() and named(channel)
        first.communicate()
        assert still == ["gxx_linux-64 11", "wheel-3.12 1"]
        assert second.result(PATIENCE_SECONDS) == ["gxx_linux-64 12", "wheel-3.12 1"]


def test_a_run_that_takes_nothing_away_does_not_wait(place: Workspace) -> None:
    run(place, "11")
    with other_process(place.bridge / "cu130") as first:
        assert run(place, "11") == ["gxx_linux-64 11", "wheel-3.12 1"]
        assert run(place, "11", "3.13") == ["gxx_linux-64 11", "wheel-3.12 1", "wheel-3.13 1"]
        first.communicate()


def test_a_process_does_not_wait_for_itself(place: Workspace) -> None:
    run(place, "11")
    assert run(place, "12") == ["gxx_linux-64 12", "wheel-3.12 1"]


@pytest.mark.parametrize(("layout", "alone"), [("3\n", True), (None, False)])
def test_packages_of_an_older_layout_are_those_of_all_pythons(
    place: Workspace, layout: str | None, alone: bool
) -> None:
    run(place, "11", "3.13")
    channel = place.bridge / "cu130"
    if layout:
        (channel / ".layout").write_text(layout)
    parts: Any = SimpleNamespace(interpreter=SimpleNamespace(made_from=None, minor="3.12"))
    assert bridge._replaces(parts, channel) == alone
