"""A finished conda package as a wheel: the same files, the same bytes each time, and pip's own tools can read it."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from installer.sources import WheelFile
from packaging.utils import parse_wheel_filename

from fake_environment import make_venv, site_of, tree
from finished_package import INFO, METADATA, SITE, conda_package
from ssm_forge.base.errors import BuildError
from ssm_forge.base.files import sha256_of
from ssm_forge.existing import install, reader
from ssm_forge.package import wheel
from ssm_forge.package.write import read_info


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return conda_package(tmp_path)


def test_the_wheel_has_the_packages_files_and_says_where_it_is_from(package: Path, tmp_path: Path) -> None:
    made = wheel.from_conda(package, tmp_path)
    assert made.name == "mamba_ssm-2.3.1-cp311-cp311-linux_x86_64.whl" == wheel.filename(package)
    assert {str(tag) for tag in parse_wheel_filename(made.name)[3]} == {"cp311-cp311-linux_x86_64"}
    with zipfile.ZipFile(made) as archive:
        assert archive.namelist() == [
            "mamba_ssm/__init__.py",
            "selective_scan_cuda.cpython-311-x86_64-linux-gnu.so",
            f"{INFO}/METADATA",
            f"{INFO}/WHEEL",
            f"{INFO}/ssm-forge.json",
            f"{INFO}/RECORD",
        ]
        assert archive.read(f"{INFO}/METADATA").decode() == METADATA
        assert b"Tag: cp311-cp311-linux_x86_64\n" in archive.read(f"{INFO}/WHEEL")
        told = json.loads(archive.read(f"{INFO}/ssm-forge.json"))
    assert (told["package"], told["sha256"]) == (package.name, sha256_of(package))
    assert told["made_from"] == {"cuda_arch_list": "9.0", "glibc": "2.32"}
    with WheelFile.open(made) as source:
        source.validate_record()


def test_the_files_of_a_packages_tests_stay_out(tmp_path: Path) -> None:
    package = conda_package(tmp_path, {"etc/conda/test-files/mamba-ssm/0/loads.py": "import mamba_ssm\n"}, None)
    with zipfile.ZipFile(wheel.from_conda(package, tmp_path)) as archive:
        assert not [name for name in archive.namelist() if "loads.py" in name]


@pytest.mark.parametrize("compress", [True, False])
def test_the_same_package_gives_the_same_bytes(package: Path, tmp_path: Path, compress: bool) -> None:
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        digests.add(sha256_of(wheel.from_conda(package, tmp_path / name, compress=compress)))
        assert [path.suffix for path in (tmp_path / name).iterdir()] == [".whl"]
    assert len(digests) == 1


def test_a_build_tag_tells_wheels_of_one_release_apart(package: Path, tmp_path: Path) -> None:
    made = wheel.from_conda(package, tmp_path, build_tag="2_sm90")
    assert parse_wheel_filename(made.name)[2] == (2, "_sm90")
    with zipfile.ZipFile(made) as archive:
        assert b"Build: 2_sm90\n" in archive.read(f"{INFO}/WHEEL")


@pytest.mark.parametrize(
    ("extra", "depends", "what"),
    [
        ({"bin/tool": "#!/bin/sh\n"}, None, "holds bin/tool, which has no place in a wheel"),
        ({f"{SITE}/other-1.dist-info/METADATA": "Name: other\n"}, None, "holds 2 dist-info folders"),
        ({}, ["python"], "is for no particular Python"),
    ],
)
def test_what_no_wheel_can_hold_is_refused(
    tmp_path: Path, extra: dict[str, str], depends: list[str] | None, what: str
) -> None:
    package = conda_package(tmp_path, extra, depends)
    with pytest.raises(BuildError, match=what):
        wheel.from_conda(package, tmp_path)
    assert not list(tmp_path.glob("*.whl"))


def real_venv(folder: Path) -> reader.Existing:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return reader.read(folder)


def test_installed_it_is_what_pip_expects_and_goes_without_a_trace(package: Path, tmp_path: Path) -> None:
    there = real_venv(tmp_path / "env")
    before = tree(there.prefix)
    made = wheel.from_conda(package, tmp_path)
    assert install.put(there, "mamba-ssm", made) == ""
    ask = "import importlib.metadata as m; print(m.version('mamba-ssm'), len(m.files('mamba-ssm')))"
    told = subprocess.run([there.python, "-c", ask], capture_output=True, text=True, check=True).stdout
    assert told == "2.3.1 7\n"
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", there.python, "list", "--format=freeze"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert listed == "mamba-ssm==2.3.1\n"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", there.python, "uninstall", "--yes", "mamba-ssm"],
        capture_output=True,
        check=True,
    )
    assert {**tree(there.prefix), "folders": 0} == {**before, "folders": 0}


def test_only_the_wheel_of_that_very_package_counts_as_installed(package: Path, tmp_path: Path) -> None:
    there = real_venv(tmp_path / "env")
    install.put(there, "mamba-ssm", wheel.from_conda(package, tmp_path))
    told = (package.name, sha256_of(package))
    assert install.is_installed(there, "mamba-ssm", *told)
    assert not install.is_installed(there, "mamba-ssm", told[0], "0" * 64)
    assert not install.is_installed(there, "causal-conv1d", *told)
    found = install.installed(there, "mamba-ssm")
    assert found is not None
    assert install.changed(there.site, found) == []
    (there.site / "mamba_ssm/__init__.py").write_text("changed")
    assert install.changed(there.site, found) == ["mamba_ssm/__init__.py"]
    (there.site / "mamba_ssm/__init__.py").unlink()
    assert not install.is_installed(there, "mamba-ssm", *told)


def test_another_release_is_replaced_and_files_that_others_share_are_not_written_through(tmp_path: Path) -> None:
    there = real_venv(tmp_path / "env")
    (tmp_path / "old").mkdir()
    old = conda_package(tmp_path / "old", {f"{SITE}/mamba_ssm/gone.py": ""}, version="2.2.4")
    install.put(there, "mamba-ssm", wheel.from_conda(old, tmp_path))
    # As uv installs: a hard link into its cache.
    cached = tmp_path / "cached.so"
    cached.write_text("of the cache")
    stray = there.site / "selective_scan_cuda.cpython-311-x86_64-linux-gnu.so"
    stray.unlink()
    stray.hardlink_to(cached)
    (tmp_path / "new").mkdir()
    new = wheel.from_conda(conda_package(tmp_path / "new"), tmp_path)
    assert install.put(there, "mamba-ssm", new) == "2.2.4"
    assert [info.name for info in there.site.glob("mamba_ssm-*")] == [INFO]
    assert not (there.site / "mamba_ssm/gone.py").exists()
    assert (cached.read_text(), stray.read_text()) == ("of the cache", "library")


def test_a_record_that_names_files_outside_removes_none_of_them(tmp_path: Path) -> None:
    env = make_venv(tmp_path)
    outside = tmp_path / "outside.txt"
    outside.write_text("stays")
    info = site_of(env) / "bad-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: bad\nVersion: 1\n\n")
    (info / "RECORD").write_text(f"../../../../outside.txt,,\n{outside},,\nbad-1.dist-info/METADATA,,\n")
    there = reader.read(env)
    found = install.installed(there, "bad")
    assert found is not None
    install.remove(there, found)
    assert outside.read_text() == "stays"
    assert not (info / "METADATA").exists()


def test_the_info_of_the_package_is_left_as_it_was(package: Path, tmp_path: Path) -> None:
    before = read_info(package)
    wheel.from_conda(package, tmp_path)
    assert read_info(package) == before
