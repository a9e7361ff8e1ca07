"""Environments that somebody has, made as people make them: kernels for their torch, and nothing else changes there."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridge_environment import installed
from forge_run import Forge, Row, all_pass_but_the_gpu, fresh_forge
from ssm_forge.base.errors import MachineError
from ssm_forge.base.paths import workspace
from ssm_forge.bridge import interpreter as interpreters

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(7200)]


@dataclass(frozen=True)
class Case:
    """An environment.

    Attributes:
        wants: what is installed into it, beside what mamba-ssm imports.
        deps: what mamba-ssm imports; empty where the command is to install it.
        archs: what is compiled for.
        mamba: the release that fits.
        conda: whether its Python is a conda package.
    """

    python: str
    wants: tuple[str, ...]
    deps: tuple[str, ...]
    archs: str
    mamba: str
    conda: bool = False

    def __str__(self) -> str:
        return f"py{self.python}-{self.wants[0]}{'-conda' if self.conda else ''}"


_DEPS = ("einops", "packaging", "transformers")
CASES = (
    Case("3.13", ("torch==2.15.0",), _DEPS, "9.0", "2.3.2.post1"),
    Case("3.11", ("torch==2.7.1",), _DEPS, "9.0", "2.3.1"),
    # With a torch of CUDA 12 Blackwell's code comes from a newer ptxas.
    Case("3.10", ("torch==2.4.1", "numpy<2.3"), (), "9.0;12.0", "2.3.1"),
    Case("3.10", ("torch==2.0.1", "numpy<2"), ("einops", "packaging", "transformers<4.52"), "8.0", "2.3.1"),
    Case("3.9", ("torch==2.1.2", "numpy<2"), ("einops", "packaging", "transformers<5"), "9.0", "2.3.1"),
    Case("3.12", ("torch==2.8.0",), _DEPS, "9.0", "2.3.1", conda=True),
)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """One machine for all of them."""
    with fresh_forge(Row("cu130", "3.12", "9.0", ""), tmp_path_factory.mktemp("logs")) as made:
        yield made


@pytest.fixture(scope="module")
def env(case: Case, forge: Forge) -> Iterator[Path]:
    folder = forge.folder / "theirs"
    try:
        found = interpreters.find(case.python)
    except MachineError:
        pytest.skip(f"needs a Python {case.python} with headers")
    if case.conda:
        prefix = installed(interpreters.python_packages(found, [], workspace()), folder, "python")
    else:
        prefix = folder / "env"
        subprocess.run([found.executable, "-m", "venv", prefix], check=True)
    uv("install", prefix, *case.wants, *case.deps)
    yield prefix
    shutil.rmtree(folder)


def uv(command: str, prefix: Path, *words: str) -> None:
    tool = shutil.which("uv", path=str(Path(sys.executable).parent))
    assert tool is not None, "the tools have uv"
    subprocess.run([tool, "pip", command, "--quiet", "--python", str(prefix / "bin/python"), *words], check=True)


def hashes(root: Path) -> dict[str, str]:
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(root))] = f"-> {path.readlink()}"
        elif path.is_file():
            with path.open("rb") as stream:
                digest = hashlib.sha256()
                while block := stream.read(1 << 20):
                    digest.update(block)
            found[str(path.relative_to(root))] = digest.hexdigest()
    return found


def test_the_kernels_are_made_for_its_torch_and_come_and_go_alone(case: Case, env: Path, forge: Forge) -> None:
    before = hashes(env)
    words = ("install-mamba", "--prefix", str(env), "--cuda-arch", case.archs, "--json")
    done = forge(*words, *(() if case.deps else ("--with-deps",)), timeout=7000)
    assert done.returncode == 0, done.stderr[-3000:]
    all_pass_but_the_gpu(done.json["verify"])
    assert {package["version"] for package in done.json["packages"]} == {"1.7.0", case.mamba}
    after = hashes(env)
    assert {path: after.get(path) for path in before} == before
    added = [Path(path).parts for path in set(after) - set(before)]
    new = {parts[3].split("-")[0].split(".")[0] for parts in added if parts[2:3] == ("site-packages",)}
    ours = {"causal_conv1d", "causal_conv1d_cuda", "mamba_ssm", "selective_scan_cuda"}
    assert new == ours or (not case.deps and ours < new)
    code = "import torch, selective_scan_cuda, causal_conv1d_cuda, mamba_ssm"
    assert forge.command(str(env / "bin/python"), "-B", "-c", code).returncode == 0
    uv("check", env)
    again = forge(*words)
    assert again.returncode == 0, again.stderr
    assert again.json["changed"] is False
    assert hashes(env) == after
    uv("uninstall", env, "mamba-ssm", "causal-conv1d")
    assert {path: digest for path, digest in hashes(env).items() if path in before} == before
    if case.deps:
        assert set(hashes(env)) == set(before)
