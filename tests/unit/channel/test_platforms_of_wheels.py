"""An index with wheels for two kinds of machines: each keeps its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssm_forge.channel import coverage, wheel_upkeep
from ssm_forge.channel.wheel_upkeep import ProjectPage

PAGE = "cu130-torch211"


def wheels(version: str, machine: str) -> tuple[str, str]:
    """The names of both wheels of a release; that of mamba-ssm requires the other."""
    end = f"1.0+cu130torch2.11-{version}_sm90-cp311-cp311-manylinux_2_32_{machine}.whl"
    return f"causal_conv1d-{end}", f"mamba_ssm-{end}"


def test_newer_wheels_of_one_machine_are_no_reason_to_drop_those_of_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "simple" / PAGE
    folder.mkdir(parents=True)
    names = [name for version in ("3", "4") for name in wheels(version, "x86_64")] + list(wheels("3", "aarch64"))
    for name in names:
        needs = "Requires-Dist: causal-conv1d==1.0+cu130torch2.11\n" if name.startswith("mamba") else ""
        (folder / f"{name}.metadata").write_text(f"Metadata-Version: 2.1\n{needs}\n")
    listing: Any = {ProjectPage(PAGE, "both"): dict.fromkeys(names)}
    assert set(wheel_upkeep._superseded(tmp_path, PAGE, listing, 1)) == set(wheels("3", "x86_64"))


def test_the_table_says_which_platform_a_package_is_for() -> None:
    facts = ("f", "mamba-ssm", "2.3", "13.0", "2.11", "3.11", "9.0", 1, True)
    assert coverage.Item(*facts).label == "9.0"
    assert coverage.Item(*facts, subdir="linux-aarch64").label == "9.0 (linux-aarch64)"
    assert coverage.Item(*facts, kind="wheel", subdir="linux-aarch64").label == "9.0 (wheel, linux-aarch64)"
