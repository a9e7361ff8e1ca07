"""What the recipes make of nvcc's own compilers: they learn nothing of the process and the folder they run in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMON = Path(__file__).parents[3] / "recipes/common"

# Prints what a program finds out about itself and about the file that it is given.
_PROBE = """
import ctypes, os, sys
found = ctypes.create_string_buffer(144)
failed = ctypes.CDLL(None).__xstat(1, sys.argv[1].encode(), found)
size, *times = (int.from_bytes(found.raw[at : at + 8], "little") for at in (48, 72, 80, 88, 96, 104, 112))
print(failed, size, times, os.getpid(), os.getcwd(), os.path.getsize(os.path.join(os.getcwd(), sys.argv[1])))
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The work folder of a build, reached through a link."""
    (tmp_path / "real/.tools").mkdir(parents=True)
    (tmp_path / "work").symlink_to("real")
    return tmp_path / "work"


def stage(work: Path, program: str, *arguments: str) -> str:
    tool = work / ".tools/cicc"
    tool.with_suffix(".real").write_text(program)
    tool.with_suffix(".real").chmod(0o755)
    done = subprocess.run(
        ["bash", COMMON / "nvcc_stage.sh", tool, *arguments],
        cwd=work,
        env={**os.environ, "SRC_DIR": str(work)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_arguments_name_no_folder_of_the_build(work: Path) -> None:
    given = ["--orig_src_path_name", f"{work.resolve()}/csrc/a.cu", f"{work}/b/a.ii", "two words", "/elsewhere/a.cu"]
    printed = stage(work, '#!/bin/sh\nprintf "%s\\n" "$@"\n', *given).splitlines()
    assert printed == ["--orig_src_path_name", "csrc/a.cu", "b/a.ii", "two words", "/elsewhere/a.cu"]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here to compile constant_identity.cpp")
def test_process_folder_and_times_are_the_same_for_every_build(work: Path) -> None:
    library = work / ".tools/constant_identity.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, COMMON / "constant_identity.cpp", "-ldl"], check=True)
    (work / "a.cu").write_text("12345")
    printed = stage(work, f"#!{sys.executable}\n{_PROBE}", "a.cu")
    assert printed == "0 5 [0, 0, 0, 0, 0, 0] 1 /proc/self/cwd 5\n"
