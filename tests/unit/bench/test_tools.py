"""Command lines of real builds: which tool, which source file, which extension."""

from __future__ import annotations

import pytest

from ssm_forge.bench.tools import COMPILERS, describe

NAME = "-DTORCH_EXTENSION_NAME=selective_scan_cuda"
SCAN = {"source": "selective_scan_fwd_fp16.cu", "extension": "selective_scan_cuda"}
CU = "csrc/selective_scan/selective_scan_fwd_fp16.cu"
OBJECT = "build/temp.linux-x86_64-cpython-312/csrc/selective_scan/selective_scan_fwd_fp16.o"
LIBRARY = "build/lib.linux-x86_64-cpython-312/selective_scan_cuda.cpython-312-x86_64-linux-gnu.so"
LINK = ("-pthread", "-shared", "-Wl,-O2", OBJECT, "-L.host/lib", "-lcudart", "-o", LIBRARY)
LINKED = {"source": "(link)", "extension": "selective_scan_cuda"}
CICC = ("--c++17", "--orig_src_file_name", CU, "-arch", "compute_90", f"{OBJECT}.cpp1.ii", "-o", f"{OBJECT}.ptx")
CC1PLUS = "/env/libexec/gcc/x86_64-conda-linux-gnu/14.3.0/cc1plus"


@pytest.mark.parametrize(
    ("argv", "tool"),
    [
        (("cicc", *CICC), "cicc"),
        (("/work/build_env/nvvm/bin/cicc", *CICC), "cicc"),
        (("/work/build_env/bin/ptxas", "-m64", "-arch", "sm_90", f"{OBJECT}.ptx", "-o", f"{OBJECT}.cubin"), "ptxas"),
        (("cudafe++", "--c++17", "--module_id_file_name", "x.module_id", "x.cpp4.ii"), "cudafe++"),
        (("fatbinary", "--create=x.fatbin", "--image3=kind=elf,sm=90,file=x.cubin"), "fatbinary"),
        ((".build/bin/nvcc", "--version"), "nvcc"),
        ((CC1PLUS, "-quiet", "-D", "A=1", "x.cudafe1.cpp", "-o", "/tmp/ccX.s"), "host compiler"),
        (("as", "-I", "csrc", "--64", "-o", "x.o", "/tmp/ccX.s"), "host compiler"),
        (("/env/x86_64-conda-linux-gnu/bin/ld", "-plugin", "liblto_plugin.so", "-shared", "x.o"), "host compiler"),
        (("/usr/bin/ld.gold", "--version"), "host compiler"),
        (("/usr/libexec/gcc/x86_64-linux-gnu/12/collect2", "-shared", "x.o"), "host compiler"),
        (("/usr/bin/gcc-12", "-E", "-x", "c++", CU, "-o", "x.cpp1.ii"), "host compiler"),
        (("x86_64-linux-gnu-g++-12", "--version"), "host compiler"),
        (("/env/bin/x86_64-conda-linux-gnu-c++", "-dumpfullversion"), "host compiler"),
        (("/env/bin/python", "-m", "pip", "wheel", ".", "-v"), "python"),
        (("python3.12", "-c", "import torch"), "python"),
        (("ninja", "-v", "-j", "2"), "ninja"),
        # A script is what runs it, whatever it does later.
        (("/bin/sh", "-c", f"/work/.tools/nvcc -c -c /work/{CU} -o x.o {NAME}"), "shell"),
        (("sh", "-c", f'cicc --orig_src_file_name "{CU}" -o "x.ptx"'), "shell"),
        (("bash", "-euo", "pipefail", "conda_build.sh"), "shell"),
        (("rattler-build", "build"), "other"),
        (("clang++-18", "-c", "x.cpp"), "other"),
        # Without a command line there is only the name.
        (("cc1plus",), "host compiler"),
        (("cicc",), "cicc"),
        (("kworker/0:1-events",), "other"),
        (("",), "other"),
    ],
)
def test_a_tool_is_known_by_its_name_and_has_no_label_of_its_own(argv: tuple[str, ...], tool: str) -> None:
    assert describe(argv) == (tool, {})


@pytest.mark.parametrize(
    ("argv", "tool", "labels"),
    [
        ((".build/bin/nvcc", "-objtemp", "-c", "-c", CU, "-o", OBJECT, NAME, "-ccbin", "gcc-12"), "nvcc", SCAN),
        (("/usr/bin/ccache", ".build/bin/nvcc", "-c", CU, "-o", OBJECT, NAME), "ccache", SCAN),
        (("nvcc", "-c", CU, "-o", OBJECT), "nvcc", {"source": SCAN["source"]}),
        (
            (".build/bin/x86_64-conda-linux-gnu-c++", "-c", "csrc/selective_scan.cpp", "-o", "x.o", NAME, "-g0"),
            "host compiler",
            {"source": "selective_scan.cpp", "extension": "selective_scan_cuda"},
        ),
        (("/usr/bin/g++-12", *LINK), "host compiler", LINKED),
        (("/usr/bin/ld", *LINK), "host compiler", LINKED),
        # Only the compiler that a script becomes has the file; the script's own time is the build's overhead.
        (("/bin/sh", "/work/.tools/nvcc", "-c", CU, "-o", OBJECT, NAME), "shell", {"extension": SCAN["extension"]}),
        (
            ("bash", "/recipes/common/compile.sh", ".build/bin/nvcc", "-c", CU, "-o", OBJECT, NAME),
            "shell",
            {"extension": SCAN["extension"]},
        ),
        (("/bin/sh", "/work/.tools/g++", *LINK), "shell", {}),
    ],
)
def test_compilers_and_linkers_say_what_they_work_on(argv: tuple[str, ...], tool: str, labels: dict[str, str]) -> None:
    assert describe(argv) == (tool, labels)


@pytest.mark.parametrize(
    "argv",
    [
        ("g++", "x.cpp", "-o", "x"),
        ("g++", "-shared", "x.o", "-o"),
        ("g++", "-c", "x.o", "-o", LIBRARY),
        ("g++", "-c", "-", "-o", "x.o"),
        ("python", "-c", "x.cu", "-o", LIBRARY),
        ("cicc", "-c", "x.cu"),
    ],
)
def test_what_neither_compiles_a_file_nor_links_an_extension_has_no_source(argv: tuple[str, ...]) -> None:
    assert "source" not in describe(argv)[1]


def test_every_compiler_is_a_tool_that_command_lines_give() -> None:
    programs = {"cicc": "cicc", "ptxas": "ptxas", "cudafe++": "cudafe++", "cc1plus": "host compiler"}
    assert [describe((program, "x"))[0] for program in programs] == list(programs.values()) == list(COMPILERS)
