"""Small environments as pip, uv and conda make them, with a torch whose files are only as long as they must be."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path

TORCH_FILES = (
    "torch/__init__.py",
    "torch/utils/cpp_extension.py",
    "torch/include/torch/extension.h",
    "torch/include/c10/util/Exception.h",
    *(f"torch/lib/lib{name}.so" for name in ("c10_cuda", "torch_cpu", "torch_cuda", "torch_python")),
)


def elf(machine: int = 62) -> bytes:
    """The beginning of a program for a machine; 62 is x86-64."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, machine) + bytes(44)


def make_venv(
    root: Path, *, minor: str = "3.11", machine: int = 62, by_uv: bool = False, system_site: bool = False
) -> Path:
    """``root/env``, made from the installation ``root/base``."""
    base = root / "base"
    for folder in ("bin", f"lib/python{minor}/site-packages", f"include/python{minor}"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    program = base / f"bin/python{minor}"
    program.write_bytes(elf(machine))
    program.chmod(0o755)
    env = root / "env"
    (env / "bin").mkdir(parents=True)
    (env / "bin/python").symlink_to(program)
    (env / f"lib/python{minor}/site-packages").mkdir(parents=True)
    maker = "uv = 0.9.0\nversion_info" if by_uv else "version"
    site = "true" if system_site else "false"
    (env / "pyvenv.cfg").write_text(
        f"home = {base}/bin\ninclude-system-site-packages = {site}\n{maker} = {minor}.7\n", encoding="utf-8"
    )
    (env / "bin/activate").write_text(f"VIRTUAL_ENV='{env}'\nexport VIRTUAL_ENV\n", encoding="utf-8")
    return env


def site_of(env: Path, minor: str = "3.11") -> Path:
    return env / f"lib/python{minor}/site-packages"


def add(
    site: Path,
    name: str,
    version: str,
    *,
    files: Mapping[str, bytes | str] | None = None,
    requires: tuple[str, ...] = (),
    installer: str = "pip",
) -> Path:
    """Install a package; returns its dist-info."""
    contents = dict(files if files is not None else {f"{name.replace('-', '_')}/__init__.py": ""})
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n\nText.\n", encoding="utf-8")
    (info / "INSTALLER").write_text(f"{installer}\n", encoding="utf-8")
    for path, text in contents.items():
        target = site / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = [f"{path},sha256=x,1" for path in contents] + [f"{info.name}/METADATA,sha256=y,1", f"{info.name}/RECORD,,"]
    (info / "RECORD").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return info


def version_py(version: str, cuda: str | None, hip: str | None) -> str:
    """``torch/version.py`` as torch writes it."""
    told = {"cuda": cuda, "hip": hip}
    lines = [f"{key}: Optional[str] = {value!r}" for key, value in told.items()]
    return "\n".join(["from typing import Optional", f"__version__ = {version!r}", *lines]) + "\n"


def add_torch(
    site: Path,
    version: str = "2.7.1",
    *,
    local: str = "+cu126",
    cuda: str | None = "12.6",
    hip: str | None = None,
    installer: str = "pip",
    without: str = "",
) -> Path:
    """A torch; returns its dist-info."""
    files: dict[str, bytes | str] = dict.fromkeys(TORCH_FILES, "")
    files["torch/version.py"] = version_py(version + local, cuda, hip)
    files["torch/lib/libc10.so"] = b"..._ZN3c105ErrorC1ENSt7__cxx1112basic_string..."
    return add(site, "torch", version, files={k: v for k, v in files.items() if k != without}, installer=installer)


def add_needs(
    site: Path, *, triton: str = "3.3.1", transformers: str = "4.57.6", setuptools: str | None = "80.9.0"
) -> None:
    """What the kernels import beside torch."""
    if setuptools:
        add(site, "setuptools", setuptools)
    add(site, "einops", "0.8.1")
    add(site, "packaging", "25.0")
    add(site, "triton", triton)
    add(site, "transformers", transformers, requires=("packaging>=20.0", "sentencepiece; extra == 'all'"))


def tree(root: Path) -> dict[str, tuple[str, int]]:
    """Every path below ``root`` with its kind and the time of its last change, to see that nothing was touched."""
    return {
        str(path.relative_to(root)): ("link" if path.is_symlink() else "file", path.lstat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    } | {"folders": (str(sum(len(folders) for _, folders, _ in os.walk(root))), 0)}
