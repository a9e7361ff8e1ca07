"""The bridge's channel as a whole: what an update of its layout leaves of the packages that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssm_forge.bridge.assemble import drop_older_layout
from ssm_forge.bridge.package import FORMAT


@pytest.fixture
def channel(tmp_path: Path) -> Path:
    folder = tmp_path / "cu130"
    (folder / "linux-64").mkdir(parents=True)
    for name in ("linux-64/pytorch-2.11.0-cuda130_py312_h0_0.conda", ".complete-py3.12-0123", ".packages-py3.12"):
        (folder / name).write_text("x")
    return folder


def names(channel: Path) -> set[str]:
    return {str(path.relative_to(channel)) for path in channel.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", [None, "3\n"])
def test_packages_of_an_older_layout_go_and_one_line_says_so(
    channel: Path, layout: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if layout:
        (channel / ".layout").write_text(layout)
    drop_older_layout(channel)
    assert names(channel) == {".layout"}
    assert " ".join(capsys.readouterr().err.split()).count("of an older layout: its packages are made anew.") == 1
    drop_older_layout(channel)
    assert not capsys.readouterr().err


def test_packages_of_this_layout_stay(channel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (channel / ".layout").write_text(f"{FORMAT}\n")
    before = names(channel)
    drop_older_layout(channel)
    assert names(channel) == before
    assert not capsys.readouterr().err


def test_a_new_channel_is_made_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop_older_layout(tmp_path / "new")
    assert (tmp_path / "new/.layout").read_text() == f"{FORMAT}\n"
    assert not capsys.readouterr().err
