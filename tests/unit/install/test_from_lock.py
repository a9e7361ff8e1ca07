"""Environments made from a lock alone: exact, verified, refused when a byte differs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conda_channel import CANONICAL, demo_channel, index, lock_channel, make_package, served
from ssm_forge.base import locks as file_locks
from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.install import from_lock
from ssm_forge.install.downloads import Mirror
from ssm_forge.install.from_lock import create
from ssm_forge.install.integrity import verify
from ssm_forge.install.marker import UNFINISHED
from ssm_forge.package.installed import records
from ssm_forge.solve import lock as locks

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path, cache=tmp_path / "cache")


@pytest.fixture
def channel(tmp_path: Path) -> Path:
    return demo_channel(tmp_path)


@pytest.fixture
def locked(channel: Path, place: Workspace) -> locks.LockedEnvironment:
    lock_channel(channel, place.lock, "tool")
    return locks.environment(place.lock, "demo")


@pytest.fixture
def mirror(channel: Path) -> Mirror:
    return Mirror.parse(f"{CANONICAL}={channel}")


@pytest.fixture
def prefix(tmp_path: Path, locked: locks.LockedEnvironment, mirror: Mirror, place: Workspace) -> Path:
    target = tmp_path / "prefix"
    create(locked, target, mirrors=[mirror], workspace=place)
    return target


def test_created_environment_is_exactly_the_lock(prefix: Path, locked: locks.LockedEnvironment) -> None:
    report = verify(prefix, locked.records)
    assert report.deviations == ()
    assert (report.packages, report.files) == (2, 3)


def test_records_name_the_canonical_url_not_the_mirror(prefix: Path) -> None:
    assert {r.url for r in records(prefix).values()} == {
        f"{CANONICAL}linux-64/base-1.0-h1_0.conda",
        f"{CANONICAL}linux-64/tool-1.0-h1_0.conda",
    }


@pytest.mark.parametrize(
    ("damage", "kind", "path"),
    [
        (lambda p: (p / "share/tool.txt").write_text("tooL\n"), "modified file", "share/tool.txt"),
        (lambda p: (p / "share/base/data.txt").unlink(), "missing file", "share/base/data.txt"),
        (lambda p: (p / "share/new.txt").write_text("x"), "extra file", "share/new.txt"),
        (lambda p: (p / UNFINISHED).touch(), "incomplete", str(UNFINISHED)),
    ],
)
def test_every_deviation_of_a_file_is_named(prefix, locked, damage, kind, path) -> None:  # type: ignore[no-untyped-def]
    damage(prefix)
    assert [(d.kind, d.path) for d in verify(prefix, locked.records).deviations] == [(kind, path)]


def test_missing_and_extra_packages_are_named(prefix: Path, locked: locks.LockedEnvironment) -> None:
    only_base = [r for r in locked.records if r.name.normalized == "base"]
    assert [(d.kind, d.package) for d in verify(prefix, only_base).deviations] == [("extra package", "tool")]
    (prefix / "conda-meta" / "base-1.0-h1_0.json").unlink()
    found = {(d.kind, d.package or d.path) for d in verify(prefix, locked.records).deviations}
    assert found == {("missing package", "base"), ("extra file", "share/base/data.txt")}


def test_packages_built_here_may_lie_on_top(prefix: Path, locked: locks.LockedEnvironment) -> None:
    only_base = [r for r in locked.records if r.name.normalized == "base"]
    report = verify(prefix, only_base, allowed_channels=[CANONICAL])
    assert report.deviations == ()
    assert report.on_top == ("tool 1.0 h1_0",)
    (prefix / "share/tool.txt").write_text("changed")
    assert [d.path for d in verify(prefix, only_base, allowed_channels=[CANONICAL]).deviations] == ["share/tool.txt"]


def test_a_package_with_other_bytes_is_refused_and_nothing_is_left(
    tmp_path: Path, channel: Path, locked: locks.LockedEnvironment, mirror: Mirror, place: Workspace
) -> None:
    archive = channel / "linux-64" / "tool-1.0-h1_0.conda"
    make_package(channel, "tool", {"bin/tool": "#!/bin/sh\necho evil\n"}, depends=("base",))
    with pytest.raises(IntegrityError, match=r"tool-1\.0-h1_0\.conda is not the locked package: sha256"):
        create(locked, tmp_path / "prefix", mirrors=[mirror], workspace=place)
    assert archive.exists()
    assert not (tmp_path / "prefix").exists()
    assert not list(place.cache.rglob("tool-*"))


def test_a_refused_package_leaves_the_old_environment_alone(
    prefix: Path, channel: Path, locked: locks.LockedEnvironment, mirror: Mirror, place: Workspace
) -> None:
    make_package(channel, "tool", {"bin/tool": "evil"}, depends=("base",))
    with pytest.raises(IntegrityError):
        create(locked, prefix, mirrors=[mirror], workspace=place, force=True)
    assert verify(prefix, locked.records).deviations == ()


def test_an_unreachable_package_is_a_network_error_and_the_old_environment_stays(
    prefix: Path, locked: locks.LockedEnvironment, place: Workspace
) -> None:
    shutil.rmtree(place.cache)
    nowhere = Mirror(CANONICAL, "http://127.0.0.1:9/")
    with pytest.raises((NetworkError,)):
        create(locked, prefix, mirrors=[nowhere], workspace=place, force=True)
    assert verify(prefix, locked.records).deviations == ()


def test_an_existing_environment_needs_force(
    prefix: Path, locked: locks.LockedEnvironment, mirror: Mirror, place: Workspace
) -> None:
    with pytest.raises(UsageError, match="--force"):
        create(locked, prefix, mirrors=[mirror], workspace=place)
    (prefix / "share/new.txt").write_text("x")
    create(locked, prefix, mirrors=[mirror], workspace=place, force=True)
    assert not (prefix / "share/new.txt").exists()


def test_an_interrupted_creation_starts_over(
    prefix: Path, locked: locks.LockedEnvironment, mirror: Mirror, place: Workspace
) -> None:
    (prefix / UNFINISHED).touch()
    (prefix / "share/tool.txt").unlink()
    leftover = prefix.with_name(f".{prefix.name}.old-99999")
    leftover.mkdir()
    create(locked, prefix, mirrors=[mirror], workspace=place)
    assert verify(prefix, locked.records).deviations == ()
    assert not leftover.exists()


def test_a_second_run_waits_for_the_first_and_takes_nothing_from_it(
    tmp_path: Path,
    locked: locks.LockedEnvironment,
    mirror: Mirror,
    place: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "prefix"
    waits = threading.Event()
    monkeypatch.setattr(file_locks, "say", lambda message: waits.set())
    with ThreadPoolExecutor(1) as pool:
        second = []
        link = from_lock._link

        def meanwhile(*arguments: object) -> None:
            if not second:
                second.append(pool.submit(create, locked, target, mirrors=[mirror], workspace=place))
                assert waits.wait(600), "the second run did not wait"
            link(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(from_lock, "_link", meanwhile)
        create(locked, target, mirrors=[mirror], workspace=place)
        with pytest.raises(UsageError, match="exists already"):
            second[0].result()
    assert verify(target, locked.records).deviations == ()


@pytest.fixture
def server(channel: Path):  # type: ignore[no-untyped-def]
    """The channel over HTTP."""
    with served(channel) as url:
        yield Mirror.parse(f"{CANONICAL}={url}")


def test_a_mirror_on_the_network_is_honoured_and_its_bytes_are_checked(
    tmp_path: Path, channel: Path, server: Mirror, locked: locks.LockedEnvironment, place: Workspace
) -> None:
    report = create(locked, tmp_path / "good", mirrors=[server], workspace=place)
    assert report.packages == 2
    shutil.rmtree(place.cache)
    make_package(channel, "tool", {"bin/tool": "evil"}, depends=("base",))
    with pytest.raises(IntegrityError, match="hash mismatch"):
        create(locked, tmp_path / "bad", mirrors=[server], workspace=place)
    assert not (tmp_path / "bad").exists()


def test_a_damaged_cache_does_not_reach_a_new_environment(
    prefix: Path, tmp_path: Path, locked: locks.LockedEnvironment, mirror: Mirror, place: Workspace
) -> None:
    cached = next(place.package_cache.glob("tool-*/share/tool.txt"))
    cached.write_text("damaged\n")
    create(locked, tmp_path / "second", mirrors=[mirror], workspace=place)
    assert (tmp_path / "second/share/tool.txt").read_text() == "tool\n"


def test_md5_alone_is_checked_too(
    tmp_path: Path, channel: Path, locked: locks.LockedEnvironment, mirror: Mirror, place: Workspace
) -> None:
    for record in locked.records:
        record.sha256 = None
    create(locked, tmp_path / "good", mirrors=[mirror], workspace=place)
    make_package(channel, "tool", {"bin/tool": "evil"}, depends=("base",))
    with pytest.raises(IntegrityError, match="md5"):
        create(locked, tmp_path / "bad", mirrors=[mirror], workspace=place)


def test_a_lock_without_hash_is_refused(
    tmp_path: Path, locked: locks.LockedEnvironment, mirror: Mirror, place: Workspace
) -> None:
    for record in locked.records:
        record.sha256 = record.md5 = None
    with pytest.raises(IntegrityError, match="no hash"):
        create(locked, tmp_path / "prefix", mirrors=[mirror], workspace=place)


@pytest.mark.parametrize("text", ["nothing", "https://example.org=/does/not/exist", "=x"])
def test_a_bad_mirror_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--mirror"):
        Mirror.parse(text)


def test_command_line_creates_and_verifies_without_network(tmp_path: Path, channel: Path, place: Workspace) -> None:
    lock_channel(channel, place.lock, "tool")
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow a network namespace")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "-rn", sys.executable, "-m", "ssm_forge", "env", *words, "--lock", str(place.lock)],
            capture_output=True,
            text=True,
            env={
                "PYTHONPATH": str(ROOT / "scripts"),
                "SSM_FORGE_CACHE_DIR": str(place.cache),
                "PATH": "/usr/bin:/bin",
            },
        )

    prefix = tmp_path / "made"
    made = run("create", "demo", "--locked", "--prefix", str(prefix), "--mirror", f"{CANONICAL}={channel}")
    assert made.returncode == 0, made.stderr
    assert run("verify", "demo", "--prefix", str(prefix)).returncode == 0
    (prefix / "bin/tool").write_text("other")
    wrong = run("verify", "demo", "--prefix", str(prefix))
    assert wrong.returncode == 9
    assert "modified file: bin/tool (of tool)" in wrong.stdout


def test_a_file_that_two_packages_bring_is_no_deviation(tmp_path: Path, place: Workspace) -> None:
    """As CUDA 11.8's cudatoolkit, which cuDNN needs, and NVIDIA's own packages: one of the two is in place."""
    channel = tmp_path / "channel"
    for name in ("cudatoolkit", "libcublas"):
        make_package(channel, name, {"lib/libcublas.so.11": f"of {name}\n", f"share/{name}.txt": "x\n"})
    index(channel)
    lock_channel(channel, place.lock, "cudatoolkit", "libcublas")
    locked = locks.environment(place.lock, "demo")
    prefix = tmp_path / "prefix"
    create(locked, prefix, mirrors=[Mirror.parse(f"{CANONICAL}={channel}")], workspace=place)
    assert (prefix / "lib/libcublas.so.11").read_text() in ("of cudatoolkit\n", "of libcublas\n")
    assert verify(prefix, locked.records).deviations == ()
    (prefix / "lib/libcublas.so.11").write_text("of nobody\n")
    assert [(d.kind, d.path) for d in verify(prefix, locked.records).deviations] == [
        ("modified file", "lib/libcublas.so.11")
    ]
