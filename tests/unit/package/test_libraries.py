"""Questions to shared libraries, asked of tiny ones compiled here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import IntegrityError, MachineError
from ssm_forge.package import libraries as elf

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on this machine to make libraries with")


def compile_library(path: Path, code: str, *options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".c")
    source.write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", path, *options], check=True, capture_output=True)
    return path


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """``lib/libuser.so`` needs ``helper`` of ``lib/inner/libhelper.so``, which needs ``lib/inner/libdeep.so``."""
    root = tmp_path / "prefix"
    inner = root / "lib/inner"
    compile_library(inner / "libdeep.so", "int deep(void) { return 1; }")
    compile_library(
        inner / "libhelper.so",
        "int deep(void); int helper(void) { return deep(); }",
        f"-L{inner}",
        "-ldeep",
        "-Wl,-rpath,$ORIGIN",
    )
    compile_library(
        root / "lib/libuser.so",
        "#include <stdlib.h>\n#include <math.h>\n#include <stdio.h>\n"
        "int helper(void); int __attribute__((weak)) maybe(void);\n"
        'int user(double x) { printf("%f", cos(x)); return helper() + (maybe ? maybe() : atoi(getenv("X"))); }',
        f"-L{inner}",
        "-lhelper",
        "-lm",
        f"-Wl,-rpath,$ORIGIN/inner,-rpath-link,{inner}",
    )
    return root


@needs_gcc
def test_the_dynamic_section_is_read(prefix: Path) -> None:
    library = elf.read(prefix / "lib/libuser.so")
    assert set(library.needed) == {"libhelper.so", "libm.so.6", "libc.so.6"}
    assert library.rpaths == ("$ORIGIN/inner",)
    assert {"helper", "cos"} <= library.undefined
    # Weak symbols may stay undefined: nothing breaks without them.
    assert "maybe" not in library.undefined


@needs_gcc
def test_the_highest_glibc_version_is_what_readelf_says(prefix: Path) -> None:
    path = prefix / "lib/libuser.so"
    if shutil.which("readelf") is None:
        pytest.skip("no readelf on this machine to compare with")
    text = subprocess.run(["readelf", "-V", path], capture_output=True, text=True, check=True).stdout
    expected = max(tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", text))
    assert elf.read(path).glibc == ".".join(map(str, expected))


def test_versions_are_compared_as_numbers() -> None:
    versions = {"libc.so.6": frozenset({"GLIBC_2.4", "GLIBC_2.17", "GLIBC_PRIVATE", "GLIBCXX_3.4.30"})}
    assert elf.Library(Path("x"), (), (), frozenset(), versions).glibc == "2.17"
    assert elf.Library(Path("x"), (), (), frozenset(), {}).glibc == "2.2.5"


@needs_gcc
def test_everything_resolves_inside_the_prefix(prefix: Path) -> None:
    found = elf.resolve(elf.read(prefix / "lib/libuser.so"), prefix, [])
    assert found.libraries == {
        "libhelper.so": prefix / "lib/inner/libhelper.so",
        "libdeep.so": prefix / "lib/inner/libdeep.so",
    }
    assert (found.missing_libraries, found.outside, found.missing_symbols) == ((), (), ())


@needs_gcc
def test_a_missing_library_and_its_symbols_are_named(prefix: Path) -> None:
    (prefix / "lib/inner/libhelper.so").unlink()
    found = elf.resolve(elf.read(prefix / "lib/libuser.so"), prefix, [])
    assert found.missing_libraries == ("libhelper.so",)
    assert found.missing_symbols == ("helper",)


@needs_gcc
def test_a_library_that_lost_a_symbol_is_noticed(prefix: Path) -> None:
    compile_library(prefix / "lib/inner/libhelper.so", "int other(void) { return 0; }")
    assert elf.resolve(elf.read(prefix / "lib/libuser.so"), prefix, []).missing_symbols == ("helper",)


@needs_gcc
def test_a_library_outside_the_prefix_is_named_even_behind_a_link(prefix: Path, tmp_path: Path) -> None:
    path = prefix / "lib/inner/libhelper.so"
    path.rename(tmp_path / "libhelper.so")
    path.symlink_to(tmp_path / "libhelper.so")
    found = elf.resolve(elf.read(prefix / "lib/libuser.so"), prefix, [])
    assert found.outside == (f"libhelper.so ({path})",)


@needs_gcc
def test_what_was_loaded_before_counts(prefix: Path) -> None:
    user = compile_library(prefix / "lib/libplain.so", "int helper(void); int f(void) { return helper(); }")
    library = elf.read(user)
    assert elf.resolve(library, prefix, []).missing_symbols == ("helper",)
    assert elf.resolve(library, prefix, [prefix / "lib/inner/libhelper.so"]).missing_symbols == ()


@needs_gcc
def test_exports_are_told_from_imports(prefix: Path) -> None:
    assert elf.defines(prefix / "lib/inner/libhelper.so", ["helper", "deep", "nothing"]) == {"helper"}


@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF", b"\x7fELF\x02\x01\x01" + b"\0" * 20])
def test_what_is_no_library_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"lib\.so is not a readable ELF library"):
        elf.read(tmp_path / "lib.so")
    with pytest.raises(IntegrityError):
        elf.read(tmp_path / "missing.so")


def cuobjdump_answers(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    tool = folder / "cuobjdump"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(elf, "cuobjdump", lambda: tool)


def test_gpu_code_is_what_cuobjdump_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuobjdump_answers(
        monkeypatch,
        tmp_path,
        'case "$1" in --list-elf) echo "ELF file    1: x.1.sm_80.cubin"; echo "ELF file    2: x.2.sm_90a.cubin";;'
        ' *) echo "PTX file    1: x.1.sm_90.ptx";; esac',
    )
    assert elf.gpu_code(tmp_path / "x.so") == ArchList.parse("8.0;9.0+PTX")


def test_a_library_without_gpu_code_is_told_from_a_tool_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuobjdump_answers(monkeypatch, tmp_path, "echo \"File 'x' does not contain device code\" >&2; exit 255")
    with pytest.raises(IntegrityError, match="holds no GPU code"):
        elf.gpu_code(tmp_path / "x.so")
    cuobjdump_answers(monkeypatch, tmp_path, "echo 'fatal: out of memory' >&2; exit 1")
    with pytest.raises(IntegrityError, match=r"could not read .*fatal: out of memory"):
        elf.gpu_code(tmp_path / "x.so")


@needs_gcc
def test_the_real_cuobjdump_says_that_there_is_none(tmp_path: Path) -> None:
    try:
        elf.cuobjdump()
    except MachineError:
        pytest.skip("cuobjdump is not among these tools (the tools environment has it)")
    with pytest.raises(IntegrityError, match="holds no GPU code"):
        elf.gpu_code(compile_library(tmp_path / "plain.so", "int f(void) { return 1; }"))


def test_a_missing_cuobjdump_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="cuobjdump is missing"):
        elf.cuobjdump()
