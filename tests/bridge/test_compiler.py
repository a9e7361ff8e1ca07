"""Which C++ compiler is taken, and what is said when none does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from front_door import assert_one_line_error, run_here
from ssm_forge.bridge import compiler as host
from ssm_forge.errors import MachineError

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


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_packages_point_at_the_compiler_and_carry_its_runtime(tmp_path: Path) -> None:
    compiler = host.HostCompiler(Path(shutil.which("g++") or ""), Path(shutil.which("gcc") or ""), "12.2.0")
    made = {package.name: package for package in host.system_compiler_packages(compiler)}
    assert set(made) >= {"gcc_linux-64", "gxx_linux-64", "sysroot_linux-64", "libstdcxx", "libgcc"}
    assert made["gxx_linux-64"].run_exports == {"strong": ["libstdcxx >=12", "libgcc >=12"]}
    for name in ("gxx_linux-64", "libstdcxx"):
        (tmp_path / name).mkdir()
        made[name].stage(tmp_path / name)
    assert (tmp_path / "libstdcxx/lib/libstdc++.so.6").stat().st_size > 1_000_000
    script = tmp_path / "gxx_linux-64/etc/conda/activate.d/activate-gxx_linux-64.sh"
    said = subprocess.run(
        ["/bin/sh", "-c", f'NVCC_PREPEND_FLAGS=-x; . "{script}"; echo "$CXX|$NVCC_PREPEND_FLAGS"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == f"{compiler.cxx}|-x -ccbin={compiler.cxx}\n"
