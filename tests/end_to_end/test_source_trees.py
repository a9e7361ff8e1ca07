"""Source trees, compiled for real: a small extension in the shape of the forks, and what a setup.py may not do."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_run import ROWS, Forge, Outcome, fresh_forge
from small_tree import small_tree
from ssm_forge.base.arch import ArchList
from ssm_forge.base.files import sha256_of
from ssm_forge.bridge import interpreter as interpreters
from ssm_forge.package import libraries, read, read_wheel

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    with fresh_forge(ROWS["cu130"], tmp_path_factory.mktemp("logs")) as made:
        yield made


def build(forge: Forge, tree: Path, *options: str) -> Outcome:
    return forge("build", "--source-tree", str(tree), *ROWS["cu130"].options, "--cuda-arch", "9.0", *options)


def test_a_small_fork_becomes_a_package_and_a_wheel_for_what_was_asked_for_the_same_from_any_folder(
    forge: Forge, tmp_path: Path
) -> None:
    done = build(forge, small_tree(tmp_path / "one" / "SmallScan"), "--format", "both", "--json")
    assert done.returncode == 0, done.stderr
    (package,), (wheel,) = map(Path, done.json["files"]), map(Path, done.json["wheels"])
    assert [planned["name"] for planned in done.json["packages"]] == ["small-scan"]
    provenance = read.provenance(package)
    assert provenance["tree"]["origin"] == "SmallScan"
    assert provenance["cuda_arch_list"] == "9.0"
    assert f"+cu130torch2.11.tree{provenance['tree']['sha256'][:8]}-" in wheel.name
    assert wheel.parent.name == read_wheel.inspect(wheel).page == "cu130-torch211-trees"
    first = {path.name: sha256_of(path) for path in (package, wheel)}
    package.unlink()
    shutil.rmtree(wheel.parent)
    again = build(forge, small_tree(tmp_path / "another" / "SmallScan"), "--format", "both", "--json")
    assert again.returncode == 0, again.stderr
    assert {path.name: sha256_of(path) for path in (package, wheel)} == first


def test_its_kernels_load_in_an_environment_beside_its_torch(forge: Forge, tmp_path: Path) -> None:
    tree = small_tree(tmp_path / "SmallScan")
    prefix = forge.folder / "prefix"
    where = (*ROWS["cu130"].options, "--cuda-arch", "9.0", "--prefix", str(prefix))
    done = forge("install-mamba", "--source-tree", str(tree), *where)
    assert done.returncode == 0, done.stderr
    asked = forge.command(
        str(prefix / "bin/python"), "-c", "import torch, small_scan_cuda as s; print(s.scan.__name__)"
    )
    assert (asked.returncode, asked.stdout) == (0, "scan\n"), asked.stderr
    (library,) = prefix.glob("lib/python*/site-packages/small_scan_cuda.*.so")
    assert libraries.gpu_code(library) == ArchList.parse("9.0")


def test_its_kernels_load_in_an_environment_that_somebody_has_beside_the_torch_there(
    forge: Forge, tmp_path: Path
) -> None:
    env = forge.folder / "theirs"
    python = str(env / "bin/python")
    subprocess.run([interpreters.find(ROWS["cu130"].python).executable, "-m", "venv", env], check=True)
    torch = (python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "torch==2.11.0", "einops")
    subprocess.run(torch, check=True)
    tree = small_tree(tmp_path / "SmallScan")
    done = forge("install-mamba", "--source-tree", str(tree), "--prefix", str(env), "--cuda-arch", "9.0")
    assert done.returncode == 0, done.stderr
    asked = forge.command(python, "-c", "import torch, small_scan_cuda as s; print(s.scan.__name__)")
    assert (asked.returncode, asked.stdout) == (0, "scan\n"), asked.stderr
    assert forge.command(python, "-m", "pip", "check").returncode == 0


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ("urllib.request.urlopen('https://example.org/small.whl'); return", "downloads from example.org instead of"),
        ("open('/var/tmp/of-a-small-scan', 'w')", "outside of its folder"),
        ("self.distribution.ext_modules = []", "compiled no CUDA source"),
    ],
)
def test_a_setup_py_that_does_something_else_than_compile_here_is_refused(
    forge: Forge, tmp_path: Path, first: str, words: str
) -> None:
    before = forge.packages()
    done = build(forge, small_tree(tmp_path / "Other", first))
    assert done.returncode == 7, done.stderr
    assert words in done.stderr.replace("\n", " ")
    assert forge.packages() == before
    assert not Path("/var/tmp/of-a-small-scan").exists()
