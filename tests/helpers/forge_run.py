"""Runs ``./run`` as a user types it, in a copy of the checkout and with caches of the test run's own."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import real_pixi
import stand_in
from ssm_forge.base import owners
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.upkeep import tiers

ROOT = Path(__file__).parents[2]

_COMPILERS = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|cpp|clang|clang\+\+|as|ld)(-\d+|\..*)?")
_NOT_COPIED = shutil.ignore_patterns(".git", ".pixi", "__pycache__", ".*_cache")


def without_channel(root: Path, ignore: Callable[[str, list[str]], set[str]]) -> Callable[[str, list[str]], set[str]]:
    """What copying a checkout leaves out: what ``ignore`` says, and the folders at its top that packages go to."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        return ignore(folder, names) | ({"channel", "dist"} if Path(folder) == root else set())

    return left_out


@dataclass(frozen=True)
class Row:
    """What is built of a variant, and what must come out.

    Attributes:
        python: minor version, ``3.10``.
        arch: one compute capability, which keeps a whole build within a test run's time.
        mamba_ssm: the release that belongs to the variant.
        bare: whether the machine has no C++ compiler, so that one is brought along.
        source: of the packages; ``conda`` is a stand-in for the real channels.
    """

    variant: str
    python: str
    arch: str
    mamba_ssm: str
    bare: bool = False
    source: Literal["bridge", "conda"] = "bridge"

    @property
    def name(self) -> str:
        """``cu130``, or ``cu130-conda``."""
        return self.variant if self.source == "bridge" else f"{self.variant}-conda"

    @property
    def options(self) -> tuple[str, ...]:
        return ("--variant", self.variant, "--python", self.python, "--source", self.source)


ROWS = {
    row.name: row
    for row in (
        Row("cu118", "3.10", "8.0", "2.3.1", bare=True),
        Row("cu124", "3.12", "9.0", "2.3.1"),
        Row("cu130", "3.12", "9.0", "2.3.2.post1"),
        Row("cu130", "3.12", "9.0", "2.3.2.post1", bare=True, source="conda"),
        Row("cu118", "3.10", "8.0", "2.3.1", bare=True, source="conda"),
    )
}
_WANTED = os.environ.get(tiers.VARIANT_VARIABLE, "")
# The rows whose main job is run uncut; of the others only what sets them apart.
WHOLE = (
    tuple(ROWS) if os.environ.get("SSM_FORGE_TEST_ALL") else (tiers.variant_of_the_day(datetime.date.today(), _WANTED),)
)
OTHERS = tuple(name for name, row in ROWS.items() if name not in WHOLE and row.source == "bridge")


@dataclass(frozen=True)
class Outcome:
    """One finished command."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@dataclass(frozen=True)
class Forge:
    """A copy of the checkout with nothing built and empty caches; only downloads are shared, which go by their hash.

    Attributes:
        folder: holds all of it.
        logs: outlives it, for whoever asks why a test failed.
        path: the machine's PATH.
        channels: URLs of the channels, beside our own, that the row's packages come from.
        pixi: whether the machine has pixi.
    """

    folder: Path
    logs: Path
    path: str
    channels: tuple[str, ...]
    pixi: bool = False

    @property
    def root(self) -> Path:
        return self.folder / "checkout"

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root, self.folder / "cache")

    @property
    def channel(self) -> Path:
        return self.root / "channel"

    @property
    def environment(self) -> dict[str, str]:
        # No setting of the developer's gets in, but how to reach the registries.
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SSM_FORGE_") or k == "SSM_FORGE_MIRRORS"}
        folders = {"SSM_FORGE_CACHE_DIR": str(self.folder / "cache"), "SSM_FORGE_LOG_DIR": str(self.logs)}
        if self.pixi:
            # As users have it: one package cache for pixi and for us.
            kept = {k: v for k, v in kept.items() if not k.startswith(("PIXI_", "CONDA_", "PYTHON"))}
            if (program := real_pixi.backend()) is not None:
                kept["PIXI_BUILD_BACKEND_OVERRIDE"] = f"{program.name}={program}"
            folders = {"XDG_CACHE_HOME": str(self.folder / "cache"), "SSM_FORGE_LOG_DIR": str(self.logs)}
        door = {"PIXI_HOME": str(self.folder / "home")} if self.pixi else {"SSM_FORGE_NO_PIXI": "1"}
        return {**kept, **folders, **door, "COLUMNS": "200", "PATH": self.path}

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "run", *args],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            start_new_session=True,
        )

    def __call__(self, *args: str, timeout: float = 3000) -> Outcome:
        command = [self.root / "run", *args]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=timeout, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def command(self, *words: str, folder: Path | None = None) -> Outcome:
        """Any command on that machine, in the checkout or in another folder."""
        done = subprocess.run(
            words, capture_output=True, text=True, env=self.environment, cwd=folder or self.root, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def packages(self) -> set[str]:
        """Names of the packages in the channel."""
        return {path.name for path in self.channel.glob("linux-64/*.conda")}

    def listed(self) -> set[str]:
        """Names of the packages that the channel's index lists."""
        index = self.channel / "linux-64/repodata.json"
        return set(json.loads(index.read_text())["packages.conda"]) if index.exists() else set()

    def reproduces(self, project: str, *options: str) -> None:
        """The channel's one package of the project comes out again byte for byte."""
        (package,) = self.channel.glob(f"linux-64/{project}-*.conda")
        done = self("reproduce", str(package), *options, "--json")
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert done.json["reproduced"]


@contextmanager
def fresh_forge(row: Row, logs: Path, *, pixi: bool = False) -> Iterator[Forge]:
    """A machine on which nothing was built, with a copy of this checkout; removed afterwards, but for ``logs``.

    Args:
        pixi: whether it has pixi, which must be on this machine's PATH; else it has none.
    """
    # Beside the caches, so that environments are hard links and not copies.
    runs = workspace().cache / "test-runs"
    runs.mkdir(parents=True, exist_ok=True)
    _sweep(runs)
    folder = Path(tempfile.mkdtemp(prefix=f"{row.name}-", suffix=f"-{owners.mark()}", dir=runs))
    path = os.environ["PATH"]
    try:
        shutil.copytree(ROOT, folder / "checkout", ignore=without_channel(ROOT, _NOT_COPIED))
        (folder / "checkout/.pixi").mkdir()
        (folder / "checkout/.pixi/tools").symlink_to(ROOT / ".pixi/tools")
        workspace().downloads.mkdir(parents=True, exist_ok=True)
        for cache in ("cache/ssm-forge" if pixi else "cache", "stand-in"):
            (folder / cache).mkdir(parents=True)
            (folder / cache / "downloads").symlink_to(workspace().downloads)
        channels: tuple[str, ...] = (Workspace(folder, folder / "cache").bridge.joinpath(row.variant).as_uri(),)
        with ExitStack() as stack:
            if row.source == "conda":
                made = stand_in.served(
                    row.variant, row.python, folder / "checkout", folder / "stand-in", archs=row.arch, tools=pixi
                )
                channels = stack.enter_context(made).channels
                # The user's own settings, for the workspace in recipes/ too.
                (folder / "home").mkdir()
                shutil.copy(folder / "checkout/.pixi/config.toml", folder / "home")
            if row.bare:
                path = str(_without_compilers(folder / "bin"))
            forge = Forge(folder, logs, path, channels, pixi)
            if row.source == "conda":
                # The repository's locks are of the real channels.
                for command in ([("pixi", "lock")] if pixi else []) + [(str(forge.root / "run"), "lock")]:
                    locked = forge.command(*command)
                    assert locked.returncode == 0, locked.stderr
            yield forge
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(runs: Path) -> None:
    """Remove what killed test runs left: each is about 15 GB."""
    for folder in runs.iterdir():
        if owners.gone(folder.name) or owners.forgotten(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _without_compilers(folder: Path) -> Path:
    """Everything on PATH but compilers, assemblers and linkers."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for tool in sorted(Path(place).glob("*")):
            if not _COMPILERS.fullmatch(tool.name) and not (folder / tool.name).is_symlink():
                (folder / tool.name).symlink_to(tool)
    left = {tool.name for tool in folder.iterdir()}
    assert not left & {"gcc", "g++", "cc", "c++", "as", "ld", "g++-12"}
    assert {"bash", "env"} <= left
    return folder


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in report["checks"]}


def all_pass_but_the_gpu(report: dict[str, Any]) -> None:
    """Every check passed, a dozen at least; the one that needs a GPU may have found none."""
    found = statuses(report)
    assert found.pop("kernels on the GPU", "not-run") in ("not-run", "pass")
    assert len(found) >= 12
    assert set(found.values()) == {"pass"}, report


def require_sound_toolchain(done: Outcome, row: Row) -> None:
    """`check-toolchain --json` passed every check; cu118 is the classic toolchain to the letter."""
    assert done.returncode == 0, done.stdout + done.stderr
    details = {check["name"]: check["detail"] for check in done.json["checks"]}
    assert set(statuses(done.json).values()) == {"pass"}
    if row.variant == "cu118":
        assert details["nvcc"] == "release 11.8, V11.8.89"
        assert re.match(r"11\.\d+\.\d+ \(", details["g++"])
        assert re.match(r"8\.9\.\d+ \(.*/include/cudnn_version\.h\)", details["cuDNN"])


def pytest_for(prefix: Path, folder: Path) -> Path:
    """Install pytest and matplotlib, in the tools' versions, beside an environment that lacks them.

    What the environment has itself is left out: that is what is tested.
    """
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert uv is not None, "the tools have uv"
    locked = (ROOT / "scripts/requirements.lock").read_text(encoding="utf-8")
    constraints = folder.with_suffix(".txt")
    constraints.write_text("\n".join(re.findall(r"^([\w.-]+==[^\\\n]+)", locked, re.MULTILINE)))
    command = [uv, "pip", "install", "--quiet", "--python", prefix / "bin/python", "--target", folder]
    subprocess.run([*command, "pytest", "matplotlib", "--constraint", constraints], check=True)
    (site_packages,) = prefix.glob("lib/python*/site-packages")
    for double in [path for path in folder.iterdir() if (site_packages / path.name).is_dir() and path.is_dir()]:
        shutil.rmtree(double)
    return folder
