"""Environments of another platform: what they are, and what runs their programs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ssm_forge.base import platforms
from ssm_forge.base.errors import MachineError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.base.platforms import LINUX_64, LINUX_AARCH64
from ssm_forge.verify import emulator, installed

ROOT = Path(__file__).parents[3]


def prefix_of(folder: Path, machine: int) -> Path:
    """An environment whose Python is nothing but the header of a program."""
    (folder / "bin").mkdir(parents=True)
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    header[18:20] = machine.to_bytes(2, "little")
    (folder / "bin/python").write_bytes(header)
    return folder


def test_an_environment_of_another_platform_is_told_by_its_python(tmp_path: Path) -> None:
    own, other = (LINUX_64, LINUX_AARCH64) if platforms.here() == LINUX_64 else (LINUX_AARCH64, LINUX_64)
    assert emulator.foreign(prefix_of(tmp_path / "own", own.elf)) is None
    assert emulator.foreign(prefix_of(tmp_path / "other", other.elf)) == other
    (tmp_path / "here/bin").mkdir(parents=True)
    (tmp_path / "here/bin/python").symlink_to(sys.executable)
    assert emulator.foreign(tmp_path / "here") is None
    assert emulator.foreign(tmp_path / "nothing") is None


def test_without_an_emulator_nothing_is_emulated_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms, "known_here", lambda machine="": LINUX_64)
    place = Workspace(root=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(MachineError, match=r"programs for aarch64 do not run .* no emulator is locked"):
        emulator.find(LINUX_AARCH64, place)
    monkeypatch.setattr(installed, "workspace", lambda: place)
    checks = installed._emulated_imports(tmp_path, {}, LINUX_AARCH64)
    assert {check.status for check in checks} == {"not-run"}
    assert {check.name for check in checks} >= {"import torch", "import selective_scan_cuda"}


def test_what_runs_the_imports_is_named_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "qemu-aarch64-static"
    # Starts the program after its own options, as the real one does.
    fake.write_text(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo 'qemu-aarch64 version 7.2.22 (Debian)'; exit; fi\n"
        f'[ "$1" = -L ] || exit 9\nshift 3\nexec {sys.executable} "$@"\n'
    )
    fake.chmod(0o755)
    found = emulator.Emulator(LINUX_AARCH64, fake, tmp_path / "root")
    monkeypatch.setattr(emulator, "find", lambda platform, place: found)
    emulated, *checks = installed._emulated_imports(tmp_path, {"PATH": ""}, LINUX_AARCH64)
    assert (emulated.name, emulated.status) == ("emulated", "pass")
    assert "qemu-aarch64-static 7.2.22 ran the imports" in emulated.detail
    # The stand-in's Python answered, and has none of these.
    assert {check.status for check in checks} == {"fail"}
    assert any("No module named" in check.detail for check in checks)


def test_the_emulator_is_debians_with_the_c_library_of_the_platform() -> None:
    from ssm_forge.bridge import debian

    debs = {deb.package: deb for deb in debian.read_lock(workspace().bridge_locks / "debs.qemu-linux-aarch64.toml")}
    assert {name: deb.architecture for name, deb in debs.items()} == {"qemu-user-static": "amd64", "libc6": "arm64"}
