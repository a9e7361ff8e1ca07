"""The build script of source trees, run with stand-ins for the compilers and pip: what nvcc gets, what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_build_script import RECIPES, build, script

__all__ = ["build"]

_PYTHON = f"""\
#!/bin/sh
case "$*" in
*common/jobs.py*) echo 1 ;;
*"-m pip install"*) exec {sys.executable} "$SRC_DIR/pip.py" ;;
esac
"""
_NVCC = """\
#!/bin/sh
[ "$1" = --version ] || printf '%s\\n' "$@" >"$SRC_DIR/nvcc.txt"
"""
# What pip and setup.py do to compile; FIRST is what a test has them do before.
_PIP = """\
import os, pathlib, subprocess
site = pathlib.Path(os.environ["SP_DIR"])
FIRST
source = os.environ["SRC_DIR"] + "/k.cu"
theirs = ["-gencode", "arch=compute_70,code=sm_70", "--threads", "4", "-lineinfo", "-std=c++14"]
subprocess.run([os.environ["PYTORCH_NVCC"], "-c", source, *theirs], check=True)
info = site / "demo-1.0.dist-info"
info.mkdir(parents=True)
(info / "RECORD").write_text("demo.so,,\\ndemo-1.0.dist-info/direct_url.json,,\\n")
(info / "direct_url.json").write_text("{}")
(site / "demo.so").write_text("kernels")
"""


@pytest.fixture
def tree(build: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The variables of a source tree's build."""
    recipes = tmp_path / "recipes"
    shutil.copytree(RECIPES / "source-tree", recipes / "demo")
    (recipes / "common").symlink_to(RECIPES / "common")
    script(Path(build["BUILD_PREFIX"]) / "bin/nvcc", _NVCC)
    return {
        **build,
        "PYTHON": str(script(tmp_path / "python", _PYTHON)),
        "RECIPE_DIR": str(recipes / "demo"),
        "EXTENSION": "none",
        "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX",
        "NVCC_THREADS": "1",
        "CXX_STANDARD": "17",
    }


def run(tree: dict[str, str], first: str = "") -> subprocess.CompletedProcess[str]:
    (Path(tree["SRC_DIR"]) / "pip.py").write_text(_PIP.replace("FIRST", first))
    command = ["bash", str(Path(tree["RECIPE_DIR"]) / "build.sh")]
    return subprocess.run(command, env=tree, capture_output=True, text=True, check=False)


def test_nvcc_gets_our_capabilities_through_the_toolchain_of_the_recipes(tree: dict[str, str]) -> None:
    done = run(tree)
    assert done.returncode == 0, done.stderr
    given = (Path(tree["SRC_DIR"]) / "nvcc.txt").read_text().split()
    assert given[:2] == ["-objtemp", "-no-compress"]
    assert given[2:5] == ["-c", "k.cu", "-std=c++17"]
    assert given[5::2] == ["-gencode", "-gencode", "-gencode", "--threads"]
    assert given[6::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
        "1",
    ]
    info = Path(tree["SP_DIR"]) / "demo-1.0.dist-info"
    assert [path.name for path in info.iterdir()] == ["RECORD"]
    assert "direct_url" not in (info / "RECORD").read_text()


def test_the_switches_that_keep_a_setup_py_from_downloading_are_set(tree: dict[str, str]) -> None:
    names = ("MAMBA_FORCE_BUILD", "MAMBA_KEEP_CUDA_BUILD", "CAUSAL_CONV1D_FORCE_BUILD")
    done = run(tree, f"assert [os.environ[name] for name in {names}] == ['TRUE'] * 3, 'not set'")
    assert done.returncode == 0, done.stderr


_ASK = "import urllib.request\ntry: urllib.request.urlopen('https://example.org/a.whl')\nexcept OSError: "


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (f"{_ASK}raise SystemExit(0)", "error: setup.py downloads from example.org instead of compiling"),
        (f"{_ASK}raise", "error: setup.py downloads from example.org instead of compiling"),
        ("raise SystemExit(0)", "error: setup.py compiled no CUDA source: it left its extension out."),
        (
            "try: open('/var/tmp/of-a-tree', 'w')\nexcept OSError: pass",
            "error: setup.py wants to write /var/tmp/of-a-tree, which is outside of its folder",
        ),
    ],
)
def test_what_a_setup_py_does_instead_of_compiling_in_its_folder_is_an_error(
    tree: dict[str, str], first: str, said: str
) -> None:
    done = run(tree, first)
    assert done.returncode == 1
    assert said in done.stderr
    assert not Path("/var/tmp/of-a-tree").exists()


def test_one_that_would_rather_download_and_compiles_where_it_cant_is_built(tree: dict[str, str]) -> None:
    done = run(tree, f"{_ASK}pass")
    assert done.returncode == 0, done.stderr


def test_a_compiler_that_fails_is_no_download(tree: dict[str, str]) -> None:
    script(Path(tree["BUILD_PREFIX"]) / "bin/nvcc", '#!/bin/sh\n[ "$1" = --version ] || exit 3\n')
    done = run(tree)
    assert done.returncode == 1
    assert "error: setup.py" not in done.stderr


def test_a_script_of_the_recipes_without_the_line_that_ends_the_set_up_is_noticed(
    tree: dict[str, str], tmp_path: Path
) -> None:
    common = tmp_path / "recipes" / "common"
    common.unlink()
    shutil.copytree(RECIPES / "common", common)
    text = (common / "build.sh").read_text()
    (common / "build.sh").write_text(text.replace("# The wheel is unpacked at once", "# Otherwise"))
    done = run(tree)
    assert done.returncode == 1
    assert "has no line '# The wheel is unpacked at once' any more" in done.stderr
