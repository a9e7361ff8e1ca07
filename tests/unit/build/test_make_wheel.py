"""Wheels that others install: what they say of the torch that they are for, and that they are always the same bytes."""

from __future__ import annotations

import json
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from installer.sources import WheelFile
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from ssm_forge.base.errors import BuildError, IntegrityError
from ssm_forge.base.files import sha256_of
from ssm_forge.build.make_wheel import make
from ssm_forge.package import read_wheel as read
from ssm_forge.package.read import inspect
from wheel_packages import DIGITS, LIBRARY, MINOR, SITE, kernels, needed_glibc

VERSION = "2.3.2.post1+cu130torch2.11"


def member(file: Path, name: str) -> str:
    with zipfile.ZipFile(file) as archive:
        return archive.read(f"mamba_ssm-{VERSION}.dist-info/{name}").decode()


def requirements(file: Path) -> list[str]:
    return HeaderParser().parsestr(member(file, "METADATA")).get_all("Requires-Dist", [])


def test_the_name_says_which_torch_python_and_glibc_it_is_for(tmp_path: Path) -> None:
    made = make(kernels(tmp_path), tmp_path / "out")
    major, minor = needed_glibc()
    assert made.name == f"mamba_ssm-{VERSION}-3_sm90-cp{DIGITS}-cp{DIGITS}-manylinux_{major}_{minor}_x86_64.whl"
    project, version, build, tags = parse_wheel_filename(made.name)
    assert (project, str(version), build) == ("mamba-ssm", VERSION, (3, "_sm90"))
    assert tags & set(sys_tags())
    Metadata.from_email(member(made, "METADATA").encode(), validate=True)
    with WheelFile.open(made) as source:
        source.validate_record()
    told = json.loads(member(made, "ssm-forge.json"))
    assert (told["page"], told["torch"], told["cuda"]) == ("cu130-torch211", "2.11", "13.0")
    named = read.parse(made.name)
    assert (named.project, named.public, named.python) == ("mamba-ssm", "2.3.2.post1", MINOR)
    assert str(named.archs) == "9.0"


def for_aarch64(data: bytes) -> bytes:
    """A library's bytes with aarch64 as its machine."""
    return data[:18] + (183).to_bytes(2, "little") + data[20:]


def test_the_name_says_which_platform_it_is_for(tmp_path: Path) -> None:
    package = kernels(tmp_path, subdir="linux-aarch64", library=for_aarch64(LIBRARY.read_bytes()))
    made = make(package, tmp_path / "out")
    major, minor = max(needed_glibc(), (2, 17))
    assert made.name.endswith(f"-manylinux_{major}_{minor}_aarch64.whl")
    assert f"manylinux_{major}_{minor}_aarch64" in member(made, "WHEEL")
    assert read.inspect(made).filename == made.name
    assert read.parse(made.name).machine == "aarch64"


@pytest.mark.parametrize("says", ["linux-64", "linux-aarch64"])
def test_a_module_for_another_machine_than_the_package_says_is_refused_with_both(tmp_path: Path, says: str) -> None:
    own = LIBRARY.read_bytes()
    package = kernels(tmp_path, subdir=says, library=for_aarch64(own) if says == "linux-64" else own)
    names = ("x86-64", "aarch64") if says == "linux-64" else ("aarch64", "x86-64")
    with pytest.raises(IntegrityError, match=rf"is for {names[0]}, and its mamba_ssm_cuda\S+ is for {names[1]}"):
        inspect(package)
    with pytest.raises(IntegrityError, match=rf"mamba_ssm_cuda\S+, which is for {names[1]}: its name says another"):
        read.inspect(make(package, tmp_path / "out"))


def test_it_requires_the_torch_that_it_was_made_for_and_what_the_conda_package_pins(tmp_path: Path) -> None:
    depends = (
        "causal-conv1d ==1.7.0",
        "pytorch >=2.11.0,<2.12.0a0",
        "triton 3.6.*",
        "transformers <5",
        "cuda-version >=13,<14",
        "libstdcxx >=12",
        "__glibc >=2.17,<3.0.a0",
        "einops",
    )
    upstream = ("torch", "triton>=3.5.0", "transformers", "einops", "ninja", 'pytest; extra == "dev"')
    made = make(kernels(tmp_path, depends=depends, requires=upstream), tmp_path / "out")
    assert requirements(made) == [
        "ninja",
        'pytest; extra == "dev"',
        "causal-conv1d==1.7.0+cu130torch2.11",
        "einops",
        "torch==2.11.*",
        "transformers<5",
        "triton==3.6.*,>=3.5.0",
    ]


def test_the_same_package_gives_one_sha256_in_two_folders(tmp_path: Path) -> None:
    package = kernels(tmp_path / "package")
    assert len({sha256_of(make(package, tmp_path / name)) for name in ("a", "b/c")}) == 1
    assert [path.suffix for path in (tmp_path / "a").iterdir()] == [".whl"]


def test_the_bill_of_materials_is_one_and_names_the_wheel(tmp_path: Path) -> None:
    made = make(kernels(tmp_path), tmp_path / "out")
    text = member(made, "sboms/ssm-forge.cdx.json")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    assert document["metadata"]["component"]["purl"] == "pkg:pypi/mamba-ssm@2.3.2.post1%2Bcu130torch2.11"
    assert [c["description"] for c in document["components"]] == ["source", "requires torch ==2.11.*"]


def test_what_upstream_says_of_itself_stays_as_it_is(tmp_path: Path) -> None:
    folded = "License: one line\n        \n        another: line\nKeywords: cuda\n"
    made = make(kernels(tmp_path, metadata=folded), tmp_path / "out")
    text = member(made, "METADATA")
    assert folded in text
    assert text.endswith("\n\nAbout it.\n")
    assert member(made, "licenses/LICENSE") == "licence\n"


def test_one_that_runs_on_every_gpu_is_preferred_to_one_for_a_single_generation(tmp_path: Path) -> None:
    one = make(kernels(tmp_path, number=4, archs="9.0"), tmp_path / "out")
    many = make(kernels(tmp_path, number=3, archs="8.0;9.0+PTX"), tmp_path / "out")
    assert read.parse(many.name).order > read.parse(one.name).order
    assert str(read.parse(many.name).archs) == "8.0;9.0+PTX"


def test_the_torch_of_an_environment_gives_the_cuda_of_that_torch(tmp_path: Path) -> None:
    made = make(kernels(tmp_path, torch="2.7", build="there_cuda126_12345678_*"), tmp_path / "out")
    assert "+cu126torch2.7-" in made.name
    assert read.inspect(made).page == "cu126-torch27"


def test_a_source_tree_has_an_index_of_its_own_and_its_hash_in_the_version(tmp_path: Path) -> None:
    made = make(kernels(tmp_path, version="1.1.1", tree="1234567890" * 6 + "abcd"), tmp_path / "out")
    found = read.inspect(made)
    assert (found.version, found.page) == ("1.1.1+cu130torch2.11.tree12345678", "cu130-torch211-trees")


def test_upstreams_kernels_have_an_index_of_their_own_and_ask_for_each_other(tmp_path: Path) -> None:
    depends = ("causal-conv1d ==1.7.0 upstream_*",)
    made = make(kernels(tmp_path, whose="upstream_", depends=depends, number=5), tmp_path / "out")
    found = read.inspect(made)
    assert (found.version, found.page) == (f"{VERSION}.upstream", "cu130-torch211-upstream")
    assert read.parse(made.name).order[1] == (5, "_sm90")
    named = [
        Requirement(text) for text in HeaderParser().parsestr(found.metadata.decode()).get_all("Requires-Dist", [])
    ]
    beside = next(one.specifier for one in named if one.name == "causal-conv1d")
    assert beside.contains("1.7.0+cu130torch2.11.upstream")
    assert not beside.contains("1.7.0+cu130torch2.11")


@pytest.mark.parametrize("build", ["cuda130*", "py3*_cuda11*8_*"])
def test_kernels_for_condas_torch_are_no_wheel(tmp_path: Path, build: str) -> None:
    package = kernels(tmp_path, build=build)
    with pytest.raises(BuildError, match="made for the torch of a conda channel") as caught:
        make(package, tmp_path / "out")
    assert "build --source bridge --format wheel" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_programs_that_installers_make_are_left_to_them(tmp_path: Path) -> None:
    info = f"{SITE}/mamba_ssm-2.3.2.post1.dist-info"
    files = {"bin/scan": "#!/build/python\n", f"{info}/entry_points.txt": "[console_scripts]\nscan = mamba_ssm:main\n"}
    made = make(kernels(tmp_path, files=files), tmp_path / "out")
    with zipfile.ZipFile(made) as archive:
        assert not [name for name in archive.namelist() if name.endswith("/scan")]
    assert "scan = mamba_ssm:main" in member(made, "entry_points.txt")


def test_a_file_that_has_no_place_in_a_wheel_is_refused(tmp_path: Path) -> None:
    package = kernels(tmp_path, files={"etc/passwd": "x"})
    with pytest.raises(BuildError, match="holds etc/passwd"):
        make(package, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def damaged(file: Path, change: str) -> Path:
    """The wheel with one member changed, left out or added; its RECORD stays."""
    target = file.parent / "damaged" / file.name
    target.parent.mkdir()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "mamba_ssm/__init__.py":
                if change == "missing":
                    continue
                data += b"# changed" if change == "changed" else b""
            new.writestr(name, data)
        if change == "added":
            new.writestr("mamba_ssm/more.py", "")
    return target


@pytest.mark.parametrize(
    ("change", "what"),
    [("changed", "is not what its RECORD says"), ("missing", "differ in"), ("added", "differ in mamba_ssm/more.py")],
)
def test_a_wheel_that_is_not_what_its_record_says_is_refused(tmp_path: Path, change: str, what: str) -> None:
    made = make(kernels(tmp_path), tmp_path / "out")
    with pytest.raises(IntegrityError, match=what):
        read.inspect(damaged(made, change))


@pytest.mark.parametrize("old, new", [("torch2.11", "torch2.12"), ("mamba_ssm", "other"), ("2.3.2.post1", "2.3.3")])
def test_another_name_than_its_own_is_refused(tmp_path: Path, old: str, new: str) -> None:
    made = make(kernels(tmp_path), tmp_path / "out")
    with pytest.raises(IntegrityError, match="holds the metadata of mamba-ssm"):
        read.inspect(made, filename=made.name.replace(old, new))


def test_half_a_wheel_and_others_wheels_are_refused(tmp_path: Path) -> None:
    made = make(kernels(tmp_path), tmp_path / "out")
    half = tmp_path / made.name
    half.write_bytes(made.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="is not a whole wheel"):
        read.inspect(half)
    with pytest.raises(IntegrityError, match="is no name of a wheel"):
        read.inspect(made, filename="../evil-1-cp311-cp311-any.whl")
