"""Our kernels and upstream's in one channel: whoever names neither gets ours, and nobody gets some of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rattler import RepoDataRecord

from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import SolveError
from ssm_forge.base.paths import workspace
from ssm_forge.build.finalize import edited
from ssm_forge.manifest import recipe, variants
from ssm_forge.manifest.virtual import VirtualPackage
from ssm_forge.package.kernels import KERNELS, claimed, revision
from ssm_forge.package.write import dump_json
from ssm_forge.solve.solver import Request, solve

ROW = variants.load(workspace().variants).get("cu130", "bridge")
NEEDED = ("cuda-version", "einops", "packaging", "python", "python_abi", "pytorch", "transformers", "triton")


def index_json(project: str, archs: str, kernels: str, *, build_number: int | None = None) -> dict[str, Any]:
    """The ``index.json`` of a finished package; of another build number, where one is given."""
    key = ROW.key("3.12", ArchList.parse(archs), kernels=kernels)  # type: ignore[arg-type]
    rendered = recipe.render(project, key, workspace())
    wanted = rendered.engine.recipe.requirements.to_dict()
    build, number = rendered.build, rendered.build_number
    if build_number is not None:
        build = f"{build.rpartition('_')[0]}_{build_number}"
        number = build_number if kernels == "forge" else number
    index = {
        "name": project,
        "version": rendered.version,
        "build": build,
        "build_number": number,
        "subdir": "linux-64",
        # Only what decides between the two: the rest is the same.
        "depends": [spec for spec in wanted["run"] if spec.split()[0] not in NEEDED],
        "constrains": wanted.get("run_constraints", []),
    }
    files = edited({"info/index.json": dump_json(index)}, {"glibc": "2.34", "cuda_arch_list": archs, "materials": []})
    made: dict[str, Any] = json.loads(files["info/index.json"])
    return made


def channel(folder: Path, *indexes: dict[str, Any]) -> str:
    for subdir in ("linux-64", "noarch"):
        listed = {
            f"{index['name']}-{index['version']}-{index['build']}.conda": {**index, "size": 1, "sha256": "0" * 64}
            for index in (indexes if subdir == "linux-64" else ())
        }
        document = {"info": {"subdir": subdir}, "packages": {}, "packages.conda": listed, "repodata_version": 1}
        (folder / subdir).mkdir(parents=True)
        (folder / subdir / "repodata.json").write_text(json.dumps(document))
    return folder.as_uri()


def solved(url: str, *specs: str) -> dict[str, RepoDataRecord]:
    """What the solver takes on a machine with an H100."""
    machine = (
        VirtualPackage("__cuda", "13.0"),
        VirtualPackage("__cuda_arch", "9.0"),
        VirtualPackage("__glibc", "2.36"),
    )
    found = solve(Request(specs, (url,), machine))
    return {record.name.normalized: record for record in found}


def whose(records: dict[str, RepoDataRecord]) -> dict[str, str]:
    return {name: claimed(str(record.build)) for name, record in records.items()}


@pytest.fixture(params=["9.0", "8.0;9.0+PTX"], ids=["native", "portable"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Ours and upstream's, upstream's of a later recipe."""
    indexes = [
        index_json(project, request.param, kernels, build_number=5 if kernels == "forge" else 9)
        for project in recipe.PROJECTS
        for kernels in KERNELS
    ]
    return channel(tmp_path / "channel", *indexes)


def test_who_names_neither_gets_ours(both: str) -> None:
    assert whose(solved(both, "mamba-ssm")) == {"mamba-ssm": "forge", "causal-conv1d": "forge"}
    assert whose(solved(both, "causal-conv1d")) == {"causal-conv1d": "forge"}


def test_a_selector_of_one_brings_both_of_upstreams(both: str) -> None:
    theirs = {"mamba-ssm": "upstream", "causal-conv1d": "upstream"}
    assert whose(solved(both, "mamba-ssm=*=*upstream*")) == theirs
    assert whose(solved(both, "mamba-ssm", "causal-conv1d=*=upstream_*")) == theirs


def test_the_two_are_never_mixed(both: str) -> None:
    for specs in (
        ("mamba-ssm=*=upstream_*", "causal-conv1d=*=cuda*"),
        ("mamba-ssm=*=cuda*", "causal-conv1d=*=upstream_*"),
    ):
        with pytest.raises(SolveError):
            solved(both, *specs)


def test_even_portable_ones_of_ours_come_before_upstreams_for_the_very_gpu(tmp_path: Path) -> None:
    indexes = [index_json("causal-conv1d", "8.0;9.0+PTX", "forge"), index_json("causal-conv1d", "9.0", "upstream")]
    assert whose(solved(channel(tmp_path / "channel", *indexes), "causal-conv1d")) == {"causal-conv1d": "forge"}


def test_of_two_of_upstreams_the_later_recipe_is_taken(tmp_path: Path) -> None:
    indexes = [index_json("causal-conv1d", "9.0", "upstream", build_number=number) for number in (10, 9)]
    for order in (indexes, indexes[::-1]):
        found = solved(channel(tmp_path / str(order[0]["timestamp"]), *order), "causal-conv1d")
        assert revision(str(found["causal-conv1d"].build)) == 10


def test_a_package_of_ours_says_nothing_of_it() -> None:
    index = index_json("mamba-ssm", "9.0", "forge")
    assert "track_features" not in index
    assert "upstream" not in json.dumps(index)
