"""The one command: what it solves, and that it solves before it compiles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from conda_channel import demo_channel
from ssm_forge.base.errors import NetworkError, SolveError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.flow import pipeline, planning
from ssm_forge.flow.pipeline import Base
from ssm_forge.flow.plan import Options, Plan
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.solve import prefix as solve_prefix

SNAPSHOT = workspace().root.parent / "shared" / "conda-snapshot"

recorded = [
    pytest.mark.shared,
    pytest.mark.skipif(not SNAPSHOT.exists(), reason="needs the recorded conda repodata beside the checkout"),
]
CONDA = ["cu118", "cu129", "cu130"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """This checkout, with a channel and a cache of the test's own, on a machine without a GPU."""
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SSM_FORGE_CHANNEL", str(tmp_path / "channel"))
    monkeypatch.setattr(solve_prefix, "machine_virtual_packages", lambda subdir=None: virtual_packages(glibc="2.36"))
    monkeypatch.setattr("ssm_forge.base.machine.gpus", lambda: ())
    # Nothing is downloaded here.
    monkeypatch.setattr("ssm_forge.flow.disks.free_disk", lambda path: 10**12)
    return workspace()


def planned(variant: str, place: Workspace, tmp_path: Path) -> Plan:
    work = planning.make(Options(variant=variant, source="conda", prefix=tmp_path / "prefix"), place)
    # Our own channel is empty, and no recorded one.
    return replace(work, channels=work.channels[1:])


class TestSolve:
    pytestmark = recorded

    @pytest.mark.parametrize("variant", CONDA)
    def test_a_new_environment_is_the_locked_one_and_the_kernels(
        self, variant: str, place: Workspace, tmp_path: Path
    ) -> None:
        work = planned(variant, place, tmp_path)
        base = pipeline.base_of(work)
        records = pipeline.solve_environment(work, base, place, pending=work.to_build, snapshot=SNAPSHOT)
        assert work.locked is not None
        assert {r.file_name for r in records} - {r.file_name for r in work.locked.records} == {
            package.filename for package in work.packages
        }

    @pytest.mark.parametrize("variant", CONDA)
    def test_without_a_lock_for_it_it_has_the_variants_compiler_and_cuda(
        self, variant: str, place: Workspace, tmp_path: Path
    ) -> None:
        work = replace(planned(variant, place, tmp_path), locked=None)
        base = pipeline.base_of(work)
        records = pipeline.solve_environment(work, base, place, pending=work.to_build, snapshot=SNAPSHOT)
        versions = {r.name.normalized: str(r.version) for r in records}
        assert versions["cuda-version"] == work.variant.cuda
        assert versions["gxx_linux-64"].split(".")[0] == work.variant.row["cxx_compiler_version"]

    def test_torch_comes_from_the_channel_whose_torch_the_kernels_were_compiled_with(
        self, place: Workspace, tmp_path: Path
    ) -> None:
        """conda-forge has a torch 2.3.1 for CUDA 11.8 too, with another C++ ABI and a higher build number."""
        snapshot = tmp_path / "snapshot"
        shutil.copytree(SNAPSHOT, snapshot, copy_function=lambda a, b: Path(b).write_bytes(Path(a).read_bytes()))
        index = snapshot / "conda-forge/linux-64/repodata.json.zst"
        data = json.loads(zstandard.ZstdDecompressor().stream_reader(index.read_bytes()).read())
        build = "cuda118_py310h0_300"
        decoy = {"name": "pytorch", "version": "2.3.1", "build": build, "build_number": 300, "depends": []}
        data["packages.conda"][f"pytorch-2.3.1-{build}.conda"] = {**decoy, "subdir": "linux-64"}
        index.parent.chmod(0o755)
        index.write_bytes(zstandard.ZstdCompressor().compress(json.dumps(data).encode()))
        work = planned("cu118", place, tmp_path)
        records = pipeline.solve_environment(
            work, Base(in_place=False, specs=("gxx_linux-64 11.*",)), place, pending=work.to_build, snapshot=snapshot
        )
        (torch,) = (r for r in records if r.name.normalized == "pytorch")
        assert "/pytorch/linux-64/" in torch.url


def test_what_does_not_fit_is_known_before_anything_is_compiled(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = demo_channel(tmp_path / "poor").as_uri()
    work = planned("cu130", place, tmp_path)
    packages = tuple(replace(p, request=replace(p.request, channels=(channel,), locked=None)) for p in work.packages)
    work = replace(work, channels=(channel,), packages=packages, locked=None)
    built: list[str] = []
    monkeypatch.setattr(planning, "make", lambda options, place, choice: work)
    monkeypatch.setattr(pipeline, "build", lambda request, **_: built.append(request.project))
    with pytest.raises(SolveError) as error:
        pipeline.install_mamba(Options(source="conda"), dry_run=False, as_json=False)
    assert "the build environment of causal-conv1d for cu130 with Python 3.12" in error.value.what
    assert channel in error.value.what
    assert built == []
    # The environment too: what the builds need may be there, and what the kernels run with not.
    monkeypatch.setattr(pipeline, "solve_builds", lambda *args, **kwargs: [])
    with pytest.raises(SolveError, match="satisfies the environment"):
        pipeline.install_mamba(Options(source="conda"), dry_run=False, as_json=False)
    assert built == []


def test_without_a_network_conda_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow a network namespace")
    settings = {"SSM_FORGE_CACHE_DIR": str(tmp_path / "cache"), "SSM_FORGE_CHANNEL": str(tmp_path / "channel")}
    script = (
        "from ssm_forge.flow import disks; disks.free_disk = lambda _: 10**12; from ssm_forge.cli import main; main()"
    )
    words = ["install-mamba", "--source", "conda", "--variant", "cu118", "--prefix", str(tmp_path / "prefix")]
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **settings, "PYTHONPATH": str(workspace().root / "scripts")},
    )
    assert done.returncode == NetworkError.exit_code, done.stderr
    assert "error: https://conda.anaconda.org/nvidia/label/cuda-11.8.0/ could not be read" in done.stderr
    assert not (tmp_path / "prefix").exists()
    assert not list(tmp_path.rglob("*.conda"))
