"""A checkout whose two recipes take seconds: everything is real but what they compile, which is one empty function.

Rows of the matrix from conda are used; a server with a handful of packages stands in for conda-forge.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tomlkit
from rattler import RepoDataRecord
from rattler_build import assemble_package

from conda_channel import index, solve_channel
from ssm_forge.manifest import environments as manifest
from ssm_forge.solve.lock import LockedEnvironment, write_locked
from stand_in import HOST, configure

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.12", "3.13", "3.14")
PROJECTS = {"causal-conv1d": "causal_conv1d_cuda", "mamba-ssm": "selective_scan_cuda"}
SELECTION = "variant=cu130 source=conda"

# As the real ones: the name, what it is built for, and what the channel must have before. Its test runs in an
# environment of its own, made from the channel.
_RECIPE = """\
schema_version: 1
context:
  version: ${{{{ {key} }}}}
  archs: ${{{{ "sm" ~ (cuda_arch_list | replace(".", "")) }}}}
  cuda: ${{{{ cuda_compiler_version | replace(".", "") }}}}
  python_minor: ${{{{ (python | split(".*"))[0] }}}}
package:
  name: {project}
  version: ${{{{ version }}}}
build:
  number: 0
  string: cuda${{{{ cuda }}}}_py${{{{ python | version_to_buildstring }}}}_${{{{ archs }}}}_h${{{{ hash }}}}_0
  skip: [forge_source != "conda"]
  script:
    file: ../common/build.sh
    env:
      EXTENSION: {extension}
      PYTHON_MINOR: ${{{{ python_minor }}}}
      PROJECT: {project}
      VERSION: ${{{{ version }}}}
requirements:
  run:
    - python_abi ${{{{ python_minor }}}}.* *_cp${{{{ python | version_to_buildstring }}}}
    - pytorch ${{{{ pytorch }}}}.*
{needs}
tests:
  - script:
      - test -f "$PREFIX/lib/python${{{{ python_minor }}}}/site-packages/causal_conv1d_cuda.so"
about:
  license: MIT
"""

# What a test wants of the build lies in the checkout: how long it takes, and whom it fails for.
_BUILD = """\
#!/usr/bin/env bash
set -euo pipefail
site="$PREFIX/lib/python$PYTHON_MINOR/site-packages"
info="$site/${PROJECT//-/_}-$VERSION.dist-info"
mkdir -p "$info"
echo "building $PROJECT for $PYTHON_MINOR" >>"$RECIPE_DIR/../begun"
if grep -qsx "$PROJECT $PYTHON_MINOR" "$RECIPE_DIR/../broken"; then
    echo "this one is broken" >&2
    exit 1
fi
[ ! -f "$RECIPE_DIR/../seconds" ] || sleep "$(cat "$RECIPE_DIR/../seconds")"
cp "$RECIPE_DIR/../extension" "$site/$EXTENSION.so"
printf 'Metadata-Version: 2.1\\nName: %s\\nVersion: %s\\n' "$PROJECT" "$VERSION" >"$info/METADATA"
"""

_COSTS = """\
causal_conv1d_cuda causal_conv1d_fwd.cu 1.0 50
causal_conv1d_cuda causal_conv1d.cpp 1.0 50
selective_scan_cuda selective_scan_fwd.cu 1.0 50
selective_scan_cuda selective_scan.cpp 1.0 50
"""


@dataclass(frozen=True)
class Toy:
    """The checkout, and the folders that a run of it uses."""

    folder: Path

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    @property
    def recipes(self) -> Path:
        return self.checkout / "recipes"

    @property
    def channel(self) -> Path:
        return self.folder / "channel"

    @property
    def farm(self) -> Path:
        return self.checkout / ".pixi/farm"

    @property
    def environment(self) -> dict[str, str]:
        """For whoever runs it; nothing of this machine's settings but where Snakemake was prepared."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SSM_FORGE_", "SLURM"))}
        own = {
            "SSM_FORGE_CACHE_DIR": str(self.folder / "cache"),
            "SSM_FORGE_CHANNEL": str(self.channel),
            "SSM_FORGE_LOG_DIR": str(self.folder / "logs"),
            "SSM_FORGE_CCACHE": "off",
            "SSM_FORGE_NO_PIXI": "1",
            "PYTHONPATH": str(self.checkout / "scripts"),
            "COLUMNS": "120",
        }
        return {**kept, **own}

    def command(self, *words: str) -> list[str]:
        """The farm of the toy's six packages, for one capability."""
        chosen = ["--select", SELECTION, "--source", "conda", "--cuda-arch", "9.0"]
        return [sys.executable, "-m", "ssm_forge", "farm", *chosen, *words]

    def run(self, *words: str, more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self.command(*words),
            env={**self.environment, **(more or {})},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=3000,
            check=False,
        )

    def packages(self) -> dict[str, bytes]:
        """The channel's packages, and their bytes."""
        return {path.name: path.read_bytes() for path in sorted(self.channel.glob("linux-64/*.conda"))}

    def begun(self) -> list[str]:
        """The builds that were begun, in order."""
        file = self.recipes / "begun"
        return file.read_text().splitlines() if file.exists() else []


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...

    def send_head(self) -> Any:
        # Its "not modified" has no headers, which solvers take for a failure.
        del self.headers["If-Modified-Since"]
        return super().send_head()


@contextmanager
def toy(folder: Path) -> Iterator[Toy]:
    """Make it, and serve what it takes for conda-forge until the end."""
    made = Toy(folder)
    checkout, recipes = made.checkout, made.recipes
    shutil.copytree(ROOT / "scripts", checkout / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run", checkout)
    (checkout / ".pixi").mkdir()
    (checkout / ".pixi/tools").symlink_to(ROOT / ".pixi/tools")
    (checkout / "patches").mkdir()
    (recipes / "common").mkdir(parents=True)
    (recipes / "bridge").mkdir()
    shutil.copy(ROOT / "recipes/variants.yaml", recipes)
    (recipes / "compile-costs.txt").write_text(_COSTS)
    (recipes / "common/build.sh").write_text(_BUILD)
    for project, extension in PROJECTS.items():
        needs = "    - causal-conv1d ==${{ causal_conv1d }}" if project == "mamba-ssm" else ""
        (recipes / project).mkdir()
        key = project.replace("-", "_")
        text = _RECIPE.format(project=project, key=key, extension=extension, needs=needs)
        (recipes / project / "recipe.yaml").write_text(text)
    _compile(recipes / "extension")
    _channel(folder / "served/conda-forge")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder / "served"))) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        configure(checkout, f"http://127.0.0.1:{server.server_port}", ["conda-forge"])
        _lock(made)
        yield made
        server.shutdown()


def _compile(target: Path) -> None:
    """A library with machine code for 9.0 in it, as NVIDIA's cuobjdump sees it: a cubin of no function."""
    numbers = ",".join(map(str, _fatbin(90)))
    code = f'__attribute__((used, aligned(8), section(".nv_fatbin"))) static const unsigned char f[] = {{{numbers}}};'
    code += '\n#include <stdlib.h>\nint f1(void) { return atoi(getenv("X")); }'
    command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", target]
    subprocess.run(command, input=code.encode(), check=True)


def _fatbin(capability: int) -> bytes:
    names = b"\0.shstrtab\0".ljust(16, b"\0")
    sections = bytes(64) + struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, 64, 11, 0, 0, 1, 0)
    header = b"\x7fELF\x02\x01\x01\x33\x07".ljust(16, b"\0")
    flags = capability << 16 | 0x500 | capability
    cubin = (
        struct.pack("<16sHHIQQQIHHHHHH", header, 2, 190, 128, 0, 0, 80, flags, 64, 56, 0, 64, 2, 1) + names + sections
    )
    entry = struct.pack("<HHIQIIHHI", 2, 0x101, 64, len(cubin), 0, 64, 7, 1, capability).ljust(64, b"\0") + cubin
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entry)) + entry


def _channel(channel: Path) -> None:
    empty = channel.parent / "empty"
    empty.mkdir(parents=True)
    abi = [("python_abi", python, f"0_cp{python.replace('.', '')}") for python in PYTHONS]
    for name, version, build in (*abi, ("pytorch", "2.12.0", "cuda130_0")):
        assemble_package(
            name=name,
            version=version,
            target_platform="linux-64",
            build_string=build,
            output_dir=str(channel / "linux-64"),
            files_dir=str(empty),
        )
    (channel / "noarch").mkdir()
    index(channel)


def _lock(made: Toy) -> None:
    """An environment cu130 of next to nothing, locked."""
    told = tomlkit.parse((ROOT / "pixi.toml").read_text())
    for table in ("dependencies", "tasks"):
        del told[table]
    feature = {"cu130": {"platforms": ["linux-64-cu130"], "dependencies": {"python_abi": "3.12.*"}}}
    told["feature"] = tomlkit.item(feature)
    told["environments"] = tomlkit.item({"cu130": {"features": ["cu130"], "no-default-feature": True}})
    (made.checkout / "pixi.toml").write_text(tomlkit.dumps(told))
    environment = manifest.load(made.checkout / "pixi.toml").environment("cu130")
    url = f"{HOST}/conda-forge/"
    records = tuple(
        RepoDataRecord(record, record.file_name, f"{url}linux-64/{record.file_name}", url)
        for record in solve_channel(made.folder / "served/conda-forge", "python_abi 3.12.*")
    )
    locked = LockedEnvironment("cu130", environment.channels, environment.platforms[0], records)
    write_locked((locked,), made.checkout / "pixi.lock")
