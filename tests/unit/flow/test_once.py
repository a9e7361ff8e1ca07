"""Work that a plan has done is not done again: a recipe is rendered once a package, a build's key read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import rattler_build

from ssm_forge.base import machine
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.build import origin
from ssm_forge.build import provenance as materials
from ssm_forge.flow import pipeline, planning
from ssm_forge.flow.plan import Options
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.solve import recipes as solve_only


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """This checkout with an empty channel, on a machine without GPU and with room for anything."""
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SSM_FORGE_CHANNEL", str(tmp_path / "channel"))
    monkeypatch.delenv("PIXI_EXE", raising=False)
    monkeypatch.setattr(machine, "gpus", lambda: ())
    monkeypatch.setattr("ssm_forge.flow.disks.free_disk", lambda path: 10**12)
    monkeypatch.setattr("ssm_forge.build.jobs.free_memory", lambda: 10**12)
    return replace(workspace(), cache=tmp_path / "cache")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often a recipe is rendered, a key read and a channel asked whether it answers."""
    counts: Counter[str] = Counter()
    from_file, from_settings = rattler_build.Stage0Recipe.from_file, BuildKey.from_settings

    class Recipe:
        @staticmethod
        def from_file(path: str) -> rattler_build.Stage0Recipe:
            counts[Path(path).parent.name] += 1
            return from_file(path)

    def reads(settings: dict[str, str]) -> BuildKey:
        counts["key"] += 1
        return from_settings(settings)

    def answers() -> bool:
        counts["channels"] += 1
        return True

    monkeypatch.setattr(rattler_build, "Stage0Recipe", Recipe)
    monkeypatch.setattr(BuildKey, "from_settings", reads)
    monkeypatch.setattr(origin, "conda_reachable", answers)
    yield counts


# From the channels there is also what recipes/pixi.lock was made from, which the plan is compared with.
@pytest.mark.parametrize(("source", "times"), [("bridge", 1), ("auto", 2)])
def test_a_dry_run_renders_each_recipe_once_and_asks_the_channels_once(
    source: str, times: int, place: Workspace, counted: Counter[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(source=source, prefix=tmp_path / "prefix")  # type: ignore[arg-type]
    pipeline.install_mamba(options, dry_run=True, as_json=True)
    assert '"to build"' in capsys.readouterr().out
    assert counted == {**dict.fromkeys((*PROJECTS, "key"), times), **({"channels": 1} if source == "auto" else {})}


def test_what_comes_after_the_plan_renders_nothing(place: Workspace, counted: Counter[str], tmp_path: Path) -> None:
    work = planning.make(Options(source="conda", prefix=tmp_path / "prefix"), place)
    planned = counted.copy()
    requests = [package.request for package in work.to_build]
    assert len(requests) == len(PROJECTS)
    assert list(solve_only.pending([request.rendered for request in requests])) == [
        request.filename for request in requests
    ]
    for request in requests:
        assert materials.collect(request.rendered, request.key, place)
    assert counted == planned
