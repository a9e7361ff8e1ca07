"""Builds and environments from the locks without a network: a clone, the caches, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssm_forge.base.errors import IntegrityError, NetworkError
from ssm_forge.build import offline
from ssm_forge.package import installed as package_installed
from ssm_forge.solve import lock
from toy_clone import Clone, clone, edited

__all__ = ["clone"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_clone_with_the_caches_of_a_machine_that_built_once_needs_no_network(clone: Clone, tmp_path: Path) -> None:
    first = clone()
    assert first[0] == 0, first[1]
    again = clone.copy(tmp_path / "again")
    code, said = again(offline=True)
    assert code == 0, said
    assert "No conda channel can be reached: the caches have everything that the locks name." in said
    assert again.packages() == clone.packages()
    assert len(again.packages()) == 2
    prefix = again.place.envs / "cu130"
    assert (prefix / "share/mamba-ssm.txt").read_text() == "tool\nbase\n"
    urls = {record.url.rpartition("/")[0] for record in package_installed.records(prefix).values()}
    assert urls == {f"{again.place.channel.as_uri()}/linux-64", "https://conda.anaconda.org/conda-forge/linux-64"}
    # The compilers are the same for every GPU, so that those for another need no network either.
    other = clone.copy(tmp_path / "other")
    code, said = other(archs="8.0", offline=True)
    assert code == 0, said
    assert all(re.match(r".*-80_h", name) for name in other.packages())


def test_what_is_missing_is_said_before_anything_is_built(clone: Clone) -> None:
    """Of a machine that asked for conda; another one would take the bridge."""
    code, said = clone(source="conda", offline=True)
    assert code == NetworkError.exit_code
    assert "conda-forge/ could not be read" in said
    assert "The caches lack base-3.12.1-h1_0.conda (and 4 more), which is locked." in said
    assert clone.packages() == {}


def test_a_lock_edited_by_hand_is_refused_by_the_package_and_nothing_is_built(clone: Clone) -> None:
    edited(clone.place, "tool")
    code, said = clone()
    assert code == IntegrityError.exit_code, said
    assert f"/tool-3.12.1-h1_0.conda is not the package that is locked: sha256 {'0' * 64} is locked, sha256 " in said
    assert "If the lock was edited, restore it. Write the locks anew with './run lock'." in said
    assert clone.packages() == {}


def test_a_toolchain_package_that_is_gone_is_named_with_what_to_do(clone: Clone, tmp_path: Path) -> None:
    (tmp_path / "served/linux-64/tool-3.12.1-h1_0.conda").unlink()
    code, said = clone()
    assert code == NetworkError.exit_code, said
    assert "tool-3.12.1-h1_0.conda, which is locked, can't be had: http://" in said
    assert "answered 404. Write the locks anew with './run lock'." in said
    assert clone.packages() == {}


def test_a_package_in_the_cache_counts_where_it_is_the_locked_one(clone: Clone) -> None:
    place = clone.place
    records = lock.environment(place.lock, "cu130").records
    assert offline.missing(records, place) == list(records)
    for record in records:
        stem = f"{record.name.normalized}-{record.version}-{record.build}"
        (place.package_cache / stem).mkdir(parents=True)
        assert record.sha256
        (place.package_cache / f"{stem}.lock").write_bytes(bytes(8) + bytes(record.sha256))
    assert offline.missing(records, place) == []
    (place.package_cache / f"{stem}.lock").write_bytes(bytes(40))
    assert offline.missing(records, place) == [records[-1]]
