"""What the compile wrapper of the recipes hands to a compiler: nothing of it tells where the build is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ssm_forge.package import libraries as elf

SCRIPT = Path(__file__).parents[3] / "recipes/common/compile.sh"


@pytest.fixture
def build(tmp_path: Path) -> dict[str, str]:
    """The environment variables of a build whose compiler prints its folder and its arguments."""
    host = tmp_path / "host_env"
    work = tmp_path / "work"
    work.mkdir()
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    compiler.chmod(0o755)
    return {
        **os.environ,
        "SRC_DIR": str(work),
        "PREFIX": str(host),
        "BUILD_PREFIX": str(tmp_path / "build_env"),
        "SP_DIR": str(host / "lib/python3.12/site-packages"),
        "PY_VER": "3.12",
        "COMPILER": str(compiler),
    }


def run(build: dict[str, str], *arguments: str) -> list[str]:
    command = ["bash", SCRIPT, build["COMPILER"], *arguments]
    return subprocess.run(command, env=build, capture_output=True, text=True, check=True).stdout.splitlines()


def test_every_path_is_relative_to_the_sources(build: dict[str, str]) -> None:
    folder, *arguments = run(
        build,
        f"-I{build['SP_DIR']}/torch/include",
        f"-I{build['PREFIX']}/include/python3.12",
        f"-I{build['PREFIX']}/include",
        f"-I{build['BUILD_PREFIX']}/include",
        "-c",
        f"{build['SRC_DIR']}/csrc/a.cu",
        "two words",
    )
    assert folder == build["SRC_DIR"]
    expected = ["-I.site/torch/include", "-I.python", "-I.host/include", "-I.build/include", "-c", "csrc/a.cu"]
    assert arguments == [*expected, "two words"]


def test_the_list_of_what_a_file_includes_is_asked_for_as_the_compile_cache_knows_it(build: dict[str, str]) -> None:
    """By nvcc's long names, which most releases of torch write, ccache would cache nothing."""
    asked = ("--generate-dependencies-with-compile", "--dependency-output", f"{build['SRC_DIR']}/build/a.o.d")
    assert run(build, *asked, "-c", "a.cu")[1:] == ["-MD", "-MF", "build/a.o.d", "-c", "a.cu"]


@pytest.mark.parametrize(("standard", "given"), [("20", "-std=c++20"), ("17", "-std=c++17"), (None, "-std=c++17")])
def test_the_language_is_the_one_that_torch_takes(build: dict[str, str], standard: str | None, given: str) -> None:
    if standard:
        build["CXX_STANDARD"] = standard
    assert run(build, "-O3", "-std=c++17", "-c", "a.cu")[1:] == ["-O3", given, "-c", "a.cu"]


def test_a_compilers_own_rpath_does_not_get_into_what_is_linked(build: dict[str, str]) -> None:
    """conda's compilers set one in LDFLAGS; made relative, it would stay in the extension."""
    flags = [f"-Wl,-rpath,{build['PREFIX']}/lib", f"-Wl,-rpath-link,{build['PREFIX']}/lib", f"-L{build['PREFIX']}/lib"]
    assert run(build, "-shared", *flags)[1:] == ["-shared", "-Wl,-rpath-link,.host/lib", "-L.host/lib"]


def test_the_compile_cache_starts_the_compiler_where_there_is_one(build: dict[str, str], tmp_path: Path) -> None:
    cache = tmp_path / "ccache"
    cache.write_text('#!/bin/sh\necho cached\nexec "$@"\n')
    cache.chmod(0o755)
    build["CCACHE"] = str(cache)
    assert run(build, "-c")[0] == "cached"


def test_links_alone_are_made_with_the_specs_that_gcc_was_built_with(build: dict[str, str]) -> None:
    build["LINK_SPECS"] = f"{build['BUILD_PREFIX']}/lib/gcc/x/14.4.0/builtin.specs"
    assert run(build, "-shared", "a.o")[1:] == ["-shared", "a.o", "-specs=.build/lib/gcc/x/14.4.0/builtin.specs"]
    assert run(build, "-c", "a.cpp")[1:] == ["-c", "a.cpp"]


def test_a_compilers_sysroot_is_the_linkers_too_where_specs_are_given(build: dict[str, str]) -> None:
    """GCC forgets it there; the linker would look for what libc.so names on the machine."""
    build["LINK_SPECS"] = f"{build['BUILD_PREFIX']}/builtin.specs"
    build["LINK_SYSROOT"] = f"{build['BUILD_PREFIX']}/triplet/sysroot"
    linked = ["-specs=.build/builtin.specs", "-Wl,--sysroot=.build/triplet/sysroot"]
    assert run(build, "-shared", "a.o")[1:] == ["-shared", "a.o", *linked]
    assert run(build, "-c", "a.cpp")[1:] == ["-c", "a.cpp"]
    build["LINK_SYSROOT"] = ""
    assert run(build, "-shared", "a.o")[1:] == ["-shared", "a.o", linked[0]]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here to link with")
def test_no_folder_of_the_build_is_in_what_conda_forges_gcc_links(build: dict[str, str]) -> None:
    """conda-forge's GCC adds an rpath by its specs file, and ld then ignores LD_RUN_PATH."""
    specs = Path(build["BUILD_PREFIX"]) / "lib/gcc"
    specs.mkdir(parents=True)
    found = subprocess.run(["g++", "-dumpspecs"], capture_output=True, text=True, check=True).stdout
    (specs / "builtin.specs").write_text(found)
    (specs / "specs").write_text(re.sub(r"(?m)(^\*link_command:\n.*)", rf"\1 %{{!static:-rpath {specs}}}", found))
    compiler = Path(build["COMPILER"])
    compiler.write_text(f'#!/bin/sh\nexec g++ "-specs={specs}/specs" "$@"\n')
    work = Path(build["SRC_DIR"])
    (work / "a.cpp").write_text("int answer() { return 42; }\n")
    (work / ".build").symlink_to(build["BUILD_PREFIX"])
    build["LD_RUN_PATH"] = "$ORIGIN/../.."
    run(build, "-fPIC", "-c", "a.cpp", "-o", "a.o")
    run(build, "-shared", "a.o", "-o", "plain.so")
    assert elf.read(work / "plain.so").foreign_rpaths == (str(specs),), "this compiler proves nothing"
    build["LINK_SPECS"] = f"{specs}/builtin.specs"
    run(build, "-shared", "a.o", "-o", "a.so")
    assert elf.read(work / "a.so").rpaths == ("$ORIGIN/../..",)
