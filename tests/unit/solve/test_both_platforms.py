"""A channel with packages for two platforms: each machine gets its own."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from rattler_build import assemble_package

from ssm_forge.base.errors import SolveError
from ssm_forge.channel import folder as channel
from ssm_forge.channel import others
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.solve import prefix as solve_prefix
from ssm_forge.solve.solver import Request, solve

SUBDIRS = ("linux-64", "linux-aarch64")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels for both, each with its own library, and one more thing that is for x86-64 alone."""
    folder = tmp_path_factory.mktemp("both")
    for name, subdir in (*(("kernels", subdir) for subdir in SUBDIRS), ("only-here", "linux-64")):
        content = folder / "content" / name / subdir
        (content / "share").mkdir(parents=True)
        (content / f"share/{name}").write_text(subdir)
        made = assemble_package(
            name=name,
            version="1.0",
            target_platform=subdir,
            build_string=f"h{len(subdir)}_0",
            output_dir=str(folder / "raw" / subdir),
            files_dir=str(content),
            timestamp=datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
        )
        channel.add(folder / "channel", Path(made.path))
    return folder / "channel"


def test_each_package_lies_in_the_folder_of_its_platform_and_is_found_by_name(packages: Path) -> None:
    assert {path.parent.name: path.name for path in packages.glob("*/kernels-*.conda")} == {
        "linux-64": "kernels-1.0-h8_0.conda",
        "linux-aarch64": "kernels-1.0-h13_0.conda",
    }
    for path in packages.glob("*/*.conda"):
        assert channel.find(packages, path.name) == path
    assert channel.in_step(packages)
    assert channel.listed(packages) == {path.name for path in packages.glob("*/*.conda")}


@pytest.mark.parametrize("subdir", SUBDIRS)
def test_the_solver_takes_that_of_the_platform(packages: Path, subdir: str) -> None:
    request = Request(("kernels",), (packages.as_uri(),), virtual_packages(subdir=subdir), subdir=subdir)
    (record,) = solve(request)
    assert (record.subdir, record.file_name) == (subdir, f"kernels-1.0-h{len(subdir)}_0.conda")
    (record,) = solve_prefix.solve_for_prefix(["kernels"], [packages.as_uri()], prefix=None, cuda="13.0", subdir=subdir)
    assert record.url.rsplit("/", 2)[1] == subdir
    found = others.find(record.file_name, (packages.as_uri(),), subdir)
    assert found is not None and found.sha256 == record.sha256.hex()
    other = next(name for name in SUBDIRS if name != subdir)
    assert others.find(record.file_name, (packages.as_uri(),), other) is None


def test_what_the_other_platform_alone_has_is_not_taken(packages: Path) -> None:
    with pytest.raises(SolveError, match="only-here"):
        solve_prefix.solve_for_prefix(
            ["only-here"], [packages.as_uri()], prefix=None, cuda="13.0", subdir="linux-aarch64"
        )


def test_a_machine_says_what_it_is(packages: Path) -> None:
    for subdir, name in (("linux-64", "x86_64"), ("linux-aarch64", "aarch64")):
        machine = {v.name: v for v in solve_prefix.target_machine("13.0", None, subdir)}
        assert machine["__archspec"].build == name
