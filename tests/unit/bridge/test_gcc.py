"""The host compiler that the bridge brings along."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ssm_forge.base.errors import MachineError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.bridge import debian
from ssm_forge.bridge import parts as bridge_parts
from ssm_forge.bridge.compiler import HostCompiler
from ssm_forge.bridge.debian import Deb
from ssm_forge.bridge.gcc import BundledCompiler, bundled_packages
from ssm_forge.bridge.package import write
from ssm_forge.manifest import variants

_ROOT = Path(__file__).parents[3]
_PREFIX = "x86_64-conda-linux-gnu"


def deb(package: str, version: str, part: str = "tool") -> Deb:
    return Deb(package, version, "bookworm", "main", "https://x/pool/x.deb", "0" * 64, 1, part)


@pytest.mark.parametrize(
    ("gxx", "libc", "version", "glibc"),
    [("11.3.0-12", "2.36-9+deb12u14", "11.3.0", "2.36"), ("4:12.2.0+dfsg-3", "2.41-1", "12.2.0", "2.41")],
)
def test_versions_are_upstreams(gxx: str, libc: str, version: str, glibc: str) -> None:
    compiler = BundledCompiler((deb("g++-11", gxx), deb("libc6-dev", libc, "sysroot")))
    assert (compiler.version, compiler.major, compiler.glibc) == (version, int(version.split(".")[0]), glibc)


@pytest.mark.parametrize("variant", ["cu118", "cu124", "cu130"])
def test_every_bridge_variant_has_a_compiler_to_bring_that_its_nvcc_takes(variant: str) -> None:
    row = variants.load(_ROOT / "recipes/variants.yaml").get(variant, "bridge")
    lock = _ROOT / f"recipes/bridge/debs.gcc-{row.row['cxx_compiler_version']}.toml"
    compiler = BundledCompiler(debian.read_lock(lock))
    low, high = (int(bound) for bound in row.row["host_compiler_range"].split("-"))
    assert str(compiler.major) == row.row["cxx_compiler_version"]
    assert low <= compiler.major <= high


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_auto_brings_one_and_system_refuses() -> None:
    row = variants.load(_ROOT / "recipes/variants.yaml").get("cu118", "bridge")
    brought = bridge_parts.find_compiler(row, "auto", workspace())
    assert isinstance(brought, BundledCompiler)
    assert brought.major == 11
    with pytest.raises(MachineError, match=r"nvcc 11\.8 accepts"):
        bridge_parts.find_compiler(row, "system", workspace())


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("wanted", ["auto", "bridge"])
def test_one_that_would_not_run_here_is_not_offered(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_parts, "glibc", lambda: "2.28")
    row = variants.load(_ROOT / "recipes/variants.yaml").get("cu130", "bridge")
    with pytest.raises(MachineError, match=r"needs glibc 2\.36, and this machine has 2\.28") as refused:
        bridge_parts.find_compiler(row, wanted, workspace())
    assert "gcc-toolset-12" in refused.value.fix


def test_a_compiler_outside_the_bounds_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "g++").write_text("#!/bin/sh\necho 14.2.0\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    matrix = variants.load(_ROOT / "recipes/variants.yaml")
    assert isinstance(bridge_parts.find_compiler(matrix.get("cu118", "bridge"), "auto", workspace()), BundledCompiler)
    taken = bridge_parts.find_compiler(matrix.get("cu130", "bridge"), "auto", workspace())
    assert isinstance(taken, HostCompiler)
    assert taken.major == 14


_PROGRAM = """\
#include <cmath>
#include <iostream>
#include <stdexcept>
#include <thread>
int main(int count, char **) {
    double root = 0;
    std::thread([&] { root = std::sqrt(count + 1.0); }).join();
    try { throw std::runtime_error("caught"); } catch (const std::exception &error) { std::cout << error.what(); }
    std::cout << ' ' << root << std::endl;
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("patchelf") is None, reason="patchelf is not on PATH (the tools environment has it)")
def test_it_compiles_and_links_from_a_folder_it_was_moved_to_with_nothing_on_the_path(tmp_path: Path) -> None:
    place = Workspace(root=_ROOT, cache=workspace().cache)
    compiler = BundledCompiler(debian.read_lock(_ROOT / "recipes/bridge/debs.gcc-11.toml"))
    debian.fetch_debs(compiler.debs, place)
    made = tmp_path / "made"
    packages = bundled_packages(compiler, place)
    for package in packages:
        package.stage(_folder(made / package.name))
    prefix = tmp_path / "a moved prefix"
    for package in packages:
        shutil.copytree(made / package.name, prefix, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(made)

    # Launchers need sh, dirname and readlink; gcc itself needs nothing of the machine but its C library.
    tools = _folder(tmp_path / "bin")
    for tool in ("sh", "dirname", "readlink"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    (tmp_path / "x.cpp").write_text(_PROGRAM)
    command = [prefix / f"bin/{_PREFIX}-g++", "-v", "-O1", "-pthread", "x.cpp", "-o", "x"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    searched = [line.strip() for line in done.stderr.splitlines() if line.startswith(" /")]
    assert searched
    assert all(line.startswith(str(prefix)) for line in searched), searched
    # As a build links, with the specs that GCC was built with.
    gxx = prefix / f"bin/{_PREFIX}-g++"
    specs, sysroot = (
        subprocess.run([gxx, option], capture_output=True, text=True, check=True).stdout.strip()
        for option in ("-print-file-name=builtin.specs", "-print-sysroot")
    )
    wrapped = [
        "bash",
        _ROOT / "recipes/common/compile.sh",
        gxx,
        "-shared",
        "-fPIC",
        "-Wl,--trace",
        "x.cpp",
        "-o",
        "x.so",
    ]
    folders = {"SRC_DIR": tmp_path, "PREFIX": tmp_path / "host", "BUILD_PREFIX": prefix, "SP_DIR": tmp_path / "site"}
    (tmp_path / ".build").symlink_to(prefix)
    environment = {**os.environ, **{name: str(path) for name, path in folders.items()}, "PY_VER": "3.11"}
    environment |= {"LINK_SPECS": specs, "LINK_SYSROOT": sysroot}
    done = subprocess.run(wrapped, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    taken = [line for line in done.stdout.splitlines() if not line.startswith("/tmp/cc")]
    assert any("/libc.so" in line for line in taken)
    assert [line for line in taken if not line.startswith((".build/", str(prefix)))] == []
    ran = subprocess.run([tmp_path / "x"], capture_output=True, text=True, check=True)
    assert ran.stdout == "caught 1.41421\n"
    ldd = subprocess.run(["ldd", prefix / _PREFIX / "tool/usr/bin/x86_64-linux-gnu-as"], capture_output=True, text=True)
    assert f"{prefix}/{_PREFIX}/tool/usr/bin/../../../lib/libbfd" in ldd.stdout
    assert "sysroot" not in ldd.stdout
    dangling = [path for path in prefix.rglob("*") if path.is_symlink() and not path.exists()]
    assert not [path for path in dangling if path.name.endswith(".so")]


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("patchelf") is None, reason="patchelf is not on PATH (the tools environment has it)")
def test_its_packages_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    place = Workspace(root=_ROOT, cache=workspace().cache)
    compiler = BundledCompiler(debian.read_lock(_ROOT / "recipes/bridge/debs.gcc-11.toml"))
    debian.fetch_debs(compiler.debs, place)
    (runtime,) = (p for p in bundled_packages(compiler, place) if p.name == "libstdcxx")
    first = write(runtime, tmp_path / "one", threads=1).read_bytes()
    assert write(runtime, tmp_path / "two", threads=os.cpu_count() or 1).read_bytes() == first
