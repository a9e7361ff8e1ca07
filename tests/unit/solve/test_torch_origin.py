"""Kernels made for one torch are refused beside another: conda-forge's, pytorch.org's and the bridge's differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import SolveError
from ssm_forge.base.paths import workspace
from ssm_forge.manifest import variants
from ssm_forge.manifest.recipe import PROJECTS, render
from ssm_forge.manifest.variants import Variant
from ssm_forge.solve.solver import Request, solve

ROWS = [pytest.param(row, id=f"{row.name}-{row.source}") for row in variants.load(workspace().variants).variants]


def torches(row: Variant) -> dict[str, tuple[str, str]]:
    """Who builds torch -> version and build string of what they offer of the row's minor, as their channels have it."""
    cuda, tag = row.cuda.replace(".", ""), row.pythons[-1].replace(".", "")
    version = row.row["pytorch_host"]
    version = version if version.count(".") == 2 else f"{version}.1"
    return {
        # Of 2.3 conda-forge has a newer one than pytorch.org, with a higher build number.
        "conda-forge": (f"{row.torch}.9", f"cuda{cuda}_mkl_py{tag}_h24b5296_300"),
        "conda-forge, before 2.5": (f"{row.torch}.9", f"cuda{cuda}_py{tag}h0f2a4e6_300"),
        "pytorch.org": (version, f"py{row.pythons[-1]}_cuda{row.cuda}_cudnn8.7.0_0"),
        "pytorch.org, for the processor": (version, f"py{row.pythons[-1]}_cpu_0"),
        "bridge": (version, f"bridge_cuda{cuda}_py{tag}_h01234567_0"),
    }


def maker(row: Variant) -> str:
    return "bridge" if row.source == "bridge" else "pytorch.org" if row.cuda == "11.8" else "conda-forge"


def channel(folder: Path, version: str, build: str) -> str:
    """A channel of one torch."""
    record = {
        "name": "pytorch",
        "version": version,
        "build": build,
        "build_number": int(build.rpartition("_")[2]),
        "depends": [],
        "subdir": "linux-64",
    }
    packages = {f"pytorch-{version}-{build}.conda": record}
    index = {"info": {"subdir": "linux-64"}, "packages": {}, "packages.conda": packages}
    (folder / "linux-64").mkdir(parents=True)
    (folder / "linux-64/repodata.json").write_text(json.dumps(index))
    return folder.as_uri()


def torch_specs(row: Variant, project: str) -> list[str]:
    """What the rendered recipe asks of torch: to build with, and to run with."""
    rendered = render(project, row.key(row.pythons[-1], ArchList.parse(row.default_archs)), workspace())
    requirements = rendered.engine.recipe.requirements
    found = [str(spec) for spec in (*requirements.host, *requirements.run) if str(spec).startswith("pytorch ")]
    assert len(found) == 2
    return found


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "flexible"])
@pytest.mark.parametrize("row", ROWS)
def test_of_all_torches_only_the_own_one_is_taken(row: Variant, strict: bool, tmp_path: Path) -> None:
    offered = {who: channel(tmp_path / str(number), *what) for number, (who, what) in enumerate(torches(row).items())}
    own = offered.pop(maker(row))
    # Two names that conda-forge has given, and each row asks for all of its CUDA release.
    if maker(row) == "conda-forge":
        offered.pop("conda-forge, before 2.5")
    for spec in {spec for project in PROJECTS for spec in torch_specs(row, project)}:
        for first, other in offered.items():
            with pytest.raises(SolveError):
                solve(Request(specs=(spec,), channels=(other,), strict=strict, snapshot=tmp_path))
            channels = (own, other) if strict else (other, own)
            (found,) = solve(Request(specs=(spec,), channels=channels, strict=strict, snapshot=tmp_path))
            assert found.url.startswith(own), f"{spec} took the torch of {first}"


def test_what_a_build_takes_may_run() -> None:
    """The torch of a build is one of those that its package accepts."""
    for row in variants.load(workspace().variants).variants:
        assert row.row["pytorch_host"].startswith(row.torch), row.name
