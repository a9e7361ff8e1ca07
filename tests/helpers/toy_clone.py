"""A checkout with recipes that take a second to build, locked against a channel on a server of the test's own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conda_channel import index, make_package, served
from ssm_forge.base.files import sha256_of
from ssm_forge.base.paths import Workspace
from ssm_forge.manifest import environments as manifest
from ssm_forge.manifest import source_workspace
from ssm_forge.manifest.recipe import EXTENSIONS, PROJECTS
from ssm_forge.solve import lock

ROOT = Path(__file__).resolve().parents[2]

MANIFEST = """\
[workspace]
name = "x"
channels = ["conda-forge"]
requires-pixi = ">=0.76"
platforms = ["linux-64", { name = "gpu", platform = "linux-64", cuda = "13.0", glibc = "2.28" }]

[feature.cu130]
platforms = ["gpu"]

[feature.cu130.dependencies]
python = "3.12.*"
base = "*"

[environments]
cu130 = { features = ["cu130"], no-default-feature = true }
"""
RECIPE = """\
schema_version: 1
package: {{name: {project}, version: "1.0"}}
source: {{url: "{address}/{project}.tar.gz", sha256: {sha256}}}
build:
  number: 0
  string: ${{{{ cuda_arch_list | replace(".", "") | replace(";", "_") | replace("+", "") }}}}_h${{{{ hash }}}}_0
  script: {{file: ../common/build.sh}}
requirements:
  build: [tool]
  host: [base]
  run: [base, python]
"""
SCRIPT = """\
set -e
case "$PKG_NAME" in {extensions} esac
case "$PKG_NAME" in {extensions} esac
site="$PREFIX/lib/python3.12/site-packages"
mkdir -p "$site" "$PREFIX/share"
unset LD_RUN_PATH
gcc -shared -fPIC -x c source.c -o "$site/$name.so.x.so"
cat "$BUILD_PREFIX/share/tool.txt" "$PREFIX/share/base.txt" >"$PREFIX/share/$PKG_NAME.txt"
"""
# What install-mamba does but for the verification, which needs real kernels.
STEPS = """\
import sys
from pathlib import Path
from ssm_forge.base.arch import ArchList
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import open_log
from ssm_forge.flow import disks, pipeline, plan, planning
from ssm_forge.package import libraries
disks.free_disk = lambda _: 10**12
libraries.gpu_code = lambda _: ArchList.parse(sys.argv[3])
place = Workspace(Path(sys.argv[1]), Path(sys.argv[2]))
def steps():
    work = planning.make(plan.Options(variant="cu130", cuda_arch=sys.argv[3], source=sys.argv[4]), place)
    with open_log(place.logs, "test") as log:
        pipeline.prepare(work, place, log)
        base = pipeline.base_of(work)
        pipeline.solve_environment(work, base, place, pending=work.to_build)
        pipeline.build_missing(work, place, log)
        pipeline.install_packages(work, base, place, log)
from ssm_forge.base.credentials import for_engine
from ssm_forge.base.ending import end
try:
    for_engine()(steps)()
except Exception as error:
    print(f"{type(error).__name__}: {error} {getattr(error, 'fix', '')}", file=sys.stderr)
    end(getattr(error, "exit_code", 1))
end(0)
"""


@dataclass(frozen=True)
class Clone:
    """A checkout with toy recipes, locked against a channel on a server, and what a machine with it has."""

    place: Workspace
    home: Path

    def __call__(self, *, archs: str = "9.0", source: str = "auto", offline: bool = False) -> tuple[int, str]:
        """Build and install; the exit code, and what was said."""
        settings = {"HOME": str(self.home), "PIXI_HOME": str(self.home), "SSM_FORGE_CCACHE": "off"}
        # The tools of ./run have patchelf.
        settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("SSM_FORGE_", "PIXI_", "CONDA_"))
        }
        words = [sys.executable, "-c", STEPS, str(self.place.root), str(self.place.cache), archs, source]
        done = subprocess.run(
            ["unshare", "-rn", *words] if offline else words,
            capture_output=True,
            text=True,
            timeout=300,
            env={**kept, **settings, "PYTHONPATH": str(ROOT / "scripts"), "SSM_FORGE_CACHE_DIR": str(self.place.cache)},
            check=False,
        )
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    def copy(self, folder: Path) -> Clone:
        """Another clone of the same, with nothing built, on the same machine."""
        ignore = shutil.ignore_patterns(".pixi", "channel")
        return Clone(
            Workspace(Path(shutil.copytree(self.place.root, folder, ignore=ignore)), self.place.cache), self.home
        )

    def packages(self) -> dict[str, str]:
        found = self.place.channel.glob("linux-64/*.conda")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clone]:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow a network namespace")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc on this machine to make a library with")
    channel = tmp_path / "served"
    for name, files in {
        "tool": {"share/tool.txt": "tool\n"},
        "base": {"share/base.txt": "base\n"},
        "python": {"bin/python": "#!/bin/sh\n"},
    }.items():
        make_package(channel, name, files, version="3.12.1")
    index(channel)
    root, home = tmp_path / "root", tmp_path / "home"
    for folder in (root / "recipes/common", root / "patches/torch", home):
        folder.mkdir(parents=True)
    for name in ("variants.yaml", "compile-costs.txt"):
        shutil.copy(ROOT / "recipes" / name, root / "recipes")
    (root / "pixi.toml").write_text(MANIFEST)
    place = Workspace(root, tmp_path / "cache")
    for name in ("PIXI_HOME", "HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("SSM_FORGE_CACHE_DIR", str(place.cache))
    with served(channel) as address:
        (home / "config.toml").write_text(f'[mirrors]\n"https://conda.anaconda.org/conda-forge" = ["{address}"]\n')
        for project in PROJECTS:
            archive = channel / f"{project}.tar.gz"
            (tmp_path / "source.c").write_text("int f(void) { return 0; }\n")
            with tarfile.open(archive, "w:gz") as tar:
                tar.add(tmp_path / "source.c", f"{project}-1.0/source.c")
            folder = root / "recipes" / project
            folder.mkdir()
            shutil.copy(ROOT / "recipes" / project / "pixi.toml", folder)
            sha256 = sha256_of(archive)
            (folder / "recipe.yaml").write_text(RECIPE.format(project=project, address=address, sha256=sha256))
        extensions = " ".join(f"{project}) name={extension};;" for project, extension in EXTENSIONS.items())
        (root / "recipes/common/build.sh").write_text(SCRIPT.format(extensions=extensions))
        source_workspace.write(place)
        for path, target in ((place.manifest, place.lock), (place.source_manifest, place.source_lock)):
            lock.write(manifest.load(path), target, snapshot=None)
        yield Clone(place, home)


def edited(place: Workspace, name: str) -> None:
    """The lock in recipes/ with another hash for a package."""
    text = place.source_lock.read_text()
    (entry,) = (e for e in re.findall(r"(?m)^- conda: .+\n(?:  .*\n)*", text) if f"/{name}-" in e)
    other = re.sub(r"sha256: [0-9a-f]{64}", f"sha256: {'0' * 64}", entry)
    place.source_lock.write_text(text.replace(entry, other))
