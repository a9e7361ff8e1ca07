"""Stand-ins for conda-forge, NVIDIA's and pytorch.org's channels, made from the bridge, and a checkout for them.

No test can count on the real channels. The bridge's packages have their layout, names and metadata; here they also get
the build strings of their torch and their places, and a server answers for them where pixi's configuration names a
mirror. Their versions and hashes are their own, so a checkout that is to use them is adapted and locked anew.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tomlkit
import yaml
from rattler.index import index_fs

from ssm_forge.base import fetch, machine, ui
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge import assemble, metadata, pylock
from ssm_forge.bridge import parts as bridge_parts
from ssm_forge.bridge.package import write
from ssm_forge.bridge.wheels import distributions, wheel_package
from ssm_forge.manifest import variants
from ssm_forge.manifest.variants import Variant
from ssm_forge.package.write import InfoFiles, dump_json, json_of, rewrite_info

HOST = "https://conda.anaconda.org"
CONDA_FORGE, NVIDIA, PYTORCH = "conda-forge", "nvidia/label/cuda-11.8.0", "pytorch"

_NVIDIAS = re.compile(r"cuda-(?!version)|lib(cublas|cufft|curand|cusolver|cusparse)$")
_PYTORCHS = ("pytorch", "pytorch-cuda", "pytorch-mutex", "torchtriton")
# Headers that the kernels do not need.
_ABSENT = ("libcublas-dev", "libcusolver-dev", "libcusparse-dev")


@dataclass(frozen=True)
class StandIn:
    """Channels on this machine, which a server answers for.

    Attributes:
        folder: has each channel under the path that it has on the real server.
        row: the row of variants.yaml whose versions the channels have, as one from conda.
    """

    folder: Path
    row: Variant

    @property
    def channels(self) -> tuple[str, ...]:
        """Their folders, as URLs, in the order of pixi.toml."""
        return tuple((self.folder / name).as_uri() for name in _channels(self.row.cuda))


def _channels(cuda: str) -> tuple[str, ...]:
    return (NVIDIA, PYTORCH, CONDA_FORGE) if cuda == "11.8" else (CONDA_FORGE,)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...

    def send_head(self) -> Any:
        # Its "not modified" has no headers, which solvers take for a failure.
        del self.headers["If-Modified-Since"]
        return super().send_head()


class _Server(ThreadingHTTPServer):
    # Solvers ask for an index in a hundred parts at once.
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """Killed installations hang up: that is what some tests do."""


@contextmanager
def served(
    variant: str, python: str, checkout: Path, folder: Path, *, archs: str, tools: bool = False
) -> Iterator[StandIn]:
    """Make the channels of a variant below ``folder``, serve them, and adapt ``checkout`` to them; it has no lock then.

    Args:
        folder: has ``downloads``, and gets what is made.
        archs: compute capabilities that kernels are built for where nobody names any.
        tools: whether the default environment, pixi's, is to be had from them too.
    """
    own = Workspace(checkout, folder)
    matrix = variants.load(own.variants)
    bridge, conda = matrix.get(variant, "bridge"), matrix.get(variant, "conda")
    own_values = {**{key: conda.row[key] for key in ("forge_source", "pytorch_build")}, "cuda_arch_list": archs}
    row = replace(conda, row={**bridge.row, **own_values})
    channels = folder / "channels"
    _make(bridge, row, python, own, channels)
    own_tools = _make_tools(python, own, channels / CONDA_FORGE) if tools else set()
    for channel in _channels(row.cuda):
        (channels / channel / "noarch").mkdir(parents=True, exist_ok=True)
        asyncio.run(index_fs(channels / channel))
    adapt(checkout, row, own_tools)
    handler = partial(_Quiet, directory=str(channels))
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        configure(checkout, address, _channels(row.cuda))
        yield StandIn(channels, row)
        server.shutdown()


def configure(checkout: Path, address: str, channels: Sequence[str]) -> None:
    """Name the server as the mirror of the real channels, for pixi and for ./run."""
    lines = [f'"{HOST}/{channel}" = ["{address}/{channel}"]' for channel in channels]
    (checkout / ".pixi/config.toml").write_text("\n".join(["[mirrors]", *lines, ""]))


def _make(bridge: Variant, row: Variant, python: str, own: Workspace, channels: Path) -> None:
    # Debian's compiler and not this machine's: it is in the packages, as conda-forge's is.
    parts = bridge_parts.find_parts(bridge, python, "bridge", own)
    with ui.open_log(own.cache / "logs", "stand-in") as log:
        made = assemble.assemble(parts, own, log)
    was, now = bridge.row["pytorch_build"].rstrip("_*"), _build_of(row, python)
    for package in sorted((made / "linux-64").glob("*.conda")):
        name = package.name.rsplit("-", 2)[0]
        target = channels / _channel_of(name, row.cuda) / "linux-64" / _renamed(package.name, was, now)
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in ("pytorch", "libtorch"):
            rewrite_info(package, target, lambda files: _relabelled(files, was, now))
        else:
            os.link(package, target)
    if row.cuda == "11.8":
        _add_decoy(channels, row, python)
    # Hard links keep what was made, and the bridge is not what is tested.
    shutil.rmtree(own.bridge)


def _channel_of(name: str, cuda: str) -> str:
    if cuda != "11.8":
        return CONDA_FORGE
    if name in _PYTORCHS:
        return PYTORCH
    return NVIDIA if _NVIDIAS.match(name) else CONDA_FORGE


def _build_of(row: Variant, python: str) -> str:
    """Start of the build string that the real channel's torch has."""
    return f"py{python}_cuda{row.cuda}" if row.cuda == "11.8" else f"cuda{row.cuda.replace('.', '')}"


def _renamed(text: str, was: str, now: str) -> str:
    # pytorch.org names the Python first.
    return re.sub(rf"{was}(_py\d+)?", lambda found: now if "py" in now else now + (found[1] or ""), text)


def _relabelled(files: InfoFiles, was: str, now: str) -> InfoFiles:
    index = json_of(files, "index.json", Path("index.json"))
    index["build"] = _renamed(index["build"], was, now)
    index["depends"] = [_renamed(spec, was, now) for spec in index["depends"]]
    return {**files, "info/index.json": dump_json(index)}


def _add_decoy(channels: Path, row: Variant, python: str) -> None:
    """conda-forge's own torch of the same minor: newer, and another ABI. A solve that takes it is wrong."""
    (package,) = (channels / PYTORCH / "linux-64").glob(f"pytorch-{row.torch}*.conda")
    build, number = f"cuda118_py{python.replace('.', '')}h0_300", 300
    version = f"{row.torch}.99"

    def edit(files: InfoFiles) -> InfoFiles:
        index: dict[str, Any] = json_of(files, "index.json", package)
        depends = [spec for spec in index["depends"] if not spec.startswith("pytorch-")]
        index |= {"version": version, "build": build, "build_number": number, "depends": depends}
        return {**files, "info/index.json": dump_json(index)}

    rewrite_info(package, channels / CONDA_FORGE / "linux-64" / f"pytorch-{version}-{build}.conda", edit)


def _make_tools(python: str, own: Workspace, channel: Path) -> set[str]:
    """The tools behind every task as packages, from the wheels that scripts/requirements.lock pins."""
    lock = own.cache / "pylock.tools.toml"
    wanted = (own.root / "scripts/requirements.in").read_text(encoding="utf-8").partition("# tests and lint")[0]
    source = own.cache / "tools.in"
    source.write_text(wanted)
    pins = own.cache / "pins.txt"
    locked = (own.root / "scripts/requirements.lock").read_text(encoding="utf-8")
    pins.write_text("\n".join(re.findall(r"^([\w.-]+==[^\\\n]+)", locked, re.MULTILINE)))
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", python]
    command += ["--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:", "--constraint", str(pins)]
    done = subprocess.run(
        [*command, "--format", "pylock.toml", "-o", str(lock), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wheels = pylock.read(lock, python)
    fetch.fetch_all([wheel.artifact for wheel in wheels], own)
    dists = distributions(wheels, own)
    interpreter = assemble.interpreters.choose(python, own).executable
    there = {path.name.rsplit("-", 2)[0] for path in (channel / "linux-64").glob("*.conda")}
    for wheel in wheels:
        if metadata.conda_name(wheel.name) not in there:
            package = wheel_package(wheel, dists, python=python, interpreter=interpreter, cuda="13.0", workspace=own)
            write(package, channel, threads=2)
    names = re.findall(r"^[A-Za-z][\w-]*", wanted, re.MULTILINE)
    return {metadata.conda_name(name) for name in names if name != "tomli"}


def adapt(checkout: Path, row: Variant, tools: set[str]) -> None:
    """Let the checkout's row from conda, and its environment, have the versions of the stand-in.

    Args:
        tools: packages of the default environment beside Python.
    """
    _adapt_matrix(checkout / "recipes/variants.yaml", row)
    _adapt_manifest(checkout / "pixi.toml", row, tools)
    for lock in ("pixi.lock", "recipes/pixi.lock"):
        (checkout / lock).unlink()


def _adapt_matrix(path: Path, row: Variant) -> None:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = data["zip_keys"][0]
    column = list(zip(data["forge_variant"], data["forge_source"], strict=True)).index((row.name, "conda"))
    for key in keys:
        data[key][column] = row.row[key]
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def _adapt_manifest(path: Path, row: Variant, tools: set[str]) -> None:
    document: Any = tomlkit.parse(path.read_text(encoding="utf-8"))
    feature = document["feature"][row.name]
    wanted = feature["dependencies"]
    for name in _ABSENT:
        wanted.pop(name, None)
    wanted["pytorch"]["version"] = f"{row.torch}.*"
    wanted["gxx_linux-64"] = f"{row.row['cxx_compiler_version']}.*"
    wanted["sysroot_linux-64"] = f"{row.row['c_stdlib_version']}.*"
    if "triton" in wanted:
        wanted["triton"] = f"{row.row['triton']}.*"
    if "cudnn" in wanted:
        wanted["cudnn"] = f"=={row.row['cudnn']}"
    for platform in document["workspace"]["platforms"]:
        if "glibc" in platform:
            # Debian's compiler runs from its own glibc on.
            platform["glibc"] = machine.glibc()
    document["dependencies"] = {"python": "3.12.*" if tools else "*", **dict.fromkeys(sorted(tools), "*")}
    document["feature"] = {row.name: feature}
    document["environments"] = {key: document["environments"][key] for key in ("default", row.name)}
    path.write_text(tomlkit.dumps(document), encoding="utf-8")
