"""What only pixi itself can show: its lock is ours, and its way of starting tasks is known. Skips where it is not."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conda_channel import holds, index, make_package
from real_pixi import PIXI, needs_pixi
from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import NetworkError, UsageError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.base.ui import open_log
from ssm_forge.build.request import BuildRequest
from ssm_forge.flow import pipeline, pixi_kernels, planning
from ssm_forge.flow.plan import Plan, PlannedPackage
from ssm_forge.install import marker, pixi, registry
from ssm_forge.manifest import variants
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.recipe import EXTENSIONS, PROJECTS, Rendered
from ssm_forge.manifest.variants import Variant
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.package import libraries as elf
from ssm_forge.solve import lock as locks
from ssm_forge.solve import pixi_export

ROOT = Path(__file__).resolve().parents[3]
SNAPSHOT = ROOT.parent / "shared" / "conda-snapshot"


pytestmark = needs_pixi


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pixi's own folders, away from the user's."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("HOME", "PIXI_HOME", "PIXI_CACHE_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(folder))
    for name in [name for name in os.environ if name.startswith(("PIXI_PROJECT", "PIXI_ENV", "CONDA_"))]:
        monkeypatch.delenv(name)
    return folder


@pytest.fixture
def backend(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that builds recipes for pixi, which would look for it in the channels of the workspace."""
    program = shutil.which("pixi-build-rattler-build")
    if program is None:
        pytest.skip("needs pixi-build-rattler-build on PATH")
    monkeypatch.setenv("PIXI_BUILD_BACKEND_OVERRIDE", f"pixi-build-rattler-build={program}")
    # conda-forge's package of it brings patchelf along.
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{Path(sys.executable).parent}")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of a server of ``folder``, which is gone afterwards."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def recorded(home: Path) -> Iterator[Path]:
    """pixi's configuration with the recorded channels as mirrors of the real ones."""
    if not SNAPSHOT.exists():
        pytest.skip("needs the recorded conda repodata beside the checkout")
    with served(SNAPSHOT) as address:
        lines = [
            f'"https://conda.anaconda.org/{channel}" = ["{address}/{channel}"]'
            for channel in ("conda-forge", "nvidia/label/cuda-11.8.0", "pytorch")
        ]
        (home / "config.toml").write_text("\n".join(["[mirrors]", *lines, ""]))
        yield home


@pytest.mark.shared
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("recorded")
def test_the_lock_that_pixi_writes_is_ours_to_the_byte(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pixi.toml", tmp_path)
    done = subprocess.run(["pixi", "lock"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARN" not in done.stderr
    assert (tmp_path / "pixi.lock").read_bytes() == (ROOT / "pixi.lock").read_bytes()


@pytest.mark.shared
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("recorded", "backend")
def test_the_lock_of_the_kernels_is_ours_to_the_byte(tmp_path: Path) -> None:
    for name in ("recipes", "patches"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("pixi.lock", ".pixi", "__pycache__")
        )
    done = subprocess.run(["pixi", "lock"], capture_output=True, text=True, cwd=tmp_path / "recipes", check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "recipes/pixi.lock").read_bytes() == (ROOT / "recipes/pixi.lock").read_bytes()


@pytest.mark.shared
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("recorded", "backend")
def test_an_exported_workspace_is_locked_as_pixi_locks_it(tmp_path: Path) -> None:
    """From the recipes; one from git is locked by pixi to a commit, with the same compilers."""
    root = tmp_path / "checkout"
    for name in ("recipes", "patches"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".pixi", "__pycache__", "bridge"))
    place = Workspace(root, tmp_path / "cache")
    pixi_export.write(tmp_path / "mine", "cu130", "path", place)
    text = (tmp_path / "mine/pixi.lock").read_bytes()
    done = subprocess.run(["pixi", "lock"], capture_output=True, text=True, cwd=tmp_path / "mine", check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine/pixi.lock").read_bytes() == text
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@x", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    pixi_export.write(tmp_path / "cloned", "cu130", "git", place, git=root.as_uri())
    done = subprocess.run(["pixi", "lock"], capture_output=True, text=True, cwd=tmp_path / "cloned", check=False)
    assert done.returncode == 0, done.stderr
    head = subprocess.check_output(["git", "-C", str(root), "rev-parse", "HEAD"], text=True).strip()
    cloned = locks.environment(tmp_path / "cloned/pixi.lock", "default").sources
    assert all(source.location.startswith("git+file://") and source.location.endswith(head) for source in cloned)
    assert [[r.url for r in s.build] for s in cloned] == [
        [r.url for r in s.build] for s in locks.environment(place.source_lock, "cu130").sources
    ]


@pytest.fixture
def toy(tmp_path: Path, home: Path, backend: None) -> Path:
    """A checkout with the kernels' own pixi manifests and recipes that only write a file; returns its recipes/."""
    recipes = tmp_path / "recipes"
    index_of = {"info": {"subdir": "noarch"}, "packages": {}, "packages.conda": {}, "repodata_version": 1}
    for project in PROJECTS:
        for folder in (
            recipes / project,
            recipes / "common",
            tmp_path / "patches/torch",
            tmp_path / "patches" / project,
        ):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "recipes" / project / "pixi.toml", recipes / project)
        (recipes / project / "recipe.yaml").write_text(
            f"schema_version: 1\npackage: {{name: {project}, version: '1.0'}}\n"
            "build:\n  string: ${{ row }}_h${{ hash }}_1\n  script: {file: ../common/build.sh}\n"
        )
    (recipes / "common/build.sh").write_text(
        'mkdir -p "$PREFIX/share"\nfind "$RECIPE_DIR/../../patches" -type f >"$PREFIX/share/$PKG_NAME.txt"\n'
        'echo "$row" >>"$PREFIX/share/$PKG_NAME.txt"\n'
    )
    for part in ("linux-64", "noarch"):
        (tmp_path / "channel" / part).mkdir(parents=True)
        (tmp_path / "channel" / part / "repodata.json").write_text(json.dumps(index_of))
    manifest(recipes, tmp_path / "channel", row="first")
    return recipes


def manifest(recipes: Path, channel: Path, *, row: str) -> None:
    sources = "".join(f'{project} = {{ path = "{project}" }}\n' for project in PROJECTS)
    (recipes / "pixi.toml").write_text(
        f'[workspace]\nname = "x"\nchannels = ["{channel.as_uri()}"]\npreview = ["pixi-build"]\n'
        'platforms = [{ name = "gpu", platform = "linux-64", cuda = "13.0", glibc = "2.28" }]\n'
        f'[workspace.target.gpu.build-variants]\nrow = ["{row}"]\n'
        f'[feature.cu130]\nplatforms = ["gpu"]\n[feature.cu130.dependencies]\n{sources}'
        "[environments]\ncu130 = { features = ['cu130'], no-default-feature = true }\n"
    )


def pixi_install(recipes: Path, *words: str) -> dict[str, tuple[int, str]]:
    """Install, and say of each project's file when it was made and what is in it."""
    env = {**os.environ, "CONDA_OVERRIDE_CUDA": "13.0"}
    command = ["pixi", "install", "-e", "cu130", *words]
    done = subprocess.run(command, cwd=recipes, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = {project: recipes / f".pixi/envs/cu130/share/{project}.txt" for project in PROJECTS}
    return {project: (path.stat().st_mtime_ns, path.read_text()) for project, path in files.items()}


@pytest.mark.timeout(300)
def test_a_change_of_what_recipes_share_or_of_their_patches_is_built_and_nothing_else_is(toy: Path) -> None:
    first = pixi_install(toy)
    assert pixi_install(toy, "--locked") == first
    (toy.parent / "patches/mamba-ssm/0001-x.patch").touch()
    second = pixi_install(toy, "--locked")
    assert second["causal-conv1d"] == first["causal-conv1d"]
    assert "0001-x.patch" in second["mamba-ssm"][1]
    for name in ("recipes/common/new.py", "patches/torch/0001-y.patch"):
        (toy.parent / name).touch()
        third = pixi_install(toy, "--locked")
        assert all(third[project][0] > second[project][0] for project in PROJECTS)
        second = third


@pytest.mark.timeout(300)
def test_what_it_built_gets_into_the_channel_finished_and_a_second_folder_gives_the_same_bytes(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc on this machine to make a library with")
    assert PIXI is not None
    monkeypatch.setenv("PIXI_EXE", PIXI)
    monkeypatch.setenv("SSM_FORGE_CCACHE", "off")
    monkeypatch.setattr(pixi, "machine_virtual_packages", virtual_packages)
    monkeypatch.setattr(elf, "gpu_code", lambda path: ArchList.parse("8.0"))
    extensions = "; ".join(f"{project}) name={extension} ;" for project, extension in EXTENSIONS.items())
    with (toy / "common/build.sh").open("a") as script:
        script.write(
            f'case "$PKG_NAME" in {extensions} esac\nsite="$PREFIX/lib/python3.12/site-packages"\nmkdir -p "$site"\n'
            # As the kernels' script does: the folder of a build would be in the build ID.
            "unset LD_RUN_PATH\n"
            'echo "int f(void) { return 0; }" | gcc -shared -fPIC -x c - -o "$site/$name.so.x.so"\n'
        )
    made = []
    for folder in (toy, Path(shutil.copytree(toy.parent, tmp_path / "second", ignore=_own_and_built)) / "recipes"):
        subprocess.run(["pixi", "lock"], cwd=folder, check=True, capture_output=True)
        place = Workspace(folder.parent, tmp_path / "cache")
        row = {"row": "first", "forge_variant": "cu130", "forge_source": "conda", "cuda_compiler_version": "13.0"}
        python = {"python": "3.12.* *_cpython", "cxx_compiler_version": "14", "cuda_arch_list": "8.0"}
        locked = locks.environment(place.source_lock, "cu130")
        prefix = place.source_envs / "cu130"
        kept = pixi_kernels.Kept(locked, BuildKey.from_settings({**row, **python}), prefix)
        with open_log(place.logs, "test") as log:
            assert pixi_kernels.install_kept(kept, place, log)
        packages = sorted((folder.parent / "channel/linux-64").glob("*.conda"))
        made.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in packages})
        assert len(packages) == 2
        assert registry.installed_prefixes(place) == [prefix]
    assert made[0] == made[1]


def _own_and_built(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in (".pixi", "home", "second", "cache")}


@pytest.mark.timeout(300)
def test_a_changed_row_of_the_matrix_is_built(toy: Path) -> None:
    assert pixi_install(toy)["mamba-ssm"][1].endswith("first\n")
    manifest(toy, toy.parent / "channel", row="second")
    assert pixi_install(toy)["mamba-ssm"][1].endswith("second\n")


@pytest.fixture
def checkout(tmp_path: Path, home: Path) -> Path:
    """A checkout whose tools are those that run the tests, so that pixi has nothing to install."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run", root)
    tasks = re.search(r"^\[tasks\]\n(?:\S.*\n)+", (ROOT / "pixi.toml").read_text(), re.MULTILINE)
    assert tasks is not None
    workspace = '[workspace]\nname = "x"\nchannels = []\nplatforms = ["linux-64"]\n'
    (root / "pixi.toml").write_text(f"{workspace}{tasks.group(0)}")
    return root


@pytest.mark.parametrize("front_door", ["./run", "pixi run"])
def test_arguments_and_relative_paths_arrive(checkout: Path, tmp_path: Path, front_door: str) -> None:
    python = tmp_path / "an env/bin/python"
    python.parent.mkdir(parents=True)
    (tmp_path / "an env/conda-meta").mkdir()
    python.write_text('#!/bin/bash\nprintf "%s|" "$PWD" "$@"\n')
    python.chmod(0o755)
    words = ["$HOME `id` \\", 'b"c' if front_door == "./run" else "b", "new\nline", ""]
    start = ["pixi", "run", "--manifest-path", str(checkout / "pixi.toml")]
    if front_door == "./run":
        start = [str(checkout / "run")]
        words += ["it's", "a'; echo INJECTED; echo '"]
    env = {key: value for key, value in os.environ.items() if key not in ("SSM_FORGE_NO_PIXI", "PYTHONPATH")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = [*start, "python", "--prefix", "an env", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert done.stdout == "|".join([str(tmp_path), *words, ""]), done.stderr


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace that asks for a driver, on a machine without one, started by pixi."""
    assert PIXI is not None
    monkeypatch.setenv("PIXI_EXE", PIXI)
    monkeypatch.setattr(pixi, "machine_virtual_packages", virtual_packages)
    make_package(tmp_path / "channel", "torch", {"share/torch.txt": "torch\n"}, depends=("__cuda >=13",))
    make_package(tmp_path / "channel", "python", {"bin/python": "#!/bin/sh\n"}, version="3.12.1")
    index(tmp_path / "channel")
    return Workspace(tmp_path / "root", tmp_path / "cache")


def lock(place: Workspace, channel: str) -> None:
    place.root.mkdir()
    place.manifest.write_text(
        f'[workspace]\nname = "x"\nchannels = ["{channel}"]\n'
        'platforms = ["linux-64", { name = "gpu", platform = "linux-64", cuda = "13.0" }]\n'
        '[feature.cu130]\nplatforms = ["gpu"]\n[feature.cu130.dependencies]\ntorch = "*"\npython = "*"\n'
        "[environments]\ncu130 = { features = ['cu130'], no-default-feature = true }\n"
    )
    subprocess.run(["pixi", "lock"], cwd=place.root, check=True, capture_output=True)


def test_without_a_driver_its_environment_is_made_all_the_same(place: Workspace, tmp_path: Path) -> None:
    """pixi refuses an environment for a driver where there is none; install-mamba needs none to install."""
    lock(place, (tmp_path / "channel").as_uri())
    with open_log(place.logs, "test") as log:
        with pytest.raises(pixi.PixiError, match=r"missing virtual packages: __cuda >= 13\.0"):
            # What pixi does where nothing is said of CUDA.
            pixi.install_environment("cu130", "", place.manifest, log)
        pixi.install_environment("cu130", "13.0", place.manifest, log)
    assert (place.envs / "cu130/share/torch.txt").exists()
    assert pixi.made(place.envs / "cu130")
    assert marker.is_foreign(place.envs / "cu130")


@pytest.mark.timeout(120)
def test_a_channel_that_is_gone_is_a_matter_of_the_network(place: Workspace, tmp_path: Path) -> None:
    with served(tmp_path / "channel") as address:
        lock(place, address)
    with open_log(place.logs, "test") as log, pytest.raises(pixi.PixiError) as failed:
        pixi.install_environment("cu130", "13.0", place.manifest, log)
    assert isinstance(failed.value.error, NetworkError)
    assert "-e cu130" in failed.value.error.what


def test_what_the_own_engine_makes_goes_beside_its_environment_and_neither_touches_the_other(
    place: Workspace, tmp_path: Path
) -> None:
    channel = tmp_path / "channel"
    lock(place, channel.as_uri())
    for name in PROJECTS:
        make_package(place.channel, name, {f"share/{name}.txt": "kernels\n"}, depends=("torch",))
    index(place.channel)
    prefix = planning.default_prefix("cu130", "3.12", place)
    assert prefix == place.envs / "cu130-kernels"
    with open_log(place.logs, "test") as log:
        pixi.install_environment("cu130", "13.0", place.manifest, log)
    with pytest.raises(UsageError, match=r"is pixi's, which keeps it as its pixi\.lock says") as refused:
        pixi.check_not_its_own(place.envs / "cu130", place)
    assert refused.value.fix == "Leave --prefix out, or name another folder."
    channels = (place.channel.as_uri(), f"{channel.as_uri()}/")
    key = variants.load(workspace().variants).get("cu130", "conda").key("3.12", ArchList.parse("9.0"))
    packages = tuple(
        PlannedPackage("in channel", BuildRequest(Rendered(name, "1.0", "h1_0", engine=None), key, channels))
        for name in PROJECTS
    )
    row = Variant("cu130", "conda", {"cuda_compiler_version": "13.0"}, {}, {})
    locked = locks.environment(place.lock, "cu130")
    work = Plan(row, "3.12", ArchList.parse("9.0"), prefix, channels, packages, None, 0, 0, 0, 0, locked=locked)
    with open_log(place.logs, "test") as log:
        pipeline.install_packages(work, pipeline.base_of(work), place, log)

    def kernels() -> bool:
        return all((prefix / f"share/{name}.txt").exists() for name in PROJECTS)

    assert kernels()
    assert holds(place.envs / "cu130", locked.records)
    assert registry.prefix_of("cu130", place) == prefix
    # Nothing that pixi does to its environment takes them out.
    told = {**os.environ, "CONDA_OVERRIDE_CUDA": "13.0"}
    for words in (["run", "-x", "-e", "cu130", "true"], ["reinstall", "-e", "cu130"], ["install", "-e", "cu130"]):
        subprocess.run(["pixi", *words], cwd=place.root, env=told, check=True, capture_output=True)
    assert kernels()
    assert holds(place.envs / "cu130", locked.records)
