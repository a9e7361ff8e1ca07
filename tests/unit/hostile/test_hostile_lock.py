"""Locks: pixi.lock, which the engine reads, and the bridge's pylock.*.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomlkit
import yaml
from hostile import changed, damaged, hostile, judge
from hypothesis import given
from hypothesis import strategies as st

from ssm_forge.base.errors import IntegrityError, MachineError, UsageError
from ssm_forge.bridge import pylock
from ssm_forge.install.downloads import require_plain_names
from ssm_forge.package import intact
from ssm_forge.solve import lock as locks

URL = "https://conda.example/channel/linux-64/tool-1.0-h1_0.conda"
LOCK = {
    "version": 6,
    "environments": {
        "demo": {
            "channels": [{"url": "https://conda.example/channel/"}],
            "packages": {"linux-64": [{"conda": URL}]},
        }
    },
    "packages": [{"conda": URL, "sha256": "0" * 64, "md5": "0" * 32, "depends": ["__glibc >=2.17"], "size": 100}],
}
PYLOCK = {
    "lock-version": "1.0",
    "packages": [
        {
            "name": "einops",
            "version": "0.8.1",
            "wheels": [
                {
                    "url": "https://files.example/einops-0.8.1-py3-none-any.whl",
                    "size": 64359,
                    "hashes": {"sha256": "0" * 64},
                }
            ],
        }
    ],
}


def _yaml(content: Any) -> bytes:
    try:
        return yaml.safe_dump(content).encode()
    except (yaml.YAMLError, ValueError):
        return b""


def _toml(content: Any) -> bytes:
    try:
        return tomlkit.dumps(content).encode()
    except Exception:  # Not everything that JSON has can be said in TOML.
        return b""


_ALIASES = b"a: &a [x,x,x,x,x,x,x,x]\n" + b"".join(b"b%d: &b%d [*a,*a,*a,*a]\n" % (n, n) for n in range(50))


@hostile(0.5)
@given(
    st.one_of(
        changed(LOCK).map(_yaml),
        damaged(_yaml(LOCK)),
        st.binary(max_size=40),
        st.sampled_from((_ALIASES, b"[" * 5_000, b"version: 99", b"version: 6")),
    )
)
def test_a_lock_is_read_by_the_engine_or_called_unreadable(tmp_path: Path, data: bytes) -> None:
    """Half as many examples: the engine reads each."""
    path = tmp_path / "pixi.lock"
    path.write_bytes(data)

    def use(found: tuple[locks.LockedEnvironment, ...]) -> None:
        for environment in found:
            require_plain_names(environment.records)
            [(locks.describe(r), intact.digest(r), r.url) for r in environment.records]

    judge(lambda: locks.read(path), UsageError, IntegrityError, then=use)


@hostile()
@given(st.one_of(changed(PYLOCK).map(_toml), damaged(_toml(PYLOCK)), st.binary(max_size=40)))
def test_a_lock_of_wheels_names_plain_files_or_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "pylock.cu130-py312.toml"
    path.write_bytes(data)

    def use(wheels: list[pylock.LockedWheel]) -> None:
        for wheel in wheels:
            assert "/" not in wheel.artifact.name and len(wheel.artifact.sha256) == 64
            assert wheel.tags

    judge(lambda: pylock.read(path, "3.12"), UsageError, MachineError, then=use)


def test_the_valid_ones_are_read(tmp_path: Path) -> None:
    (tmp_path / "pixi.lock").write_bytes(_yaml(LOCK))
    assert locks.read(tmp_path / "pixi.lock")[0].records[0].url == URL
    (tmp_path / "pylock.toml").write_bytes(_toml(PYLOCK))
    (wheel,) = pylock.read(tmp_path / "pylock.toml", "3.12")
    assert {tag.platform for tag in wheel.tags} == {"any"}


def test_a_lock_larger_than_any_is_not_given_to_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "pixi.lock"
    with path.open("wb") as stream:
        stream.truncate(10_000_000_000)
    with pytest.raises(UsageError, match="larger than 67108864 bytes"):
        locks.read(path)
