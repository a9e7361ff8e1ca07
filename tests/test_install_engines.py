"""Making a prefix with every engine that pixi.toml allows: beside its place, or in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from conda_channel import demo_channel, solve_channel
from ssm_forge import install as installing
from ssm_forge.errors import IntegrityError
from ssm_forge.install import Installed, install, is_foreign, read_marker
from ssm_forge.paths import Workspace
from ssm_forge.ui import open_log

OURS = Installed(variant="cu130", python="3.12", source="conda", packages=("tool-1.0-h1_0.conda",), created=True)


@pytest.fixture(params=["relocating engine", "in place"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of making a prefix: py-rattler 0.28 beside its place, 0.25 in it."""
    if request.param == "in place":
        monkeypatch.setattr(installing, "_engine_relocates", lambda: False)
    elif not installing._engine_relocates():
        pytest.skip("this py-rattler can't make a prefix beside its place")


@pytest.mark.usefixtures("engine")
def test_a_prefix_of_our_own_is_made_and_replaced(tmp_path: Path) -> None:
    place = Workspace(root=tmp_path, cache=tmp_path / "cache")
    records = solve_channel(demo_channel(tmp_path), "tool")
    prefix = tmp_path / "envs" / "cu130"
    with open_log(tmp_path / "logs", "install") as log:
        install(records, prefix, OURS, place, log)
        (prefix / "stray").touch()
        install(records, prefix, OURS, place, log)
    assert read_marker(prefix) == OURS
    assert not is_foreign(prefix)
    assert (prefix / "bin/tool").exists()
    assert not (prefix / "stray").exists()
    assert [p.name for p in prefix.parent.iterdir() if p.name != ".cu130.lock"] == ["cu130"]


@pytest.mark.usefixtures("engine")
def test_a_failure_leaves_the_old_prefix_as_it_was(tmp_path: Path) -> None:
    place = Workspace(root=tmp_path, cache=tmp_path / "cache")
    channel = demo_channel(tmp_path)
    records = solve_channel(channel, "tool")
    prefix = tmp_path / "envs" / "cu130"
    with open_log(tmp_path / "logs", "install") as log:
        install(records, prefix, OURS, place, log)
        (channel / "linux-64" / "tool-1.0-h1_0.conda").write_bytes(b"not a package")
        for cached in place.package_cache.glob("tool-*"):
            if cached.is_dir():
                (cached / "info/index.json").unlink()
        with pytest.raises(IntegrityError):
            install(records, prefix, OURS, place, log)
    assert (prefix / "bin/tool").exists()
    assert read_marker(prefix) == OURS
    assert [p.name for p in prefix.parent.iterdir() if p.name != ".cu130.lock"] == ["cu130"]
