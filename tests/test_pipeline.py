"""In which order an installation does its steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssm_forge import pipeline, variants
from ssm_forge.arch import ArchList
from ssm_forge.errors import SolveError
from ssm_forge.paths import Workspace, workspace
from ssm_forge.ui import open_log


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("SSM_FORGE_CHANNEL", str(tmp_path / "channel"))
    return Workspace(workspace().root, tmp_path / "cache")


def test_what_can_not_be_installed_is_found_before_anything_compiles(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From conda, the packages of all environments are solved first: compiling takes minutes."""
    asked: list[tuple[Any, ...]] = []

    def refuse(*args: Any, **more: Any) -> None:
        asked.append(args)
        raise SolveError("no set of packages satisfies the run environment of mamba-ssm")

    monkeypatch.setattr(pipeline, "solve_recipes", refuse)
    monkeypatch.setattr(pipeline, "build", lambda *args, **more: pytest.fail("it compiles before it has solved"))
    monkeypatch.setattr(pipeline, "_announce", lambda work: None)
    row = variants.load(workspace().variants).get("cu130", "conda")
    archs = ArchList.parse("9.0")
    work: Any = SimpleNamespace(
        variant=row, python="3.12", archs=archs, parts=None, to_build=("both",), channels=(), as_dict=dict, jobs=1
    )
    with open_log(tmp_path / "logs", "x") as log, pytest.raises(SolveError):
        pipeline.make_packages(work, place, log)
    assert asked == [(row, "3.12", archs)]
