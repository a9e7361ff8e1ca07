"""A bridge for another platform than this machine's: what runs here, what is compiled for, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

from ssm_forge.base import machine, platforms
from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import LINUX_64, LINUX_AARCH64
from ssm_forge.bridge import debian, pylock
from ssm_forge.bridge import interpreter as interpreters
from ssm_forge.bridge import parts as bridge_parts
from ssm_forge.bridge.gcc import BundledCompiler, bundled_packages
from ssm_forge.bridge.interpreter import Interpreter
from ssm_forge.bridge.toolkit import runtime_packages, toolkit_packages
from ssm_forge.bridge.toolkit_scripts import activate
from ssm_forge.manifest import variants
from ssm_forge.manifest.variants import Variant

ROOT = Path(__file__).parents[3]
LOCKS = ROOT / "recipes/bridge"


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(root=ROOT, cache=tmp_path / "cache")


@pytest.fixture
def row() -> Variant:
    return variants.load(ROOT / "recipes/variants.yaml").get("cu130", "bridge")


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of x86-64 with a Python 3.11 and Debian 12's C library, whatever this one is."""
    own = Interpreter(Path("/opt/python/bin/python3.11"), Path("/opt/python"), "3.11.9")
    monkeypatch.setattr(platforms, "known_here", lambda machine="": LINUX_64)
    monkeypatch.setattr(machine, "glibc", lambda: "2.36")
    monkeypatch.setattr(bridge_parts, "glibc", lambda: "2.36")
    monkeypatch.setattr(interpreters, "choose", lambda python, workspace: own)


LOCKED = [
    (row.name, part, platform)
    for row in variants.load(ROOT / "recipes/variants.yaml").variants
    if row.source == "bridge"
    for platform in row.platforms
    for part in (*(f"py{python.replace('.', '')}" for python in row.pythons), "toolkit")
]


@pytest.mark.parametrize(("variant", "part", "platform"), LOCKED)
def test_each_platform_of_a_row_has_locks_with_the_versions_of_x86_64(
    variant: str, part: str, platform: platforms.Platform, place: Workspace
) -> None:
    python = f"3.{part[3:]}" if part.startswith("py") else "3.10"
    own = pylock.read(pylock.lock_path(place, variant, part, platform), python, platform)
    first = pylock.read(pylock.lock_path(place, variant, part), python)
    assert {w.name: w.version for w in own} == {w.name: w.version for w in first}
    for wheel in own:
        tags = {tag.platform for tag in parse_wheel_filename(wheel.artifact.name)[3]}
        assert tags == {"any"} or all(tag.endswith(platform.machine) for tag in tags), wheel.artifact.name


def test_a_lock_of_one_platform_is_refused_for_the_other(place: Workspace) -> None:
    with pytest.raises(MachineError, match=r"pylock\.cu130-py311\.toml has no wheel of \S+ for linux-aarch64"):
        pylock.read(pylock.lock_path(place, "cu130", "py311"), "3.11", LINUX_AARCH64)
    with pytest.raises(MachineError, match=r"linux-aarch64-py311\.toml has no wheel of \S+ for linux-64"):
        pylock.read(pylock.lock_path(place, "cu130", "py311", LINUX_AARCH64), "3.11")


@pytest.mark.parametrize(
    "name", ["ccache", "gcc-12", "python-3.11", "python-3.13"], ids=lambda name: name.replace(".", "")
)
def test_debian_packages_of_the_platform_are_the_same_versions_as_x86_64s(name: str) -> None:
    first = {d.package: d for d in debian.read_lock(LOCKS / f"debs.{name}.toml")}
    own = {d.package: d for d in debian.read_lock(LOCKS / f"debs.{name}-linux-aarch64.toml")}
    assert {deb.architecture for deb in own.values()} <= {"arm64", "all"}
    assert {deb.architecture for deb in first.values()} <= {"amd64", "all"}
    for package in first.keys() & own.keys():
        assert own[package].version == first[package].version
    # What is about the machine by its name, and a library of arithmetic that aarch64 has in hardware.
    assert first.keys() ^ own.keys() <= {"binutils-x86-64-linux-gnu", "binutils-aarch64-linux-gnu", "libquadmath0"}


def test_the_cross_compiler_runs_on_x86_64_and_compiles_for_aarch64(place: Workspace, row: Variant) -> None:
    compiler = BundledCompiler(debian.read_lock(bridge_parts.cross_compiler_lock(row, place, LINUX_AARCH64)))
    assert (compiler.runs_on, compiler.target) == (LINUX_64, LINUX_AARCH64)
    assert str(compiler.major) == row.row["cxx_compiler_version"]
    made = {package.name: package for package in bundled_packages(compiler, place)}
    assert made["gxx_linux-aarch64"].platform == made["sysroot_linux-aarch64"].platform == LINUX_64
    # What runs with the result.
    assert made["libgcc"].platform == made["libstdcxx"].platform == LINUX_AARCH64
    # Of the C++ runtime that runs here, any will do: the compiler's own is for the other platform.
    assert {"libgcc", "libstdcxx"} <= set(made["gcc_impl_linux-aarch64"].depends)
    native = BundledCompiler(debian.read_lock(bridge_parts.compiler_lock(row, place)))
    assert native.runs_on == native.target == platforms.here()
    assert not {p.name for p in bundled_packages(native, place)} & {n for n in made if n.endswith("aarch64")}


@pytest.mark.usefixtures("x86")
def test_a_cross_build_has_tools_of_this_machine_and_all_else_of_the_other(place: Workspace, row: Variant) -> None:
    found = bridge_parts.find_parts(row, "3.11", "auto", place, LINUX_AARCH64)
    assert found.cross is not None
    assert (found.platform, found.interpreter.platform) == (LINUX_AARCH64, LINUX_AARCH64)
    assert found.interpreter.origin == "Debian 12"
    assert found.interpreter.runs == found.cross.interpreter.executable
    assert all("x86_64" not in wheel.artifact.name for wheel in (*found.wheels, *found.toolkit.wheels))
    assert all("aarch64" not in wheel.artifact.name for wheel in (*found.cross.wheels, *found.toolkit.tools))
    assert {wheel.name for wheel in found.cross.wheels} >= {"pip", "setuptools", "wheel", "ninja", "packaging"}
    assert "torch" not in {wheel.name for wheel in found.cross.wheels}
    # It is another channel than that of the variant for this machine.
    folders = {bridge_parts.channel_dir(place, row, platform) for platform in (LINUX_64, LINUX_AARCH64)}
    assert {folder.name for folder in folders} == {"cu130", "cu130-linux-aarch64-cross"}


@pytest.mark.usefixtures("x86")
def test_nvcc_of_a_cross_build_runs_here_and_reads_headers_of_the_other(place: Workspace, row: Variant) -> None:
    toolkit = bridge_parts.find_parts(row, "3.11", "auto", place, LINUX_AARCH64).toolkit
    build = {package.name: package for package in toolkit_packages(toolkit, place)}
    assert {package.platform for package in build.values()} == {LINUX_64}
    own = {wheel.artifact.sha256 for wheel in toolkit.tools}
    for name in ("cuda-nvcc-tools", "cuda-nvvm-tools", "cuda-nvvm-impl"):
        assert own & set(build[name].inputs), name
    for name in ("cuda-crt-dev_linux-aarch64", "cuda-nvcc-dev_linux-aarch64", "cuda-cudart-dev_linux-aarch64"):
        assert not own & set(build[name].inputs), name
        assert any("targets/sbsa-linux/include" in text for text in build[name].inputs), name
    needs = build["cuda-nvcc_linux-aarch64"].depends
    assert "sysroot_linux-aarch64" in needs
    assert not any("linux-64" in spec for package in build.values() for spec in (*package.depends, package.name))
    assert "targets/sbsa-linux" in activate(LINUX_AARCH64) and "x86_64" not in activate(LINUX_AARCH64)


@pytest.mark.usefixtures("x86")
def test_what_is_compiled_for_is_there_without_a_compiler(place: Workspace, row: Variant) -> None:
    toolkit = bridge_parts.find_parts(row, "3.11", "auto", place, LINUX_AARCH64).toolkit
    names = {package.name for package in runtime_packages(toolkit, place)}
    assert {"cuda-version", "cuda-cudart", "cuda-cudart-dev", "cuda-cudart-dev_linux-aarch64", "cuda-cccl"} <= names
    assert not any("nvcc" in name for name in names)


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize("compiler", ["system", "g++-12", "/usr/bin/g++"])
def test_a_compiler_for_this_machine_is_refused(compiler: str, place: Workspace, row: Variant) -> None:
    with pytest.raises(UsageError, match=rf"cross compiler .* not with '{re.escape(compiler)}'") as refused:
        bridge_parts.find_parts(row, "3.11", compiler, place, LINUX_AARCH64)
    assert "--host-compiler" in refused.value.fix


@pytest.mark.usefixtures("x86")
def test_a_python_that_the_platform_has_not_is_refused_with_those_that_it_has(place: Workspace, row: Variant) -> None:
    with pytest.raises(MachineError, match=r"no Python 3\.12 for linux-aarch64 can be had here: .* 3\.11") as refused:
        bridge_parts.find_parts(row, "3.12", "auto", place, LINUX_AARCH64)
    # That of Debian 13 needs a newer C library than this machine's.
    assert "--python 3.11" in refused.value.fix and "3.13" not in refused.value.fix
    with pytest.raises(MachineError, match=r"that of Debian 13 needs glibc 2\.38, and this machine has 2\.36"):
        bridge_parts.find_parts(row, "3.13", "auto", place, LINUX_AARCH64)


def test_from_aarch64_there_is_no_cross_compiler_for_x86_64(
    place: Workspace, row: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms, "known_here", lambda machine="": LINUX_AARCH64)
    with pytest.raises(UsageError, match="no cross compiler for linux-64 that runs on linux-aarch64"):
        bridge_parts.find_parts(row, "3.11", "auto", place, LINUX_64)
