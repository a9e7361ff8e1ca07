"""The matrix as a machine sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssm_forge.base import platforms
from ssm_forge.base.arch import ArchList
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import LINUX_64, LINUX_AARCH64
from ssm_forge.bridge import interpreter
from ssm_forge.build import origin
from ssm_forge.flow import overview as matrix
from ssm_forge.install import marker
from ssm_forge.manifest import variants
from ssm_forge.package import read as inspection

_ROOT = Path(__file__).parents[3]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """This project's recipes, a channel and environments of its own, Python 3.10 and 3.12, no network."""
    (tmp_path / "recipes").symlink_to(_ROOT / "recipes")
    monkeypatch.setenv("SSM_FORGE_CHANNEL", str(tmp_path / "channel"))
    monkeypatch.setattr(origin, "conda_reachable", lambda: False)
    monkeypatch.setattr(platforms, "known_here", lambda machine="": LINUX_64)
    monkeypatch.setattr(interpreter, "available", lambda place: ["3.10", "3.12"])
    monkeypatch.setattr(interpreter, "brought", lambda place, platform=None: ["3.11"] if platform else [])
    return Workspace(root=tmp_path, cache=tmp_path / "cache")


def rows(place: Workspace) -> dict[tuple[str, str], matrix.Row]:
    return {(row.variant, row.source): row for row in matrix.rows(place, LINUX_64)}


def test_what_is_available_depends_on_pythons_and_channels(place: Workspace) -> None:
    found = rows(place)
    assert found["cu118", "bridge"].available == ("3.10",)
    assert found["cu118", "bridge"].why_not == "no Python 3.11 with headers on this machine"
    assert found["cu124", "bridge"].available == ("3.10", "3.12")
    assert found["cu130", "conda"].available == ()
    assert found["cu130", "conda"].why_not == "no conda channel can be reached"


def test_for_another_platform_only_rows_that_it_has_are_available_with_pythons_that_both_have(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "available", lambda place: ["3.11", "3.12"])
    found = {(row.variant, row.source): row for row in matrix.rows(place, LINUX_AARCH64)}
    assert found["cu130", "bridge"].available == ("3.11",)
    assert found["cu130", "bridge"].platforms == ("linux-64", "linux-aarch64")
    assert "for linux-aarch64 to be had here" in found["cu130", "bridge"].why_not
    others = [row for key, row in found.items() if key != ("cu130", "bridge")]
    assert {(row.available, row.why_not) for row in others} == {((), "not made for linux-aarch64")}


def test_with_a_channel_every_python_of_a_conda_row_is_available(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "conda_reachable", lambda: True)
    row = rows(place)["cu130", "conda"]
    assert row.available == row.pythons


def test_only_whole_sets_of_packages_count_as_built(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place.channel / "linux-64"
    folder.mkdir(parents=True)
    row = variants.load(place.variants).get("cu124", "bridge")
    one, other = (row.key("3.12", ArchList.parse(archs)).to_provenance() for archs in ("8.0", "9.0"))
    theirs = row.key("3.12", ArchList.parse("8.0"), kernels="upstream").to_provenance()
    made = {
        "a.conda": {"name": "causal-conv1d", "variant": one},
        "b.conda": {"name": "mamba-ssm", "variant": one},
        "c.conda": {"name": "mamba-ssm", "variant": other},
        "d.conda": {},
        "e.conda": {"name": "causal-conv1d", "variant": theirs},
        "f.conda": {"name": "mamba-ssm", "variant": theirs},
    }
    for name in made:
        (folder / name).touch()
    monkeypatch.setattr(inspection, "provenance", lambda package: made[package.name])
    assert rows(place)["cu124", "bridge"].built == ("py3.12: 8.0", "py3.12: 8.0 upstream")


def test_installed_prefixes_are_listed(place: Workspace) -> None:
    prefix = place.envs / "cu124"
    (prefix / "conda-meta").mkdir(parents=True)
    names = ("causal-conv1d-1.7.0-x_0.conda", "mamba-ssm-2.3.1-x_0.conda")
    marker.write_marker(prefix, marker.Installed("cu124", "3.12", "bridge", names, created=True))
    assert rows(place)["cu124", "bridge"].installed == (str(prefix),)
