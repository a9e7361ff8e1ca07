"""Wheel METADATA as conda metadata; version ranges are judged by conda's own matching."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import rattler
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rattler import MatchSpec, PackageRecord

from ssm_forge.bridge.metadata import Distribution, conda_depends, conda_name, conda_version, read

VERSIONS = [
    "0.9",
    "1.0",
    "1.2",
    "1.2.1",
    "1.2.9",
    "1.3",
    "1.10",
    "1.10.3",
    "2.0",
    "2.0.1",
    "2.2.post3",
    "2.2.post4",
    "2.3",
    "3.0",
]


def distribution(name: str, *requires: str) -> Distribution:
    return Distribution(name, "1.0", tuple(map(Requirement, requires)), "", "")


def depends(dist: Distribution, *others: Distribution, python: str = "3.12") -> list[str]:
    return conda_depends(dist, {other.name: other for other in (dist, *others)}, python)


@pytest.mark.parametrize(
    "pep440",
    [
        "",
        ">=1.2",
        "==1.2",
        "==1.2.0",
        "==1.2.*",
        "!=1.2.1",
        "!=1.2.*",
        "~=1.2",
        "~=1.2.1",
        "~=2.2.post3",
        ">=1.0,<2",
        "<1.10,>1.2",
        "===1.2",
        ">=1.2,!=1.3,<3",
    ],
)
def test_a_range_holds_the_same_versions_for_conda(pep440: str) -> None:
    specifiers = SpecifierSet(pep440)
    spec = MatchSpec(f"demo {conda_version(specifiers)}".strip())
    # py-rattler 0.25, which pixi.lock has, knows no type of its own for it.
    build = getattr(rattler, "BuildString", str)("0")
    for version in VERSIONS:
        record = PackageRecord("demo", version, build, 0, "linux-64")
        assert spec.matches(record) == (Version(version) in specifiers), (str(spec), version)


def test_local_versions_are_left_out_as_in_the_package_itself() -> None:
    assert conda_version(SpecifierSet("==2.11.0+cu130")) == "==2.11.0"


def test_names_are_conda_forges() -> None:
    assert conda_name("Torch") == "pytorch"
    assert conda_name("typing.extensions") == "typing_extensions"
    assert conda_name("My_Package") == "my-package"


def test_markers_are_those_of_the_python_and_of_linux() -> None:
    dist = distribution(
        "a",
        "b>=1; python_version < '3.11'",
        "c; sys_platform == 'win32'",
        "d; platform_machine == 'x86_64'",
        "e; extra == 'dev'",
        "f; python_version >= '3.10' or extra == 'dev'",
    )
    others = [distribution(name) for name in "bcdef"]
    assert depends(dist, *others, python="3.10") == ["b >=1", "d", "f"]
    assert depends(dist, *others, python="3.12") == ["d", "f"]


def test_an_extra_becomes_its_own_requirements() -> None:
    toolkit = distribution(
        "cuda-toolkit", "base>=1", "nvidia-cublas==13.*; extra == 'cublas'", "nvidia-cufft; extra == 'cufft'"
    )
    others = [distribution(name) for name in ("base", "nvidia-cublas", "nvidia-cufft")]
    dist = distribution("torch", "cuda-toolkit[cublas]==13.0; platform_system == 'Linux'")
    assert depends(dist, toolkit, *others) == ["cuda-toolkit ==13.0", "libcublas 13.*"]


def test_two_requirements_on_one_project_both_hold() -> None:
    dist = distribution("a", "numpy>=1.20", "numpy<3; python_version >= '3.9'")
    assert depends(dist, distribution("numpy")) == ["numpy <3,>=1.20"]


def test_what_the_lock_does_not_hold_is_left_out() -> None:
    assert depends(distribution("a", "tilelang>=0.1", "b"), distribution("b")) == ["b"]


def test_metadata_of_a_wheel_is_read(tmp_path: Path) -> None:
    wheel = tmp_path / "Demo_Pkg-1.5-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "Demo_Pkg-1.5.dist-info/METADATA",
            "Metadata-Version: 2.4\nName: Demo_Pkg\nVersion: 1.5\nSummary: A demo\nLicense-Expression: MIT\n"
            "Requires-Python: >=3.8\nRequires-Dist: torch>=2\n\nBody with Requires-Dist: none\n",
        )
    assert read(wheel) == Distribution("demo-pkg", "1.5", (Requirement("torch>=2"),), "MIT", "A demo")
