"""``build --format wheel``: wheels of the channel's packages in its index, each made once; and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from ssm_forge.base.errors import BuildError, UsageError
from ssm_forge.base.files import sha256_of
from ssm_forge.channel import simple_index as index
from ssm_forge.commands.build import build
from ssm_forge.trees.job import wheels_of
from wheel_packages import kernels


def test_the_wheels_of_packages_come_into_the_index_once(tmp_path: Path) -> None:
    channel = tmp_path / "channel"
    packages = [kernels(channel / "linux-64", "causal-conv1d", version="1.7.0"), kernels(channel / "linux-64")]
    made = wheels_of(packages, channel)
    assert [path.parent for path in made] == [channel / "simple" / "cu130-torch211"] * 2
    assert index.projects(channel, "cu130-torch211") == ["causal-conv1d", "mamba-ssm"]
    before = [path.stat().st_ino for path in made]
    assert wheels_of(packages, channel) == made
    assert [path.stat().st_ino for path in made] == before
    assert not list(channel.glob(".wheel-*"))


def test_a_package_that_was_built_anew_gives_another_wheel_in_place_of_the_old_one(tmp_path: Path) -> None:
    channel = tmp_path / "channel"
    (old,) = wheels_of([kernels(channel / "linux-64")], channel)
    digest = sha256_of(old)
    (new,) = wheels_of([kernels(channel / "linux-64", text="x = 1\n")], channel)
    assert new == old
    assert sha256_of(new) != digest
    assert index.entries(channel, "cu130-torch211", "mamba-ssm")[new.name]["hashes"] == {"sha256": sha256_of(new)}


def test_a_package_for_condas_torch_gets_into_no_index(tmp_path: Path) -> None:
    channel = tmp_path / "channel"
    with pytest.raises(BuildError, match="made for the torch of a conda channel"):
        wheels_of([kernels(channel / "linux-64", build="cuda130*")], channel)
    assert index.pages(channel) == []


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--format", "wheel", "--source", "conda"], "wheels are for pip's torch"),
        (["--format", "both", "--variant", "cu129"], "comes from conda channels only"),
        (["--for", "ENV", "--format", "wheel"], "is no environment with a torch of pip's"),
        (["--for", "ENV", "--variant", "cu124"], "'cu124' says otherwise"),
        (["--for", "ENV", "--source", "bridge"], "'bridge' says otherwise"),
    ],
)
def test_what_has_no_wheel_is_said_before_anything_is_built(tmp_path: Path, arguments: list[str], what: str) -> None:
    caught = CliRunner().invoke(build, [str(tmp_path) if word == "ENV" else word for word in arguments])
    assert isinstance(caught.exception, UsageError)
    assert what in caught.exception.what
