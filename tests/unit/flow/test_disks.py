"""Disks: what an installation needs is known before it starts, on each of them."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from front_door import ROOT, assert_one_line_error
from ssm_forge.base import machine
from ssm_forge.base.errors import MachineError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.flow import disks
from ssm_forge.flow.disks import Need, Packages
from ssm_forge.manifest import variants
from ssm_forge.solve import lock

HUGE = 10**18


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, tmp_path / "cache")


def test_too_little_disk_says_need_have_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "free_disk", lambda path: 3_000_000_000)
    here = [Need(tmp_path / "a", 1_000_000_000, "move a"), Need(tmp_path / "b", 2_000_000_000, "move b")]
    disks.check(here)
    with pytest.raises(MachineError) as error:
        disks.check([*here, Need(tmp_path / "b", 500_000_000, "move b")])
    assert error.value.what == (
        f"this takes 3.5 GB of disk at {tmp_path / 'a'} and {tmp_path / 'b'}, and 3.0 GB are free."
    )
    assert error.value.fix == "Free space, or move b."


def test_free_disk_of_a_folder_that_is_not_there_yet_is_its_parents(tmp_path: Path) -> None:
    assert machine.free_disk(tmp_path / "a/b/c") > 0
    assert machine.device(tmp_path / "a/b/c") == machine.device(tmp_path)


def test_an_environment_on_the_disk_of_the_cache_shares_its_files(place: Workspace, tmp_path: Path) -> None:
    found = disks.needs(Packages(1, 2, HUGE), tmp_path / "prefix", 2, 3, place)
    assert sum(need.bytes for need in found) < HUGE
    other = Path("/dev/shm/prefix")
    if machine.device(other) == machine.device(tmp_path):
        pytest.skip("this machine has one disk only")
    alone = {need.folder: need.bytes for need in disks.needs(Packages(1, 2, HUGE), other, 0, 3, place)}
    assert alone[other] == HUGE
    assert alone[place.package_cache] == 2


def test_a_conda_variant_takes_what_the_lock_says_less_what_is_there(tmp_path: Path) -> None:
    place = Workspace(workspace().root, tmp_path)
    row = variants.load(place.variants).get("cu118", "conda")
    records = lock.environment(place.lock, "cu118").records
    total = sum(r.size or 0 for r in records)
    assert total > 5e9
    found = disks.packages(row, None, place)
    assert found == Packages(total, 4 * total, 4 * total)
    (torch,) = (r for r in records if r.name.normalized == "pytorch")
    (place.package_cache / f"pytorch-{torch.version}-{torch.build}").mkdir(parents=True)
    assert disks.packages(row, None, place).download_bytes == total - (torch.size or 0)


@pytest.mark.parametrize("full", ["prefix", "cache"])
def test_a_full_disk_is_refused_before_anything_starts(full: str, tmp_path: Path) -> None:
    """With a real small disk, in a mount namespace of its own."""
    small = tmp_path / full
    small.mkdir()
    mount = f"mount -t tmpfs -o size=64m none {shlex.quote(str(small))}"
    if subprocess.run(["unshare", "-rm", "bash", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not allow a mount namespace")
    task = f"{ROOT}/run install-mamba --source conda --prefix {tmp_path}/prefix/env"
    settings = f"SSM_FORGE_NO_PIXI=1 SSM_FORGE_CACHE_DIR={tmp_path}/cache SSM_FORGE_CHANNEL={tmp_path}/channel"
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", f"{mount} && {settings} {task}"], capture_output=True, text=True
    )
    move = "choose another --prefix" if full == "prefix" else "set SSM_FORGE_CACHE_DIR"
    assert_one_line_error(done, 3, f"GB of disk at {tmp_path}/{full}", "are free", f"or {move}")
    assert not (tmp_path / "channel").exists()


def test_under_pixi_the_package_cache_is_pixis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PIXI_EXE", "PIXI_CACHE_DIR", "RATTLER_CACHE_DIR", "SSM_FORGE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = Workspace(tmp_path, tmp_path / "own")
    assert place.package_cache == tmp_path / "own/rattler/pkgs"
    monkeypatch.setenv("PIXI_EXE", "/usr/bin/pixi")
    assert place.package_cache == tmp_path / "rattler/cache/pkgs"
    (tmp_path / "pixi").mkdir()
    assert place.package_cache == tmp_path / "pixi/pkgs"
    monkeypatch.setenv("RATTLER_CACHE_DIR", str(tmp_path / "r"))
    assert place.package_cache == tmp_path / "r/pkgs"
    monkeypatch.setenv("PIXI_CACHE_DIR", str(tmp_path / "p"))
    assert place.package_cache == tmp_path / "p/pkgs"
    assert "PIXI_CACHE_DIR" in place.moves_package_cache
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "own"))
    assert place.package_cache == tmp_path / "own/rattler/pkgs"
