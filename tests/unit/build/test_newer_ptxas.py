"""Machine code for GPUs that nvcc does not know: what nvcc, ptxas and fatbinary are asked for in their place."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "recipes/common/newer_ptxas.sh"

# Like nvcc: one PTX and one machine code for 9.0 (and one for 8.0, which is nobody else's business), then fatbinary.
_NVCC = """#!/bin/sh
echo "nvcc $*" >> log
ptxas -arch=sm_80 -m64 "a b.ptx" -o "a b.sm_80.cubin"
ptxas -arch=sm_90 -m64 "a b.ptx" -o "a b.cubin"
fatbinary --create=x.fatbin -64 "--image3=kind=elf,sm=80,file=a b.sm_80.cubin" "--image3=kind=elf,sm=90,file=a b.cubin"
rm "a b.cubin" "a b.sm_80.cubin"
"""
_PTXAS = """#!/bin/sh
echo "%s $*" >> log
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""
_FATBINARY = """#!/bin/sh
for arg in "$@"; do
    case "$arg" in *file=*) [ -s "${arg##*file=}" ] || exit 5 ;; esac
    echo "fatbinary $arg" >> log
done
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {"nvcc.real": _NVCC, "ptxas.real": _PTXAS % "ptxas", "newer-ptxas": _PTXAS % "newer"}
    for name, text in {**programs, "fatbinary.real": _FATBINARY}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name in ("nvcc", "ptxas", "fatbinary"):
        shutil.copy(SCRIPT, folder / name)
        (folder / name).chmod(0o755)
    return folder


def compiled(tools: Path, *arguments: str) -> list[str]:
    """What the programs were asked for, in order; nothing of their work is left then."""
    work = tools.parent / "work"
    work.mkdir()
    subprocess.run(
        [tools / "nvcc", *arguments], cwd=work, env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, check=True
    )
    lines = (work / "log").read_text().splitlines()
    (work / "log").unlink()
    assert not list(work.iterdir())
    return lines


def pair(compute: int, code: str = "sm") -> list[str]:
    return ["-gencode", f"arch=compute_{compute},code={code}_{compute}"]


def test_what_nvcc_knows_goes_through_unchanged(tools: Path) -> None:
    asked = [*pair(80), *pair(90), *pair(90, "compute"), "-DX=two words"]
    assert compiled(tools, *asked) == [
        f"nvcc {' '.join(asked)}",
        "ptxas -arch=sm_80 -m64 a b.ptx -o a b.sm_80.cubin",
        "ptxas -arch=sm_90 -m64 a b.ptx -o a b.cubin",
        "fatbinary --create=x.fatbin",
        "fatbinary -64",
        "fatbinary --image3=kind=elf,sm=80,file=a b.sm_80.cubin",
        "fatbinary --image3=kind=elf,sm=90,file=a b.cubin",
    ]


def test_a_newer_gpu_gets_its_code_beside_that_for_90(tools: Path) -> None:
    lines = compiled(tools, *pair(80), *pair(120), *pair(90), "-c")
    assert lines[0] == f"nvcc {' '.join([*pair(80), *pair(90)])} -c"
    assert "newer -arch=sm_120 -m64 a b.ptx -o a b.cubin.sm_120" in lines
    assert "ptxas -arch=sm_90 -m64 a b.ptx -o a b.cubin" in lines
    assert lines[-3:] == [
        "fatbinary --image3=kind=elf,sm=80,file=a b.sm_80.cubin",
        "fatbinary --image3=kind=elf,sm=90,file=a b.cubin",
        "fatbinary --image3=kind=elf,sm=120,file=a b.cubin.sm_120",
    ]


def test_without_90_only_the_newer_ones_are_there(tools: Path) -> None:
    lines = compiled(tools, *pair(100), *pair(80), *pair(120))
    assert lines[0] == f"nvcc {' '.join([*pair(80), *pair(90)])}"
    assert not [line for line in lines if line.startswith("ptxas -arch=sm_90")]
    assert lines[-2:] == [
        "fatbinary --image3=kind=elf,sm=100,file=a b.cubin.sm_100",
        "fatbinary --image3=kind=elf,sm=120,file=a b.cubin.sm_120",
    ]


def test_a_failure_of_the_newer_one_is_a_failure(tools: Path) -> None:
    (tools / "newer-ptxas").write_text("#!/bin/sh\nexit 3\n")
    (tools / "nvcc.real").write_text("#!/bin/sh\nexec ptxas -arch=sm_90 a.ptx -o a.cubin\n")
    done = subprocess.run([tools / "nvcc", *pair(120)], env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"})
    assert done.returncode == 3
