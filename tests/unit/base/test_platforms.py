"""Platforms by each of their names, and what is made for none of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ssm_forge.base import platforms
from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.platforms import LINUX_64, LINUX_AARCH64


def elf(machine: int, order: int = 1) -> bytes:
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02" + bytes([order])
    header[18:20] = machine.to_bytes(2, "little" if order == 1 else "big")
    return bytes(header)


@pytest.mark.parametrize(
    ("machine", "platform"),
    [("x86_64", LINUX_64), ("AMD64", LINUX_64), ("aarch64", LINUX_AARCH64), ("arm64", LINUX_AARCH64)],
)
def test_a_machine_is_known_by_what_systems_call_it(machine: str, platform: platforms.Platform) -> None:
    assert platforms.here(machine) == platforms.known_here(machine) == platform
    assert platforms.of(platform.subdir) == platforms.of_debian(platform.debian) == platform


def test_a_machine_that_nothing_is_made_for_is_refused_with_those_that_there_are() -> None:
    assert platforms.known_here("riscv64") is None
    with pytest.raises(MachineError, match="this machine is riscv64, and packages are made for x86-64 and aarch64"):
        platforms.here("riscv64")


def test_another_name_of_a_platform_is_refused_with_both() -> None:
    with pytest.raises(UsageError, match="no platform 'linux-arch64' here; there are linux-64 and linux-aarch64"):
        platforms.of("linux-arch64")
    with pytest.raises(UsageError, match="architecture 'all'"):
        platforms.of_debian("all")


def test_a_program_tells_what_it_is_for(tmp_path: Path) -> None:
    assert platforms.of_program(Path(sys.executable)) == platforms.here()
    assert platforms.of_elf(elf(62)) == LINUX_64
    assert platforms.of_elf(elf(183)) == LINUX_AARCH64
    assert platforms.of_elf(elf(21, order=2)) == "machine 21"
    assert platforms.of_elf(b"#!/bin/sh\necho a script of more than 20 bytes") is None
    assert platforms.of_elf(elf(62)[:10]) is None
    assert platforms.of_program(tmp_path / "nothing") is None
