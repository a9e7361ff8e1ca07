"""The recipes against the recorded channels: every conda variant solves, and says readably when it can't."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import SolveError
from ssm_forge.base.paths import workspace
from ssm_forge.manifest import variants
from ssm_forge.solve import lock as locks
from ssm_forge.solve.recipes import KINDS, SolvedEnvironment, solve_recipes
from ssm_forge.solve.solver import Request, solve

SNAPSHOT = workspace().root.parent / "shared" / "conda-snapshot"
PYTHONS = {"cu118": "3.10", "cu129": "3.12", "cu130": "3.12"}

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SNAPSHOT.exists(), reason="needs the recorded conda repodata beside the checkout"),
]


def solved(variant: str, snapshot: Path = SNAPSHOT, python: str | None = None) -> list[SolvedEnvironment]:
    place = workspace()
    row = variants.load(place.variants).get(variant, "conda")
    archs = ArchList.parse(row.default_archs)
    key = row.key(python or PYTHONS[variant], archs)
    return solve_recipes(row, key, workspace=place, snapshot=snapshot)


def versions(environment: SolvedEnvironment) -> dict[str, str]:
    return {r.name.normalized: str(r.version) for r in environment.records}


@pytest.mark.parametrize("variant", sorted(PYTHONS))
def test_every_environment_of_both_recipes_solves(variant: str) -> None:
    environments = solved(variant)
    assert [(e.project, e.kind) for e in environments] == [
        (project, kind) for project in ("causal-conv1d", "mamba-ssm") for kind in KINDS
    ]
    row = variants.load(workspace().variants).get(variant, "conda")
    for environment in environments:
        have = versions(environment)
        if environment.kind == "build":
            nvcc = have.get("cuda-nvcc_linux-64") or have["cuda-nvcc"]
            assert nvcc.startswith(f"{row.cuda}.")
            assert have["gxx_linux-64"].startswith(row.row["cxx_compiler_version"])
        else:
            assert have["pytorch"].startswith(f"{row.torch}.")
            assert have["python"].startswith(PYTHONS[variant])
    run = versions(environments[-1])
    assert {"mamba-ssm", "causal-conv1d"} <= set(run)
    assert all("cuda" in str(r.build) for r in environments[-1].records if r.name.normalized == "pytorch")


def test_torch_2_3_gets_friends_of_its_age() -> None:
    run = versions(solved("cu118")[-1])
    assert int(run["numpy"].split(".")[0]) < 2
    assert int(run["transformers"].split(".")[0]) < 5
    assert run["torchtriton"] == "2.3.0"


@pytest.mark.parametrize("variant", sorted(PYTHONS))
def test_kernels_fit_into_the_locked_environment_without_changing_it(variant: str) -> None:
    """What install-mamba does under pixi: the lock's environment first, the kernels on top."""
    place = workspace()
    locked = locks.environment(place.lock, variant)
    run = solved(variant)[-1]
    ours = {r.file_name: json.loads(r.to_json()) for r in run.records if str(r.channel).startswith("file:")}
    assert len(ours) == 2
    records = solve(
        Request(
            specs=("mamba-ssm", "causal-conv1d", *(r.name.normalized for r in locked.records)),
            channels=locked.channels,
            virtual=locked.platform.virtual,
            snapshot=SNAPSHOT,
            pinned=locked.records,
            extra=ours,
        )
    )
    added = {r.name.normalized for r in records} - {r.name.normalized for r in locked.records}
    assert added == {"mamba-ssm", "causal-conv1d"}


@pytest.fixture
def without(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A copy of the record from which packages can be removed."""

    def remove(channel: str, name: str) -> Path:
        import zstandard

        copy = tmp_path / "snapshot"
        shutil.copytree(SNAPSHOT, copy)
        for path in (copy / channel).glob("*/repodata.json.zst"):
            path.chmod(0o644)
            path.parent.chmod(0o755)
            data = json.loads(zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read())
            for part in ("packages", "packages.conda"):
                data[part] = {k: v for k, v in data.get(part, {}).items() if v["name"] != name}
            path.write_bytes(zstandard.ZstdCompressor().compress(json.dumps(data).encode()))
        return copy

    return remove


@pytest.mark.parametrize(
    ("variant", "channel", "package", "environment"),
    [
        (
            "cu118",
            "nvidia/label/cuda-11.8.0",
            "cuda-nvcc",
            "the build environment of causal-conv1d for cu118",
        ),
        ("cu129", "conda-forge", "wheel", "the host environment of causal-conv1d for cu129"),
        ("cu130", "conda-forge", "einops", "the run environment of mamba-ssm for cu130"),
    ],
)
def test_a_package_that_is_gone_is_named_with_its_environment(
    without, variant: str, channel: str, package: str, environment: str
) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SolveError) as caught:
        solved(variant, without(channel, package))
    assert environment in str(caught.value)
    assert package in str(caught.value)
    assert "Traceback" not in str(caught.value)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ssm_forge", "build", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(workspace().root / "scripts")},
    )


def test_command_prints_what_every_requirement_became() -> None:
    done = command("--variant", "cu118", "--source", "conda", "--solve-only", "--snapshot", str(SNAPSHOT))
    assert done.returncode == 0, done.stderr
    assert "cuda-nvcc 11.8.*" in done.stdout
    assert "11.8.89 0" in done.stdout
    assert "nvidia/label/cuda-11.8.0" in done.stdout
    assert "Not checked: run exports" in done.stderr


def test_command_gives_json_alone_on_stdout() -> None:
    done = command("--variant", "cu130", "--solve-only", "--snapshot", str(SNAPSHOT), "--json")
    data = json.loads(done.stdout)
    assert [e["environment"] for e in data] == [*KINDS, *KINDS]
    assert all(p.startswith(("https://", "file://")) for e in data for p in e["packages"])


def test_command_ends_with_the_solvers_exit_code(without) -> None:  # type: ignore[no-untyped-def]
    snapshot = without("conda-forge", "ninja")
    done = command("--variant", "cu129", "--solve-only", "--snapshot", str(snapshot))
    assert done.returncode == SolveError.exit_code
    assert "ninja" in done.stderr
    assert "Traceback" not in done.stderr
