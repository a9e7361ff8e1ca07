"""Which C++ compiler is taken, and what is said when none does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bridge_environment import installed
from front_door import assert_one_line_error, run_here
from ssm_forge.base.errors import MachineError
from ssm_forge.bridge import compiler as host
from ssm_forge.package import libraries as elf

ALLOWED = range(9, 16)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def fake(path: Path, version: str) -> Path:
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def test_none(path: Path) -> None:
    with pytest.raises(
        MachineError, match=r"that nvcc 13\.0 accepts was found \(found: none; it accepts g\+\+ 9 to 15\)"
    ) as error:
        host.find(ALLOWED, "13.0")
    assert "apt install g++-12" in error.value.fix


@pytest.mark.parametrize("version", ["16.1.0", "8.5.0"])
def test_too_new_or_too_old_says_what_was_found(path: Path, version: str) -> None:
    found = fake(path / "g++", version)
    with pytest.raises(MachineError) as error:
        host.find(ALLOWED, "13.0")
    assert f"(found: {found} {version}; it accepts g++ 9 to 15)" in error.value.what


def test_the_advice_is_a_compiler_that_this_nvcc_takes(path: Path) -> None:
    with pytest.raises(MachineError) as error:
        host.find(range(6, 12), "11.8")
    assert "apt install g++-11" in error.value.fix


def test_the_newest_allowed_wins_over_the_default_name(path: Path) -> None:
    fake(path / "g++", "16.0.0")
    fake(path / "g++-11", "11.4.0")
    wanted = fake(path / "g++-13", "13.2.0")
    fake(path / "gcc-13", "13.2.0")
    found = host.find(ALLOWED, "13.0")
    assert (found.cxx, found.version, found.major) == (wanted, "13.2.0", 13)
    assert found.cc == path / "gcc-13"


def test_an_explicit_path_is_taken_and_no_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(path / "g++-13", "13.2.0")
    mine = fake(path.parent / "my-g++", "12.1.0")
    assert host.find(ALLOWED, "13.0", str(mine)).cxx == mine
    monkeypatch.chdir(path.parent)
    assert host.find(ALLOWED, "13.0", "./my-g++").cxx == mine
    fake(mine, "7.5.0")
    with pytest.raises(MachineError, match=r"my-g\+\+ 7\.5\.0"):
        host.find(ALLOWED, "13.0", str(mine))


@pytest.mark.parametrize("text", [None, "clang version 19", "'no such option'; exit 1"])
def test_an_explicit_path_that_is_no_gxx_is_named(path: Path, text: str | None) -> None:
    mine = path.parent / "thing"
    if text is not None:
        fake(mine, text)
    with pytest.raises(MachineError, match="thing, which is no g"):
        host.find(ALLOWED, "13.0", str(mine))


def test_the_command_line_says_so_in_one_line(tmp_path: Path) -> None:
    old = fake(tmp_path / "g++", "7.5.0")
    done = run_here(
        "install-mamba", "--source", "bridge", "--host-compiler", str(old), SSM_FORGE_CACHE_DIR=str(tmp_path / "cache")
    )
    if "no Python" in done.stderr:
        pytest.skip("no interpreter with headers on this machine, which is asked for first")
    assert_one_line_error(done, 3, f"{old} 7.5.0", "it accepts g++ 9 to 15", "apt install")
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def machines() -> host.HostCompiler:
    """This machine's g++."""
    version = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    return host.HostCompiler(Path(shutil.which("g++") or ""), Path(shutil.which("gcc") or ""), version)


needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


@needs_gxx
def test_packages_are_conda_forges_and_carry_the_runtime(machines: host.HostCompiler, tmp_path: Path) -> None:
    made = {package.name: package for package in host.system_compiler_packages(machines)}
    assert set(made) == {
        *("ld_impl_linux-64", "binutils_impl_linux-64", "binutils_linux-64", "gcc_impl_linux-64", "gxx_impl_linux-64"),
        *("gcc_linux-64", "gxx_linux-64", "kernel-headers_linux-64", "sysroot_linux-64", "libstdcxx", "libgcc"),
    }
    major = machines.major
    assert made["gxx_linux-64"].run_exports == {"strong": [f"libstdcxx >={major}", f"libgcc >={major}"]}
    glibc = made["sysroot_linux-64"].version
    assert made["sysroot_linux-64"].run_exports == {"strong": [f"__glibc >={glibc},<3.0.a0"]}
    (tmp_path / "libstdcxx").mkdir()
    made["libstdcxx"].stage(tmp_path / "libstdcxx")
    assert (tmp_path / "libstdcxx/lib/libstdc++.so.6").stat().st_size > 1_000_000


@pytest.fixture
def prefix(machines: host.HostCompiler, tmp_path: Path) -> Path:
    """An environment with the compiler, installed as every conda package."""
    return installed(host.system_compiler_packages(machines), tmp_path, "gxx_linux-64")


@needs_gxx
def test_what_is_linked_looks_for_libraries_in_the_environment_unless_gccs_own_specs_are_taken(
    prefix: Path, tmp_path: Path
) -> None:
    """As with conda-forge's compiler, whose way out the recipes take (recipes/common/build.sh)."""
    cxx = prefix / "bin/x86_64-conda-linux-gnu-c++"
    (tmp_path / "x.cpp").write_text("#include <string>\nstd::string f() { return std::string(99, 'x'); }\n")

    def link(name: str, *options: str) -> tuple[str, ...]:
        command = [cxx, "-shared", "-fPIC", "x.cpp", "-o", name, *options]
        subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "LD_RUN_PATH": "$ORIGIN/x"})
        return elf.read(tmp_path / name).rpaths

    asked = subprocess.run([cxx, "-print-file-name=builtin.specs"], capture_output=True, text=True, check=True)
    assert link("plain.so") == (f"{prefix}/lib",)
    assert link("own.so", f"-specs={asked.stdout.strip()}") == ("$ORIGIN/x",)


@needs_gxx
def test_activation_gives_bare_names_and_flags_and_deactivation_puts_back_what_was_there(prefix: Path) -> None:
    shown = "CC CXX LD CFLAGS LDFLAGS CONDA_BUILD_SYSROOT"
    probe = f"""
    show() {{ for name in {shown}; do eval "echo \\"$name=\\${{$name-unset}}\\""; done; }}
    export CONDA_PREFIX="{prefix}" CFLAGS=-mine
    for script in "{prefix}"/etc/conda/activate.d/*.sh; do . "$script"; done; show; echo --
    for script in "{prefix}"/etc/conda/deactivate.d/*.sh; do . "$script"; done; show
    """
    clean = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["sh", "-eu", "-c", probe], capture_output=True, text=True, check=True, env=clean)
    active, _, after = done.stdout.partition("--\n")
    found = dict(line.split("=", 1) for line in active.splitlines())
    assert (found["CC"], found["CXX"]) == ("x86_64-conda-linux-gnu-cc", "x86_64-conda-linux-gnu-c++")
    assert f"-isystem {prefix}/include" in found["CFLAGS"]
    assert found["CFLAGS"].endswith(" -mine")
    assert f"-Wl,-rpath,{prefix}/lib" in found["LDFLAGS"]
    assert (Path(found["CONDA_BUILD_SYSROOT"]) / "usr/include").is_dir()
    assert after.splitlines() == [f"{n}={'-mine' if n == 'CFLAGS' else 'unset'}" for n in shown.split()]


@needs_gxx
def test_in_a_build_flags_are_about_the_host_environment(prefix: Path) -> None:
    script = prefix / "etc/conda/activate.d/activate-gcc_linux-64.sh"
    env = {"PATH": os.environ["PATH"], "CONDA_PREFIX": str(prefix), "CONDA_BUILD": "1", "PREFIX": "/h", "SRC_DIR": "/w"}
    command = ["sh", "-eu", "-c", f'. "{script}"; echo "$CFLAGS $LDFLAGS"']
    flags = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    assert "-isystem /h/include" in flags
    assert "-fdebug-prefix-map=/w=" in flags
    assert "-L/h/lib" in flags
    assert str(prefix) not in flags
