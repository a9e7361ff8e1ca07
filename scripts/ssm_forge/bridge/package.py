"""One bridge package: a staged folder plus metadata, written into the bridge channel atomically."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.package.write import EPOCH, InfoFiles, dump_json, rewrite_info

# Part of every build string's hash: raise it when packages must be assembled anew from the same inputs. 4: laid out as
# conda-forge's, and for CUDA 11.8 as NVIDIA's and pytorch.org's.
FORMAT = 4

# Stands for the environment's folder in the text of packages; whoever installs one writes the folder there.
PREFIX = "/opt/ssm-forge-environment-placeholder"


@dataclass(frozen=True)
class BridgePackage:
    """What a package will be, known before its bytes are.

    Attributes:
        name: conda name.
        version: conda version.
        inputs: hashes of everything its content is made from; they decide the build string.
        stage: fills an empty folder with the prefix layout.
        depends: run requirements (match specs).
        constrains: optional requirements.
        run_exports: as in ``run_exports.json``.
        build_prefix: readable start of the build string.
        build_suffix: end of the build string, after the hash (``cpython`` for python).
        prefixed: text files that name the environment's folder as :data:`PREFIX`.
        noarch_python: files under ``site-packages/`` go to whichever Python is there.
        platform: the machines that it is for; decides the folder that it lies in.
        size: bytes of the inputs, for progress.
    """

    name: str
    version: str
    inputs: tuple[str, ...]
    stage: Callable[[Path], None]
    depends: tuple[str, ...] = ()
    constrains: tuple[str, ...] = ()
    run_exports: dict[str, list[str]] = field(default_factory=dict)
    build_prefix: str = ""
    build_suffix: str = "0"
    noarch_python: bool = False
    prefixed: tuple[str, ...] = ()
    license: str = ""
    summary: str = ""
    size: int = 0
    platform: Platform = LINUX_64

    @property
    def build(self) -> str:
        """The build string, with a hash of everything that the package is made from."""
        content = json.dumps(
            [FORMAT, self.name, self.version, self.inputs, self.depends, self.constrains, self.run_exports]
        )
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        return "_".join(part for part in (self.build_prefix, f"h{digest}", self.build_suffix) if part)

    @property
    def filename(self) -> str:
        """The name of the .conda file."""
        return f"{self.name}-{self.version}-{self.build}.conda"

    @property
    def place(self) -> str:
        """Where the file lies below a channel."""
        return f"{self.platform.subdir}/{self.filename}"

    @property
    def spec(self) -> str:
        """The match spec that this package alone satisfies."""
        return f"{self.name} =={self.version} {self.build}"


def write(package: BridgePackage, channel: Path, threads: int) -> Path:
    """Assemble the package into ``channel``; an existing file of that name is the same package.

    The file appears whole or not at all.
    """
    # Imported here: the engine takes half a second to load, and a plan needs none of it.
    from rattler_build import assemble_package

    target = channel / package.place
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{package.name}-", dir=_scratch(channel)))
    try:
        stage = work / "stage"
        stage.mkdir()
        package.stage(stage)
        output = assemble_package(
            name=package.name,
            version=package.version,
            target_platform=package.platform.subdir,
            build_string=package.build,
            output_dir=work,
            files_dir=stage,
            depends=list(package.depends),
            constrains=list(package.constrains),
            noarch="python" if package.noarch_python else None,
            license=package.license or None,
            summary=package.summary or None,
            compression_level=1,
            compression_threads=threads,
            detect_prefix=False,
            timestamp=datetime.datetime.fromtimestamp(EPOCH, tz=datetime.timezone.utc),
        )
        if package.run_exports or package.prefixed:
            rewrite_info(output.path, target, lambda files: _edited(files, package))
        else:
            output.path.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def sweep(channel: Path) -> None:
    """Remove the scratch folders of runs that were killed."""
    for work in _scratch(channel).iterdir():
        shutil.rmtree(work, ignore_errors=True)


def _scratch(channel: Path) -> Path:
    folder = channel.parent / f".{channel.name}.work"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _edited(files: InfoFiles, package: BridgePackage) -> InfoFiles:
    """The info files with what the engine's assembler does not write: run exports, and where the prefix stands."""
    edited = dict(files)
    if package.run_exports:
        edited["info/run_exports.json"] = dump_json(package.run_exports)
    if package.prefixed:
        paths = json.loads(edited["info/paths.json"])
        for entry in paths["paths"]:
            if entry["_path"] in package.prefixed:
                entry |= {"file_mode": "text", "prefix_placeholder": PREFIX}
        edited["info/paths.json"] = dump_json(paths)
    return edited


def hash_text(*parts: object) -> str:
    """A digest for inputs that are not files (a version, a script's text)."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def link(target: str, path: Path) -> None:
    """Make a symbolic link at ``path``, and the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
