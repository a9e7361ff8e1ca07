"""One file that takes packages, checks and upstream's tests to a machine with Python, torch and a GPU.

The bundle is a ``.pyz``: ``python3 BUNDLE.pyz`` there does everything (see :mod:`ssm_forge.bundle.main`).
The two .conda files travel with their payloads recompressed from zstd to xz, because Python's standard
library reads no zstd before 3.14; every file is still checked against the package's own sha256 there.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from ssm_forge.base import foreign, platforms
from ssm_forge.base.errors import InstallError, IntegrityError, UsageError
from ssm_forge.base.files import replacing, sha256_of
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.platforms import LINUX_64
from ssm_forge.base.ui import human_bytes
from ssm_forge.channel import folder as channel
from ssm_forge.manifest.recipe import EXTENSIONS, PROJECTS
from ssm_forge.package import installed as package_installed
from ssm_forge.package import write as archive
from ssm_forge.verify import gpu

MOST_BUNDLE_BYTES = 64 << 20
# Of a package's files, which are read one by one; machine code for many GPUs is compressed to a tenth.
_MOST_PAYLOAD_BYTES = 4 << 30
# Files under scripts/ssm_forge that travel: the package's marker and the kernels subpackage.
_SOURCES = ("__init__.py", "kernels/*.py")

_INDEX: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("name", "version"), foreign.is_file_name),
    "depends": foreign.is_list_of_text,
}
_ENTRY: dict[str, Callable[[object], bool]] = {
    "_path": foreign.is_inside,
    "path_type": foreign.is_text,
    "sha256": lambda value: value is None or foreign.is_hex(64)(value),
}


@dataclass(frozen=True)
class Package:
    """A built .conda file and what its metadata says.

    Attributes:
        path: the file.
        index: its ``info/index.json``.
        files: path in the prefix -> sha256, of every regular file.
    """

    path: Path
    index: dict[str, Any]
    files: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Package:
        """A .conda file, with the parts of its metadata that a bundle needs, checked.

        Raises:
            IntegrityError: when the file is no whole .conda package.
        """
        info = archive.read_info(path)
        try:
            index, listed = (archive.json_of(info, name, path) for name in ("index.json", "paths.json"))
            foreign.require(index, _INDEX)
            foreign.require(index, {"subdir": foreign.is_text}, all_of_them=False)
            foreign.require(listed, {"paths": lambda value: isinstance(value, list)})
            for entry in listed["paths"]:
                foreign.require(entry, _ENTRY)
            files = {e["_path"]: e["sha256"] for e in listed["paths"] if e["path_type"] == "hardlink"}
            if not all(map(foreign.is_hex(64), files.values())):
                raise ValueError("a file has no sha256")
        except (KeyError, ValueError) as error:
            raise IntegrityError(f"{path} is not a whole .conda package ({error}).") from error
        return cls(path, index, files)

    @property
    def needs(self) -> dict[str, str]:
        """What a machine must have: python, torch, cuda (major) and glibc, and its kind where that is not x86_64.

        Raises:
            UsageError: when the package does not say.
        """
        depends = "\n".join(self.index["depends"])
        patterns = {
            "python": r"^python_abi (\d+\.\d+)",
            "torch": r"^pytorch (\d+\.\d+)",
            "cuda": r"^cuda-version >=(\d+)",
            "glibc": r"^__glibc >=([0-9]+(?:\.[0-9]+)*)",
        }
        matches = {key: re.search(pattern, depends, re.MULTILINE) for key, pattern in patterns.items()}
        missing = [key for key, match in matches.items() if match is None]
        if missing:
            raise UsageError(f"{self.path.name} does not say which {', '.join(missing)} it needs.")
        found = {key: match.group(1).rstrip(".") for key, match in matches.items() if match}
        machine = platforms.of(self.index.get("subdir", LINUX_64.subdir)).machine
        # Bundles were for one kind of machine first, and those say nothing of it.
        return found if machine == LINUX_64.machine else {**found, "machine": machine}


def installed_packages(prefix: Path, workspace: Workspace) -> list[Path]:
    """The .conda files that an environment was made from.

    Raises:
        InstallError: when one is not installed, or its file is no longer in the channel.
    """
    records = package_installed.records(prefix)
    paths = []
    for project in PROJECTS:
        name = records[project].filename if project in records else ""
        path = channel.find(workspace.channel, name) if name else None
        if path is None:
            what = f"{name} is not in {workspace.channel}" if name else f"{project} is not installed in {prefix}"
            raise InstallError(f"{what}.", fix=f"Run '{launcher()} install-mamba' first, or name --package FILE.")
        paths.append(path)
    return paths


def make(
    packages: Sequence[Path],
    others: dict[str, list[Path]],
    target: Path,
    workspace: Workspace,
    *,
    notes: str = "",
) -> Path:
    """Write a bundle.

    Args:
        packages: one .conda file for each project, for the same Python, torch and CUDA.
        others: label -> another build to compare with: its .conda files, or folders with its extensions.
        target: the file, or a folder to put it into under its own name.
        notes: kept in ``bundle.json``, for people.

    Raises:
        UsageError: when the packages are not one of each or do not belong together, or it grows too large.
    """
    read = [Package.read(path) for path in packages]
    names = sorted(str(p.index["name"]) for p in read)
    if names != sorted(PROJECTS):
        raise UsageError(f"a bundle holds one package of each of {', '.join(PROJECTS)}, not {', '.join(names)}.")
    needs = _common(read)
    if target.is_dir():
        tag = f"py{needs['python'].replace('.', '')}-torch{needs['torch']}-cuda{needs['cuda']}"
        target = target / f"ssm-forge-{tag}.pyz"
    with replacing(target) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as bundle:
            _fill(bundle, read, others, needs, workspace, notes)
        size = partial.stat().st_size
        if size > MOST_BUNDLE_BYTES:
            raise UsageError(
                f"the bundle would be {human_bytes(size)}, more than {human_bytes(MOST_BUNDLE_BYTES)}.",
                fix="Take packages for fewer compute capabilities, or leave out an --also.",
            )
    return target


def _common(packages: Sequence[Package]) -> dict[str, str]:
    """What all packages need; glibc the newest.

    Raises:
        UsageError: when they are for different Pythons, torches or CUDAs.
    """
    every = [p.needs for p in packages]
    for key in ("python", "torch", "cuda"):
        values = sorted({needs[key] for needs in every})
        if len(values) > 1:
            raise UsageError(f"the packages are for different {key} versions: {', '.join(values)}.")
    newest = max((needs["glibc"] for needs in every), key=Version)
    return {**every[0], "glibc": newest}


def _fill(
    bundle: zipfile.ZipFile,
    packages: Sequence[Package],
    others: dict[str, list[Path]],
    needs: dict[str, str],
    workspace: Workspace,
    notes: str,
) -> None:
    source = Path(__file__).parents[1]
    bundle.write(source / "bundle/main.py", "__main__.py")
    for pattern in _SOURCES:
        for path in sorted(source.glob(pattern)):
            bundle.write(path, f"src/ssm_forge/{path.relative_to(source)}")
    versions = {str(p.index["name"]): str(p.index["version"]) for p in packages}
    tests = gpu.upstream_tests(versions, workspace)
    for project, folder in tests.items():
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            bundle.write(path, f"tests/{project}/tests/{path.relative_to(folder)}")
    pytest = gpu.lend_pytest(workspace)
    for path in sorted(p for p in pytest.rglob("*") if p.is_file()):
        bundle.write(path, f"pytest/{path.relative_to(pytest)}")
    described = []
    for package in packages:
        payload = f"packages/{package.path.name.removesuffix('.conda')}.tar.xz"
        _store(bundle, payload, _payload(package.path))
        described.append(
            {
                "file": package.path.name,
                "sha256": sha256_of(package.path),
                "payload": payload,
                "files": package.files,
            }
        )
    for label, paths in others.items():
        members = (member for path in paths for member in _extensions(path))
        _store(bundle, f"others/{label}.tar.xz", members)
    manifest = {
        "needs": needs,
        "packages": described,
        "tests": sorted(tests),
        "others": sorted(others),
        "notes": notes,
    }
    bundle.writestr("bundle.json", json.dumps(manifest, indent=1))


Members = Iterator[tuple[tarfile.TarInfo, bytes]]


def _payload(path: Path) -> Members:
    """The regular files of a .conda's payload.

    Raises:
        IntegrityError: when it is damaged, leads out of a folder, or is larger than what a bundle can be made of.
    """
    try:
        with archive.opened_payload(path) as tar:
            room = _MOST_PAYLOAD_BYTES
            for member in tar:
                if not member.isreg():
                    continue
                room -= member.size + tarfile.BLOCKSIZE  # An empty file takes room too.
                if room < 0 or not foreign.is_inside(member.name):
                    raise ValueError(f"{member.name!r:.80} has {member.size} bytes, which do not fit into a bundle")
                content = tar.extractfile(member)
                assert content is not None
                yield member, foreign.limited(content, member.size)
    except (*archive.ZIP_DAMAGE, OSError) as error:
        raise IntegrityError(f"{path} is not a whole .conda package ({error}).") from error


def _extensions(path: Path) -> Members:
    """The compiled modules of another build: out of a .conda, or found in a folder."""
    if path.is_dir():
        files = [f for name in EXTENSIONS.values() for f in sorted(path.rglob(f"{name}*.so"))]
        for file in files:
            member = tarfile.TarInfo(file.name)
            data = file.read_bytes()
            member.size, member.mode = len(data), 0o755
            yield member, data
    elif path.suffix == ".conda":
        files = []
        for member, data in _payload(path):
            if Path(member.name).name.startswith(tuple(EXTENSIONS.values())) and member.name.endswith(".so"):
                files.append(Path(member.name))
                member.name = files[-1].name
                yield member, data
    else:
        raise UsageError(f"--also {path} is neither a folder nor a .conda file.")
    if not files:
        raise UsageError(f"--also {path} holds none of {', '.join(EXTENSIONS.values())}.")


def _store(bundle: zipfile.ZipFile, name: str, members: Members) -> None:
    """Write members as one xz archive into the bundle; it is not compressed twice."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=6) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    bundle.writestr(zipfile.ZipInfo(name), packed.getvalue(), zipfile.ZIP_STORED)


def parse_others(values: Sequence[str]) -> dict[str, list[Path]]:
    """Read ``LABEL=PATH``; a label comes twice for the two .conda files of one build.

    Raises:
        UsageError: when it is not that, or the path does not exist.
    """
    by_label: dict[str, list[Path]] = {}
    for text in values:
        label, equals, path = text.partition("=")
        if not (equals and label.isidentifier() and Path(path).exists()):
            raise UsageError(f"--also '{text}' is not LABEL=PATH with an existing path and a plain word as label.")
        by_label.setdefault(label, []).append(Path(path))
    return by_label
