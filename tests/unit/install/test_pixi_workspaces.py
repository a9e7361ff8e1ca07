"""The real pixi in recipes/ and in workspaces of users, with recipes that take a second to build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import real_pixi
from conda_channel import index, make_package
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import BuildError, ForgeError, IntegrityError, NetworkError, VerifyError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import open_log
from ssm_forge.build import origin as build_origin
from ssm_forge.flow import pixi_kernels, planning
from ssm_forge.flow.pixi_kernels import Kept
from ssm_forge.flow.plan import Options
from ssm_forge.install import pixi
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.package import libraries as elf
from ssm_forge.solve import lock, pixi_export
from toy_clone import Clone, clone, edited

__all__ = ["clone"]

pytestmark = [
    real_pixi.needs_pixi,
    pytest.mark.skipif(real_pixi.backend() is None, reason="needs pixi's build backend on PATH or beside pixi"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]


@pytest.fixture
def place(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A clone whose commands were started by pixi, on a machine without a GPU; its server has one more package."""
    served = clone.home.parent / "served"
    make_package(served, "other", {"share/other.txt": "other\n"})
    index(served)
    assert real_pixi.PIXI is not None
    backend = real_pixi.backend()
    for name in [name for name in os.environ if name.startswith(("PIXI_PROJECT", "PIXI_ENV", "CONDA_", "SSM_FORGE_"))]:
        monkeypatch.delenv(name)
    settings = {
        "PIXI_EXE": real_pixi.PIXI,
        "PIXI_CACHE_DIR": str(clone.home / "pixi-cache"),
        "PIXI_BUILD_BACKEND_OVERRIDE": f"pixi-build-rattler-build={backend}",
        "XDG_CONFIG_HOME": str(clone.home),
        "SSM_FORGE_CCACHE": "off",
        # conda-forge's package of the backend brings patchelf along.
        "PATH": f"{Path(real_pixi.PIXI).parent}:{os.environ['PATH']}:{Path(sys.executable).parent}",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pixi, "machine_virtual_packages", virtual_packages)
    monkeypatch.setattr(elf, "gpu_code", lambda path: ArchList.parse("8.0;9.0+PTX"))
    return clone.place


def choose(place: Workspace) -> Kept | None:
    return pixi_kernels.choose(Options(), planning.choose(Options(), place), place)


def install(place: Workspace) -> Path:
    """What install-mamba does but for the verification; the environment."""
    kept = choose(place)
    assert kept is not None
    with open_log(place.logs, "test") as log:
        assert pixi_kernels.install_kept(kept, place, log)
    return kept.prefix


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CONDA_OVERRIDE_CUDA": "13.0"}
    return subprocess.run(["pixi", *words], cwd=folder, env=env, capture_output=True, text=True, check=False)


def do(folder: Path, *words: str) -> None:
    done = run(folder, *words)
    assert done.returncode == 0, f"pixi {' '.join(words)}: {done.stderr[-3000:]}"


def made(prefix: Path) -> dict[str, int]:
    """Which kernels are there, and when each was built."""
    found = {name: prefix / f"share/{name}.txt" for name in PROJECTS}
    return {name: path.stat().st_mtime_ns for name, path in found.items() if path.exists()}


def test_the_kernels_stay_whatever_pixi_does_to_its_environment(place: Workspace) -> None:
    prefix = install(place)
    first = made(prefix)
    assert list(first) == list(PROJECTS)
    for words in (
        ["add", "--feature", "cu130", "other"],
        ["install", "-e", "cu130"],
        ["update", "-e", "cu130"],
        ["reinstall", "-e", "cu130", "other"],
        ["remove", "--feature", "cu130", "other"],
    ):
        do(place.recipes, *words)
        do(place.recipes, "install", "-e", "cu130")
        assert (prefix / "share/other.txt").exists() is (words[0] != "remove")
        assert made(prefix) == first, words
    do(place.recipes, "reinstall", "-e", "cu130", "mamba-ssm")
    assert list(made(prefix)) == list(PROJECTS)


def test_without_a_network_what_pixi_installed_stays_and_another_clone_gets_the_same_packages(
    place: Workspace, clone: Clone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = install(place)
    before = made(prefix)
    monkeypatch.setattr(build_origin, "conda_reachable", lambda: False)
    assert choose(place) is not None
    words = ["unshare", "-rn", "pixi", "install", "--locked", "-e", "cu130"]
    told = {**os.environ, "CONDA_OVERRIDE_CUDA": "13.0"}
    done = subprocess.run(words, cwd=place.recipes, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert made(prefix) == before
    # Of pixi's downloads everything is kept that the own engine builds with.
    again = clone.copy(tmp_path / "again")
    assert choose(again.place) is None
    (place.cache / "rattler").symlink_to(clone.home / "pixi-cache")
    code, said = again(archs="8.0;9.0+PTX", offline=True)
    assert code == 0, said
    assert len(again.packages()) == 2
    assert again.packages() == clone.packages()


@pytest.mark.parametrize("origin", ["channel", "path", "git"])
def test_an_exported_workspace_has_the_kernels(origin: pixi_export.Origin, place: Workspace, tmp_path: Path) -> None:
    install(place)
    if origin == "git":
        for words in (
            ["init", "-q"],
            ["add", "."],
            ["-c", "user.name=t", "-c", "user.email=t@x", "commit", "-qm", "x"],
        ):
            subprocess.run(["git", "-C", str(place.root), *words], check=True)
    mine = tmp_path / "mine"
    written = pixi_export.write(mine, "cu130", origin, place, git=place.root.as_uri() if origin == "git" else "")
    if not written.locked:
        do(mine, "lock")
    do(mine, "install", "--locked")
    assert list(made(mine / ".pixi/envs/default")) == list(PROJECTS)
    built = (mine / ".pixi/bld").exists()
    assert built is (origin != "channel")
    # They stay when something else comes.
    before = made(mine / ".pixi/envs/default")
    do(mine, "add", "other")
    assert made(mine / ".pixi/envs/default") == before


def test_pixi_add_takes_them_from_the_channels_folder(place: Workspace, tmp_path: Path) -> None:
    install(place)
    do(tmp_path, "init", "mine", "--channel", place.channel.as_uri(), "--channel", "conda-forge")
    mine = tmp_path / "mine"
    do(mine, "add", "mamba-ssm", "causal-conv1d")
    assert list(made(mine / ".pixi/envs/default")) == list(PROJECTS)
    # By a path from the workspace, where the two are near each other.
    assert "root/channel/linux-64/mamba-ssm-1.0-" in (mine / "pixi.lock").read_text()


def refused(place: Workspace) -> ForgeError:
    with pytest.raises(ForgeError) as error:
        install(place)
    assert not (place.channel / "linux-64").exists()
    return error.value


def test_the_lock_of_a_channel_that_we_indexed_is_pixis_to_the_byte(place: Workspace) -> None:
    """Indexes of our engine say more of a package than pixi's lock has."""
    ours = place.lock.read_bytes()
    place.lock.unlink()
    do(place.root, "lock")
    assert place.lock.read_bytes() == ours


class TestBadInput:
    def test_a_recipe_that_changed_after_the_lock_is_named_and_pixi_refuses_it_too(self, place: Workspace) -> None:
        path = place.recipes / "mamba-ssm/recipe.yaml"
        path.write_text(path.read_text().replace("run: [base, python]", "run: [base, python, other]"))
        error = refused(place)
        assert isinstance(error, VerifyError)
        assert "environment cu130: mamba-ssm: its recipe needs 'other', the lock does not" in error.what
        assert error.fix == "Run './run lock'."
        done = run(place.recipes, "install", "--locked", "-e", "cu130")
        assert done.returncode != 0
        assert "lock" in done.stderr

    def test_a_patch_that_changed_after_the_lock_is_built(self, place: Workspace) -> None:
        first = made(install(place))
        (place.patches / "torch/0001-x.patch").touch()
        second = made(install(place))
        assert all(second[name] > first[name] for name in PROJECTS)

    def test_a_lock_edited_by_hand_is_refused_by_the_package(self, place: Workspace) -> None:
        edited(place, "tool")
        error = refused(place)
        assert isinstance(error, IntegrityError), error
        assert "tool-3.12.1-h1_0.conda is not the package that is locked: sha256 " in error.what
        assert "Write the locks anew" in error.fix

    def test_a_toolchain_package_that_is_gone_is_named(self, place: Workspace) -> None:
        (place.root.parent / "served/linux-64/tool-3.12.1-h1_0.conda").unlink()
        error = refused(place)
        assert isinstance(error, NetworkError), error
        assert "tool-3.12.1-h1_0.conda, which is locked, can't be had" in error.what
        assert "Write the locks anew" in error.fix

    def test_a_build_that_fails_has_the_hint_for_the_compilers_last_words(self, place: Workspace) -> None:
        with (place.recipes / "common/build.sh").open("a") as script:
            script.write('echo "nvcc error: cicc died due to signal 9 (Kill signal)" >&2\nexit 1\n')
        error = refused(place)
        assert isinstance(error, BuildError), error
        assert error.fix == "The compiler ran out of memory: use --jobs 1."
        assert error.log is not None

    def test_with_no_backend_to_be_had_the_own_engine_is_told_to_do_it(
        self, place: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv("PIXI_BUILD_BACKEND_OVERRIDE")
        kept = choose(place)
        assert kept is not None
        with open_log(place.logs, "test") as log:
            assert not pixi_kernels.install_kept(kept, place, log)
        assert "the own engine does it" in " ".join(capsys.readouterr().err.split())
        # The check of the lock needs none.
        assert lock.check(manifest.load(place.source_manifest), place.source_lock)["cu130"] == []
