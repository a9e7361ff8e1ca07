"""A finished conda package as a wheel: the same files, for pip and uv.

What a wheel says beside upstream's metadata is in ``DIST-INFO/ssm-forge.json``: the conda package that it is made from,
with its sha256, and everything that one says of its origin. The same package gives the same bytes (with the same zlib,
where it is compressed).
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ssm_forge.base import platforms
from ssm_forge.base.errors import BuildError, UsageError
from ssm_forge.base.files import replacing, sha256_of
from ssm_forge.base.platforms import LINUX_64, Platform
from ssm_forge.package.write import dump_json, read_json

ORIGIN = "ssm-forge.json"

_SITE = re.compile(r"lib/python(3\.\d+)/site-packages/(.+)")
# What conda keeps of a package, and the files of its tests, which only conda tools run.
_CONDAS_OWN = ("info/", "etc/conda/test-files/")
# What an installer writes of its own.
_LEFT_OUT = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "WHEEL")
_TIME = (2026, 1, 1, 0, 0, 0)


def filename(package: Path, *, build_tag: str = "") -> str:
    """The name of the wheel that :func:`from_conda` makes: ``mamba_ssm-2.3.1-cp311-cp311-linux_x86_64.whl``.

    Args:
        build_tag: tells wheels of one release apart; starts with a digit. Empty for none.

    Raises:
        IntegrityError: when the package is damaged.
        BuildError: when it is for no particular Python.
    """
    index = read_json(package, "index.json")
    distribution = str(index["name"]).replace("-", "_")
    tag = f"-{build_tag}" if build_tag else ""
    return f"{distribution}-{index['version']}{tag}-{python_tag(index)}-{platform_of(index).wheel}.whl"


def from_conda(package: Path, folder: Path, *, build_tag: str = "", compress: bool = True) -> Path:
    """Write the wheel of a finished package into ``folder``, and return its path. It appears whole or not at all.

    Args:
        build_tag: as in :func:`filename`.
        compress: whether its members are deflated.

    Raises:
        IntegrityError: when the package is damaged.
        BuildError: when it holds what a wheel can't: files outside ``site-packages``, no metadata, or for no particular
            Python.
    """
    from rattler.package_streaming import extract

    index = read_json(package, "index.json")
    target = folder / filename(package, build_tag=build_tag)
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=folder) as scratch:
        extract(package, Path(scratch))
        found = files(package, Path(scratch))
        info = dist_info(package, found)
        contents = {name: path.read_bytes() for name, path in found.items() if not is_left_out(name, info)}
    contents[f"{info}/WHEEL"] = about(f"{python_tag(index)}-{platform_of(index).wheel}", build_tag)
    contents[f"{info}/{ORIGIN}"] = dump_json(origin(package, index))
    write(target, contents, info, compress=compress)
    return target


def origin(package: Path, index: dict[str, Any]) -> dict[str, Any]:
    """What the wheel says of where it comes from."""
    return {
        "package": package.name,
        "sha256": sha256_of(package),
        "build": index["build"],
        "depends": index["depends"],
        "made_from": read_json(package, ORIGIN),
    }


def platform_of(index: dict[str, Any]) -> Platform:
    """What a package is for; one that does not say it is of the time when there was one platform.

    Raises:
        BuildError: when nothing of its platform has wheels here.
    """
    try:
        return platforms.of(str(index.get("subdir", LINUX_64.subdir)))
    except UsageError as error:
        raise BuildError(f"{index['name']} {index['build']} is for {index['subdir']}, which has no wheels.") from error


def python_tag(index: dict[str, Any]) -> str:
    """``cp312-cp312``, by the Python ABI that a package depends on.

    Raises:
        BuildError: when it is for no particular Python.
    """
    abi = next((re.search(r"\*_cp(\d+)$", spec) for spec in index["depends"] if spec.startswith("python_abi ")), None)
    if abi is None:
        raise BuildError(f"{index['name']} {index['build']} is for no particular Python, so it has no wheel tag.")
    return f"cp{abi.group(1)}-cp{abi.group(1)}"


def about(tag: str, build_tag: str) -> bytes:
    """The content of ``DIST-INFO/WHEEL``."""
    lines = ["Wheel-Version: 1.0", "Generator: ssm-forge", "Root-Is-Purelib: false", f"Tag: {tag}"]
    lines += [f"Build: {build_tag}"] if build_tag else []
    return ("\n".join(lines) + "\n").encode()


def files(package: Path, unpacked: Path) -> dict[str, Path]:
    """Path in the wheel -> file of an unpacked package; bytecode is left to whoever imports it.

    Raises:
        BuildError: when one lies outside ``site-packages``.
    """
    found = {}
    # Installers make these themselves.
    told = [path.read_text("utf-8") for path in unpacked.glob("lib/python*/site-packages/*.dist-info/entry_points.txt")]
    programs = {f"bin/{line.partition('=')[0].strip()}" for text in told for line in text.splitlines() if "=" in line}
    for path in sorted(unpacked.rglob("*")):
        name = path.relative_to(unpacked).as_posix()
        if path.is_dir() or name.startswith(_CONDAS_OWN) or "/__pycache__/" in name or name in programs:
            continue
        inside = _SITE.fullmatch(name)
        if inside is None or path.is_symlink():
            raise BuildError(f"{package.name} holds {name}, which has no place in a wheel.")
        found[inside.group(2)] = path
    return found


def dist_info(package: Path, files: dict[str, Path]) -> str:
    """The name of the one ``.dist-info`` folder.

    Raises:
        BuildError: when there is none, or more than one.
    """
    infos = {name.split("/", 1)[0] for name in files if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)}
    if len(infos) != 1:
        raise BuildError(f"{package.name} holds {len(infos)} dist-info folders with METADATA, instead of one.")
    return infos.pop()


def is_left_out(name: str, info: str) -> bool:
    """Whether a file is written by whoever makes or installs a wheel, and not taken from the package."""
    return name in {f"{info}/{left_out}" for left_out in _LEFT_OUT}


def write(target: Path, contents: dict[str, bytes], info: str, *, compress: bool) -> None:
    """Write a wheel with ``contents`` and the RECORD of them; it appears whole or not at all."""
    with replacing(target) as partial:
        _write(partial, contents, info, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)


def _write(path: Path, contents: dict[str, bytes], info: str, method: int) -> None:
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    # The metadata comes last, as the specification recommends.
    order = sorted(contents, key=lambda name: (name.startswith(f"{info}/"), name))
    with zipfile.ZipFile(path, "w") as archive:
        for name in order:
            digest = base64.urlsafe_b64encode(hashlib.sha256(contents[name]).digest()).rstrip(b"=").decode()
            rows.writerow([name, f"sha256={digest}", len(contents[name])])
            archive.writestr(_entry(name), contents[name], method)
        rows.writerow([f"{info}/RECORD", "", ""])
        archive.writestr(_entry(f"{info}/RECORD"), record.getvalue().encode(), method)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=_TIME)
    entry.create_system = 3
    entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
    return entry


def read_origin(info: Path) -> dict[str, Any]:
    """What an installed wheel of ours says of itself; empty for any other package."""
    try:
        content = json.loads((info / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
