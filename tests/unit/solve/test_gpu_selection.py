"""Packages for several GPUs in one channel: the solver picks the one for the GPU that is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rattler_build import assemble_package

from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import SolveError
from ssm_forge.build import finalize
from ssm_forge.channel import folder as channel
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.package.write import InfoFiles, dump_json, rewrite_info
from ssm_forge.solve.solver import Request, solve

BUILDS = ("9.0", "12.0", "8.0;9.0+PTX")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("channel")
    for text in BUILDS:
        archs = ArchList.parse(text)
        _add(folder, archs)
    channel.index(folder)
    return folder


def _add(folder: Path, archs: ArchList) -> None:
    (folder / "linux-64").mkdir(parents=True, exist_ok=True)
    source = folder / f"stage-{archs.tag}"
    (source / "share").mkdir(parents=True)
    (source / "share/kernels").write_text(archs.tag)
    raw = assemble_package(
        name="kernels",
        version="1.0",
        target_platform="linux-64",
        build_string=f"{archs.tag}_h0_0",
        output_dir=source.parent / "raw",
        files_dir=source,
    )

    def edit(files: InfoFiles) -> InfoFiles:
        index = json.loads(files["info/index.json"])
        index.setdefault("depends", [])
        finalize.tell_the_solver(index, archs)
        return {**files, "info/index.json": dump_json(index)}

    rewrite_info(raw.path, folder / "linux-64" / raw.path.name, edit)


def _pick(packages: Path, gpu: str | None) -> str:
    virtual = virtual_packages(cuda="13.0", cuda_arch=gpu)
    request = Request(specs=("kernels",), channels=(packages.as_uri(),), virtual=virtual, snapshot=packages)
    return str(solve(request)[0].build)


@pytest.mark.parametrize(
    ("gpu", "build"),
    [
        ("9.0", "sm90_h0_0"),
        ("12.0", "sm120_h0_0"),
        ("12.1", "sm120_h0_0"),
        ("8.6", "sm80_sm90ptx_h0_0"),
        ("10.0", "sm80_sm90ptx_h0_0"),
        (None, "sm80_sm90ptx_h0_0"),
    ],
)
def test_the_package_for_the_gpu_is_picked(packages: Path, gpu: str | None, build: str) -> None:
    assert _pick(packages, gpu) == build


def test_a_gpu_that_no_package_has_code_for_is_refused_with_the_reason(packages: Path) -> None:
    with pytest.raises(SolveError, match="__cuda_arch"):
        _pick(packages, "7.5")


def test_a_wrong_build_for_a_known_gpu_is_refused(packages: Path) -> None:
    virtual = virtual_packages(cuda="13.0", cuda_arch="12.0")
    request = Request(specs=("kernels 1.0 sm90_*",), channels=(packages.as_uri(),), virtual=virtual, snapshot=packages)
    with pytest.raises(SolveError, match="__cuda_arch"):
        solve(request)
