"""Small conda packages as our builds leave them, to make wheels of: a real library, and the metadata of a project."""

from __future__ import annotations

import datetime
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import psutil
from rattler_build import assemble_package

from ssm_forge.build.finalize import PROVENANCE
from ssm_forge.package.write import dump_json, rewrite_info

DIGITS = f"{sys.version_info.major}{sys.version_info.minor}"
MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"lib/python{MINOR}/site-packages"
# Some library that was compiled for many machines, and what it needs of theirs.
LIBRARY = next(Path(psutil.__file__).parent.glob("_psutil_linux*.so"))


def needed_glibc() -> tuple[int, int]:
    """What the library needs, by the names of symbol versions that are in its bytes."""
    found = re.findall(rb"GLIBC_(\d+)\.(\d+)(?:\.\d+)?\0", LIBRARY.read_bytes())
    return max((int(major), int(minor)) for major, minor in found)


def kernels(
    folder: Path,
    name: str = "mamba-ssm",
    *,
    version: str = "2.3.2.post1",
    torch: str = "2.11",
    build: str = "bridge_cuda130_*",
    archs: str = "9.0",
    number: int = 3,
    text: str = "",
    depends: tuple[str, ...] = (),
    requires: tuple[str, ...] = ("torch",),
    metadata: str = "",
    tree: str = "",
    whose: str = "",
    files: dict[str, str] | None = None,
    subdir: str = "linux-64",
    library: bytes = b"",
) -> Path:
    """A finished package in ``folder``.

    Args:
        torch, build: version and build string of the torch that it depends on.
        text: content of its one module.
        requires: upstream's Requires-Dist.
        metadata: more lines of METADATA.
        tree: sha256 of the source tree that it is from; empty for a release.
        whose: how its build string begins, ``upstream_`` for upstream's kernels.
        files: more files, by their path in the package.
        subdir: the platform that it says it is for.
        library: its compiled module, where that is not this machine's.
    """
    tag = "sm" + archs.replace("+PTX", "ptx").replace(".", "").replace(";", "_sm")
    module = name.replace("-", "_")
    info = f"{SITE}/{module}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\nRequires-Python: >=3.9\n{metadata}"
    contents = {
        f"{SITE}/{module}/__init__.py": f"__version__ = '{version}'\n{text}",
        f"{SITE}/{module}/__pycache__/__init__.cpython-{DIGITS}.pyc": "compiled",
        f"{info}/METADATA": head + "".join(f"Requires-Dist: {line}\n" for line in requires) + "\nAbout it.\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\n",
        f"{info}/RECORD": "of the build,,\n",
        f"{info}/licenses/LICENSE": "licence\n",
        **(files or {}),
    }
    told = {
        "format": 4,
        "name": name,
        "recipe_sha256": "ab" * 32,
        "variant": {"forge_variant": "cu130"},
        "cuda_arch_list": archs,
        "glibc": "2.17",
        "materials": [{"uri": "https://example.org/source.tar.gz", "sha256": "cd" * 32, "role": "source"}],
        **({"tree": {"sha256": tree}} if tree else {}),
    }
    with tempfile.TemporaryDirectory() as scratch:
        content = Path(scratch) / "content"
        for path, data in contents.items():
            (content / path).parent.mkdir(parents=True, exist_ok=True)
            (content / path).write_text(data, encoding="utf-8")
        extension = content / SITE / f"{module}_cuda.cpython-{DIGITS}-x86_64-linux-gnu.so"
        extension.write_bytes(library or LIBRARY.read_bytes())
        made = Path(
            assemble_package(
                name=name,
                version=version,
                build_string=f"{whose}cuda130_py{DIGITS}_{tag}_h0000000_{number}",
                build_number=number,
                target_platform=subdir,
                output_dir=str(Path(scratch) / "out"),
                files_dir=str(content),
                depends=[f"python_abi {MINOR}.* *_cp{DIGITS}", f"pytorch {torch}.* {build}", *depends],
                detect_prefix=False,
                timestamp=datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
            ).path
        )
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / made.name
        about = {"info/about.json": dump_json({"summary": name}), PROVENANCE: dump_json(told)}
        rewrite_info(made, target, lambda found: {**found, **about})
    return target


def tiny_wheel(folder: Path, name: str, version: str) -> Path:
    """A wheel that stands for a package of others, torch for example: importable, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"__version__ = '{version}'\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(
            f"{info}/RECORD", f"{name}/__init__.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )
    return path
