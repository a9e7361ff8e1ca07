"""A wheel as a conda package: where files go, what runs after moving, what the metadata says."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bridge_wheels import add_wheel
from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.fetch import cached_path
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge import package as packages
from ssm_forge.bridge.package import BridgePackage
from ssm_forge.bridge.pylock import LockedWheel
from ssm_forge.bridge.wheels import compile_bytecode, distributions, install_wheel, wheel_package
from ssm_forge.package.write import read_json

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"lib/python{PYTHON}/site-packages"

FILES = {
    "demo/__init__.py": "def main():\n    import sys\n    print('demo runs in', sys.prefix)\n",
    "demo/template.py": "this is {{ no }} python\n",
    "demo-1.5.data/scripts/demo-script": "#!python\nimport sys\nprint('script', sys.argv[1:])\n",
    "demo-1.5.data/data/share/demo/data.txt": "data\n",
    "demo-1.5.data/headers/demo.h": "#define DEMO\n",
    "demo-1.5.dist-info/entry_points.txt": "[console_scripts]\ndemo = demo:main\n",
    "demo-1.5.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "demo-1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: demo\nVersion: 1.5\nRequires-Dist: other>=1\n",
}


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path, cache=tmp_path / "cache")


def described(wheels: list[LockedWheel], place: Workspace, index: int = 0) -> BridgePackage:
    return wheel_package(
        wheels[index],
        distributions(wheels, place),
        python=PYTHON,
        interpreter=Path(sys.executable),
        cuda="13.0",
        workspace=place,
    )


@pytest.fixture
def demo(place: Workspace) -> BridgePackage:
    return described([add_wheel(place, "demo-1.5-py3-none-any.whl", FILES)], place)


@pytest.fixture
def staged(demo: BridgePackage, tmp_path: Path) -> Path:
    """The staged package with an interpreter beside its scripts, moved to another folder."""
    stage = tmp_path / "stage"
    stage.mkdir()
    demo.stage(stage)
    moved = tmp_path / "moved prefix"
    stage.rename(moved)
    (moved / "bin/python").symlink_to(sys.executable)
    return moved


@pytest.mark.parametrize(("script", "said"), [("demo", "demo runs in"), ("demo-script", "script ['a b']")])
def test_scripts_run_with_the_python_beside_them_wherever_the_prefix_is(staged: Path, script: str, said: str) -> None:
    outside = staged.parent / "link"
    outside.symlink_to(staged / "bin" / script)
    for command in (staged / "bin" / script, outside):
        done = subprocess.run(
            [command, "a b"],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(staged / SITE), "PATH": "/usr/bin:/bin"},
        )
        assert said in done.stdout, done.stderr
    assert str(staged.parent / "stage").encode() not in (staged / "bin" / script).read_bytes()


def test_data_and_headers_are_where_wheels_put_them(staged: Path) -> None:
    assert (staged / "share/demo/data.txt").read_text() == "data\n"
    assert (staged / f"include/python{PYTHON}/demo/demo.h").exists()
    assert (staged / SITE / "demo-1.5.dist-info/INSTALLER").read_text() == "ssm-forge\n"


def test_bytecode_is_valid_after_the_sources_times_changed(staged: Path) -> None:
    compiled = next((staged / SITE / "demo/__pycache__").glob("__init__.*.pyc"))
    before = compiled.read_bytes()
    script = "import demo, sys; print(demo.__cached__, demo.main.__code__.co_filename)"
    (staged / SITE / "demo/__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-v", "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(staged / SITE)}
    )
    assert str(compiled) in done.stdout
    assert f"matches {staged / SITE / 'demo/__init__.py'}" in done.stderr
    assert compiled.read_bytes() == before
    # PEP 552: flag bit 0 says hash-based, bit 1 (check the source) is off.
    assert int.from_bytes(before[4:8], "little") == 0b01
    assert b"stage" not in before
    assert not list((staged / SITE / "demo/__pycache__").glob("template.*"))


def test_bytecode_needs_a_python_that_runs(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        compile_bytecode(tmp_path / "nowhere", tmp_path, tmp_path)


def test_a_python_package_is_for_its_python(demo: BridgePackage) -> None:
    tag = PYTHON.replace(".", "")
    assert demo.depends == (f"python {PYTHON}.*", f"python_abi {PYTHON}.* *_cp{tag}")
    assert demo.build.startswith(f"py{tag}_h")
    assert demo.filename == f"demo-1.5-{demo.build}.conda"


def test_libraries_for_no_particular_python_are_shared_by_all(place: Workspace, tmp_path: Path) -> None:
    files = {
        "tool/data/libx.so": "elf",
        "tool-13.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tool\nVersion: 13.0\n",
        "tool-13.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n",
    }
    wheel = add_wheel(place, "tool-13.0-py3-none-manylinux_2_27_x86_64.whl", files)
    shared = described([LockedWheel("tool", "13.0", wheel.artifact)], place)
    assert (shared.noarch_python, shared.depends) == (True, ("python",))
    written = packages.write(shared, tmp_path / "channel", threads=1)
    index = read_json(written, "index.json")
    assert (index["noarch"], index["name"], index["version"]) == ("python", "tool", "13.0")
    paths = [entry["_path"] for entry in read_json(written, "paths.json")["paths"]]
    assert "site-packages/tool/data/libx.so" in paths


def test_a_wheel_that_changed_in_the_cache_is_not_packed(place: Workspace, tmp_path: Path) -> None:
    wheel = add_wheel(place, "demo-1.5-py3-none-any.whl", FILES)
    demo = described([wheel], place)
    with cached_path(wheel.artifact, place).open("ab") as stream:
        stream.write(b"tampered")
    with pytest.raises(IntegrityError):
        packages.write(demo, tmp_path / "channel", threads=1)
    assert list((tmp_path / "channel").rglob("*.conda")) == []
    assert not any((tmp_path / ".channel.work").iterdir())


def test_the_build_string_follows_the_content(place: Workspace) -> None:
    one = add_wheel(place, "demo-1.5-py3-none-any.whl", FILES)
    two = add_wheel(place, "demo-1.5-py3-none-any.whl", {**FILES, "demo/more.py": ""})
    assert described([one], place).build == described([one], place).build
    assert described([one], place).build != described([two], place).build


def test_packages_are_the_same_bytes_every_time(demo: BridgePackage, tmp_path: Path) -> None:
    first, second = (packages.write(demo, tmp_path / name, threads=1).read_bytes() for name in ("one", "two"))
    assert first == second


def test_run_exports_are_written(tmp_path: Path) -> None:
    exporting = BridgePackage("x", "1.0", ("a",), lambda folder: None, run_exports={"weak": ["y >=1"]})
    written = packages.write(exporting, tmp_path / "channel", threads=1)
    assert read_json(written, "run_exports.json") == {"weak": ["y >=1"]}
    assert [path.name for path in written.parent.iterdir()] == [exporting.filename]


def test_scratch_of_killed_runs_is_swept(tmp_path: Path) -> None:
    channel = tmp_path / "channel"
    (tmp_path / ".channel.work/torch-abc/stage").mkdir(parents=True)
    packages.sweep(channel)
    assert list((tmp_path / ".channel.work").iterdir()) == []


def test_bytecode_in_a_wheel_is_left_out_without_a_word(place: Workspace, tmp_path: Path) -> None:
    wheel = add_wheel(place, "demo-1.5-py3-none-any.whl", {**FILES, "demo/__pycache__/old.cpython-39.pyc": "old"})
    folder = tmp_path / "stage"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install_wheel(wheel, folder, PYTHON, place)
    assert (folder / SITE / "demo/__init__.py").is_file()
    assert not (folder / SITE / "demo/__pycache__").exists()
