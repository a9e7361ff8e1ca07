"""Environments that somebody has, made as people make them: kernels for their torch, and nothing else changes there.

One of them alone: ``./run test -- tests/end_to_end/test_existing_environments.py -k torch2.7 -s`` (``-s`` shows what
the commands print, and what each took).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from bridge_environment import installed, installed_from
from forge_run import ROWS, Forge, Outcome, Row, all_pass_but_the_gpu, fresh_forge
from ssm_forge.base.errors import MachineError
from ssm_forge.base.paths import workspace
from ssm_forge.bridge import interpreter as interpreters

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(10800)]

_IMPORTS = "import torch, selective_scan_cuda, causal_conv1d_cuda, mamba_ssm"


@dataclass(frozen=True)
class Case:
    """An environment with a torch of PyPI's.

    Attributes:
        torch: its release.
        python: minor version.
        maker: who makes the environment and installs into it; ``conda`` brings Python, and pip the rest.
        mamba: the release of mamba-ssm that fits.
        causal: that of causal-conv1d.
        archs: what is compiled for.
        named: the releases are older ones, which the user names.
        deps: what mamba-ssm imports; empty where the command is to install it.
        more: what this torch needs beside.
    """

    torch: str
    python: str
    maker: Literal["uv", "pip", "conda"]
    mamba: str
    causal: str = "1.7.0"
    archs: str = "9.0"
    named: bool = False
    deps: tuple[str, ...] = ("einops", "packaging", "transformers")
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = "-named" if self.named else ""
        return f"torch{self.torch}-python{self.python}-{self.maker}-sm{self.archs.replace('.', '')}{named}"

    @property
    def options(self) -> tuple[str, ...]:
        """Those of install-mamba, but for the environment's folder."""
        named = ("--mamba-ssm", self.mamba, "--causal-conv1d", self.causal) if self.named else ()
        return "--cuda-arch", self.archs, *named, "--json"

    def run(self, verb: str, prefix: Path, *words: str) -> None:
        """``pip VERB`` in the environment, or uv's."""
        python = str(prefix / "bin/python")
        if self.maker == "uv":
            command = [_uv(), "--cache-dir", str(prefix.parent / "uv"), "pip", verb, "--quiet", "--python", python]
        else:
            confirmed = ("--yes",) if verb == "uninstall" else ("--no-cache-dir",)
            # Without bytecode, as uv does it: what importing adds is then no change of ours.
            command = [python, "-B", "-m", "pip", verb, "--quiet", *confirmed]
            command += ["--no-compile"] if verb == "install" else []
        subprocess.run([*command, *words], check=True)


CASES = (
    Case("2.15.0", "3.13", "pip", "2.3.2.post1"),
    Case("2.0.1", "3.9", "uv", "2.3.1", deps=("einops", "packaging", "transformers<4.52"), more=("numpy<2",)),
    Case("2.7.1", "3.11", "uv", "2.3.1"),
    # What mamba-ssm imports is installed on request.
    Case("2.4.1", "3.10", "uv", "2.3.1", deps=(), more=("numpy<2.3",)),
    Case("2.8.0", "3.12", "conda", "2.3.1"),
    # Blackwell with a torch of CUDA 12: machine code from a newer ptxas.
    Case("2.8.0", "3.12", "uv", "2.3.1", archs="12.0"),
    Case("2.5.1", "3.12", "uv", "2.2.5", "1.5.2", named=True, deps=("einops", "packaging", "transformers<5")),
)


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """One kind of environment."""
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """One machine for all of them: what one torch had compiled, another of the same CUDA major may use."""
    with fresh_forge(Row("cu130", "3.12", "9.0", ""), tmp_path_factory.mktemp("logs")) as made:
        yield made


@pytest.fixture(scope="module")
def env(case: Case, forge: Forge) -> Iterator[Path]:
    """The environment, with its torch."""
    folder = forge.folder / "theirs"
    try:
        found = interpreters.find(case.python)
    except MachineError:
        pytest.skip(f"needs a Python {case.python} with headers")
    prefix = folder / "env"
    if case.maker == "conda":
        prefix = installed(interpreters.python_packages(found, [], workspace()), folder, "python")
        subprocess.run([prefix / "bin/python", "-B", "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    elif case.maker == "pip":
        subprocess.run([found.executable, "-m", "venv", prefix], check=True)
    else:
        subprocess.run([_uv(), "venv", "--quiet", "--python", found.executable, prefix], check=True)
    case.run("install", prefix, f"torch=={case.torch}", *case.deps, *case.more)
    yield prefix
    shutil.rmtree(folder)


def _uv() -> str:
    tool = shutil.which("uv", path=str(Path(sys.executable).parent))
    assert tool is not None, "the tools have uv"
    return tool


def hashes(root: Path) -> dict[str, str]:
    """Path -> sha256 of every file below a folder, or where a link leads to."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            with path.open("rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def timed(forge: Forge, *words: str) -> Outcome:
    """Run a command that must succeed; shows what it printed, and how long it took."""
    started = time.monotonic()
    done = forge(*words, timeout=10000)
    print(f"\n$ ./run {' '.join(words)}\n{done.stderr}{time.monotonic() - started:.1f} s")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_kernels_are_made_for_its_torch_and_come_and_go_alone(case: Case, env: Path, forge: Forge) -> None:
    before = hashes(env)
    words = ("install-mamba", "--prefix", str(env), *case.options)
    done = timed(forge, *words, *(() if case.deps else ("--with-deps",)))
    all_pass_but_the_gpu(done.json["verify"])
    assert {package["version"] for package in done.json["packages"]} == {case.causal, case.mamba}
    after = hashes(env)
    assert {path: after.get(path) for path in before} == before
    print(f"{len(before)} files unchanged, {len(after) - len(before)} new")
    added = [Path(path).parts for path in set(after) - set(before)]
    new = {parts[3].split("-")[0].split(".")[0] for parts in added if parts[2:3] == ("site-packages",)}
    ours = {"causal_conv1d", "causal_conv1d_cuda", "mamba_ssm", "selective_scan_cuda"}
    assert new == ours or (not case.deps and ours < new)
    assert forge.command(str(env / "bin/python"), "-B", "-c", _IMPORTS).returncode == 0
    case.run("check", env)
    assert timed(forge, *words).json["changed"] is False
    assert hashes(env) == after
    case.run("uninstall", env, "mamba-ssm", "causal-conv1d")
    left = hashes(env)
    assert {path: left.get(path) for path in before} == before
    # With --with-deps what mamba-ssm imports stays.
    assert set(left) == set(before) or not case.deps


def test_condas_torch_gets_conda_packages_and_all_else_stays(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its own channels are those that the environment is from; here their stand-ins."""
    row = ROWS["cu130-conda"]
    with fresh_forge(row, tmp_path_factory.mktemp("logs")) as forge:
        specs = (f"python {row.python}.*", "pytorch", "pip", "einops", "packaging", "transformers", "triton")
        env = installed_from(forge.channels, forge.folder / "theirs", *specs)
        before = hashes(env)
        words = ("install-mamba", "--prefix", str(env), "--cuda-arch", row.arch, "--json")
        done = timed(forge, *words)
        all_pass_but_the_gpu(done.json["verify"])
        after = hashes(env)
        assert {path: after.get(path) for path in before} == before
        print(f"{len(before)} files unchanged, {len(after) - len(before)} new")
        records = {path.rpartition("/")[2].rsplit("-", 2)[0] for path in set(after) - set(before) if ".json" in path}
        assert {"causal-conv1d", "mamba-ssm"} <= records
        assert forge.command(str(env / "bin/python"), "-B", "-c", _IMPORTS).returncode == 0
        assert forge.command(str(env / "bin/python"), "-B", "-m", "pip", "check").returncode == 0
        assert timed(forge, *words).json["changed"] is False
        assert hashes(env) == after
