"""The recipes' build script, run with stand-ins for the compilers and pip: what it hands on, and that it runs twice."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[3] / "recipes"

# Notes the variables that pip's build would see, and leaves what it would.
_PYTHON = f"""\
#!/bin/sh
case "$*" in
*common/own_headers.py*) exec {sys.executable} "$@" ;;
*common/jobs.py*) echo "$*" >"$SRC_DIR/asked"; echo 1 ;;
*"-m pip install"*)
    env >"$SRC_DIR/seen"
    "$CXX" -c x.cpp >"$SRC_DIR/compiled"
    echo "#include <c10/util/Half.h>" >"$SRC_DIR/x.cu"
    "$PYTORCH_NVCC" -c x.cu -I"$SP_DIR/torch/include" >"$SRC_DIR/compiled-cuda"
    "$CXX" -shared x.o >"$SRC_DIR/linked"
    mkdir -p "$SP_DIR/demo-1.0.dist-info"
    touch "$SP_DIR/demo_cuda.so.so"
    echo "demo/direct_url.json,," >"$SP_DIR/demo-1.0.dist-info/RECORD" ;;
esac
"""

# As conda-forge's: bare name, and specs without an rpath beside its own.
_COMPILER = """\
#!/bin/sh
case "$1" in
-print-file-name=builtin.specs) echo "{specs}" ;;
*) printf '%s\\n' "$@" ;;
esac
"""

_TOOL = b"\x7fELF the real one"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def build(tmp_path: Path) -> dict[str, str]:
    """The variables of a build; its environments hold what the script looks for."""
    build_prefix, prefix = tmp_path / "build_env", tmp_path / "host_env"
    specs = build_prefix / "lib/gcc/x86_64-conda-linux-gnu/14.4.0/builtin.specs"
    specs.parent.mkdir(parents=True)
    specs.touch()
    for name in ("cc", "c++"):
        script(build_prefix / f"bin/x86_64-conda-linux-gnu-{name}", _COMPILER.format(specs=specs))
    script(build_prefix / "bin/nvcc", "#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    for tool in ("bin/cudafe++", "nvvm/bin/cicc"):
        (build_prefix / tool).parent.mkdir(parents=True, exist_ok=True)
        (build_prefix / tool).write_bytes(_TOOL)
    (prefix / "include/python3.12").mkdir(parents=True)
    (prefix / "include/python3.12/Python.h").touch()
    (tmp_path / "work").mkdir()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("CCACHE")}
    return {
        **clean,
        "PATH": f"{build_prefix}/bin:{os.environ['PATH']}",
        "CC": "x86_64-conda-linux-gnu-cc",
        "CXX": "x86_64-conda-linux-gnu-c++",
        "NVCC_PREPEND_FLAGS": "-ccbin=x86_64-conda-linux-gnu-c++",
        "BUILD_PREFIX": str(build_prefix),
        "PREFIX": str(prefix),
        "SRC_DIR": str(tmp_path / "work"),
        "SP_DIR": str(prefix / "lib/python3.12/site-packages"),
        "PY_VER": "3.12",
        "PYTHON": str(script(tmp_path / "python", _PYTHON)),
        "RECIPE_DIR": str(RECIPES / "causal-conv1d"),
        "PKG_NAME": "demo",
        "PKG_VERSION": "1.0",
        "EXTENSION": "demo_cuda",
        "CPU_COUNT": "2",
        "build_platform": "linux-64",
        "target_platform": "linux-64",
    }


def run(build: dict[str, str]) -> dict[str, str]:
    """Run the script; returns the variables that pip saw."""
    done = subprocess.run(["bash", RECIPES / "common/build.sh"], env=build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (Path(build["SRC_DIR"]) / "seen").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_compilers_are_named_by_their_whole_paths(build: dict[str, str]) -> None:
    """A bare name is the system's for a compile cache that looks it up with another PATH; torch makes CC nvcc's."""
    seen = run(build)
    assert seen["CC"] == f"{build['BUILD_PREFIX']}/bin/x86_64-conda-linux-gnu-cc"
    assert f"{build['BUILD_PREFIX']}/bin/x86_64-conda-linux-gnu-c++" in Path(seen["CXX"]).read_text()
    assert "NVCC_PREPEND_FLAGS" not in seen


def test_links_and_nothing_else_get_the_specs_without_an_rpath(build: dict[str, str]) -> None:
    run(build)
    work = Path(build["SRC_DIR"])
    assert (work / "compiled").read_text().split()[:2] == ["-c", "x.cpp"]
    specs = "-specs=.build/lib/gcc/x86_64-conda-linux-gnu/14.4.0/builtin.specs"
    assert (work / "linked").read_text().split() == ["-shared", "x.o", specs]


def test_cu_files_are_compiled_without_torchs_headers(build: dict[str, str]) -> None:
    run(build)
    work = Path(build["SRC_DIR"])
    given = ["-I.common/cu_headers", "-objtemp", "-no-compress", "-c", "x.cu"]
    assert (work / "compiled-cuda").read_text().split() == given
    assert (work / ".common/cu_headers/c10/util/Half.h").is_file()
    assert (work / "compiled").read_text().split()[2:] == ["-include", ".common/cuda_check.h"]


def test_a_compiler_without_such_specs_links_as_it_does(build: dict[str, str]) -> None:
    next(Path(build["BUILD_PREFIX"]).rglob("builtin.specs")).unlink()
    run(build)
    assert (Path(build["SRC_DIR"]) / "linked").read_text().split() == ["-shared", "x.o"]


def test_a_second_build_in_the_same_environments_wraps_nvccs_compilers_once(build: dict[str, str]) -> None:
    run(build)
    run(build)
    for tool in ("bin/cudafe++", "nvvm/bin/cicc"):
        path = Path(build["BUILD_PREFIX"]) / tool
        assert path.with_name(f"{path.name}.real").read_bytes() == _TOOL
        assert "nvcc_stage.sh" in path.read_text()


def test_as_many_compilers_run_as_cores_and_memory_allow(build: dict[str, str]) -> None:
    assert run(build)["MAX_JOBS"] == "1"
    words = (Path(build["SRC_DIR"]) / "asked").read_text().split()
    assert words[1:] == [f"{build['RECIPE_DIR']}/../compile-costs.txt", "demo_cuda", "2"]


def test_nothing_of_an_earlier_build_in_the_same_environments_gets_into_the_package(build: dict[str, str]) -> None:
    site = Path(build["SP_DIR"])
    left = [site / name for name in ("demo/gone.py", "demo-0.9.dist-info/RECORD", "demo_cuda.cpython-312.so")]
    others = [site / name for name in ("demo_tools/x.py", "torch/version.py")]
    for path in (*left, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run(build)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_the_recipes_know_no_source_of_packages() -> None:
    """One path for all: what the bridge does otherwise than conda-forge belongs into the bridge."""
    files = [path for folder in ("common", "causal-conv1d", "mamba-ssm") for path in (RECIPES / folder).iterdir()]
    assert [path.name for path in files if path.is_file() and "bridge" in path.read_text()] == []


@pytest.mark.parametrize("script", sorted(RECIPES.glob("*/**/*.py")), ids=lambda path: path.name)
def test_what_a_build_runs_with_its_own_python_runs_with_the_oldest(script: Path) -> None:
    """Python 3.9's: torch 2.0 to 2.8 are there for it."""
    tree = ast.parse(script.read_text(encoding="utf-8"), feature_version=(3, 9))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    zips = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "zip"]
    assert not [keyword.arg for call in zips for keyword in call.keywords]
    postponed = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    notes = [node.annotation for node in ast.walk(tree) if isinstance(node, (ast.arg, ast.AnnAssign))]
    notes += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    unions = [note for root in notes if root for note in ast.walk(root) if isinstance(note, ast.BinOp)]
    assert postponed or not unions


def test_for_another_platform_this_machines_python_and_compiler_run_and_the_others_headers_are_read(
    build: dict[str, str],
) -> None:
    native = script(
        Path(build["BUILD_PREFIX"]) / "bin/x86_64-conda-linux-gnu-native",
        '#!/bin/sh\necho native "$@" >>"$SRC_DIR/compiled-to-run-here"\n',
    )
    for name in ("cc", "c++"):
        own = Path(build["BUILD_PREFIX"]) / f"bin/x86_64-conda-linux-gnu-{name}"
        script(own.with_name(f"aarch64-conda-linux-gnu-{name}"), own.read_text())
    own_python = script(Path(build["BUILD_PREFIX"]) / "bin/python", _PYTHON)
    host = {**build, "PYTHON": str(Path(build["PREFIX"]) / "bin/python-that-does-not-run-here")}
    seen = run(
        {
            **host,
            "target_platform": "linux-aarch64",
            "CC": "aarch64-conda-linux-gnu-cc",
            "CXX": "aarch64-conda-linux-gnu-c++",
            "CXX_FOR_BUILD": str(native),
        }
    )
    assert seen["PYTHON"] == str(own_python)
    assert "constant_identity" in (Path(build["SRC_DIR"]) / "compiled-to-run-here").read_text()
    assert "aarch64-conda-linux-gnu-c++" in Path(seen["CXX"]).read_text()
    assert ".host/targets/sbsa-linux/include" in seen["CPATH"] and "x86_64" not in seen["CPATH"]
    assert seen["_PYTHON_HOST_PLATFORM"] == "linux-aarch64"
    folder = Path(seen["PYTHONPATH"])
    assert (folder / f"{seen['_PYTHON_SYSCONFIGDATA_NAME']}.py").is_file()
    assert (folder / "torch/__init__.py").is_file()


def test_a_platform_whose_headers_are_unknown_is_refused(build: dict[str, str]) -> None:
    command = ["bash", RECIPES / "common/build.sh"]
    done = subprocess.run(command, env={**build, "target_platform": "osx-64"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no folder of CUDA's headers known for osx-64" in done.stderr
