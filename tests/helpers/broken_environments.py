"""Environments for tests of doctor: real interpreters, real shared libraries, small stand-ins for torch and the rest.

What is compiled here is loaded by the real loader; torch and the kernels' packages are a few lines of Python each.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"

NEW = "NSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
FAIL_NEW = f"_ZN3c106detail14torchCheckFailEPKcS2_jRK{NEW}"
FAIL_OLD = "_ZN3c106detail14torchCheckFailEPKcS2_jRKSs"
ERROR_NEW, ERROR_OLD = f"_ZN3c105ErrorC2ENS_14SourceLocationE{NEW}", "_ZN3c105ErrorC2ENS_14SourceLocationESs"
SET_DEVICE = {"2.2": "_ZN3c104cuda9SetDeviceEi", "2.5": "_ZN3c104cuda9SetDeviceEa", "2.9": "_ZN3c104cuda9SetDeviceEab"}
OF_TORCH_25 = (FAIL_OLD, ERROR_OLD, SET_DEVICE["2.5"], "_ZN3c1021throwNullDataPtrErrorEv")

_TORCH = """
import ctypes, pathlib
from . import version
from .version import __version__
for _library in sorted((pathlib.Path(__file__).parent / "lib").glob("*.so")):
    ctypes.CDLL(str(_library), ctypes.RTLD_GLOBAL)
class _Tensor:
    def __getitem__(self, index): return self
    def __neg__(self): return self
    def contiguous(self): return self
    def item(self): return 4.0
def ones(*shape, device=None): return _Tensor()
class cuda:
    is_available = staticmethod(lambda: True)
    init = staticmethod(lambda: None)
    synchronize = staticmethod(lambda: None)
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda index: "a GPU")
"""
CONV = """
import causal_conv1d_cuda
def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    return causal_conv1d_cuda.causal_conv1d_fwd(x, weight, bias, seq_idx, None, None, None, False) if bias else x
"""
SCAN = """
import selective_scan_cuda
from causal_conv1d import causal_conv1d_fn
def selective_scan_fn(u, delta, A, B, C):
    return u
"""

_MODULE = """
extern void *PyModule_Create2(void *, int);
static struct { long a; void *b, *c; long d; void *e; const char *name, *doc; long size; void *f[5]; } definition =
    {1, 0, 0, 0, 0, "NAME", 0, -1};
void *PyInit_NAME(void) { FIRST return PyModule_Create2(&definition, 1013); }
"""
_compiled: dict[tuple[object, ...], Path] = {}


def compiler() -> str:
    """gcc; skips the test where there is none."""
    found = shutil.which("gcc")
    if found is None:
        pytest.skip("no gcc on this machine")
    return found


@dataclass(frozen=True)
class Source:
    """What a shared library has.

    Attributes:
        module: it is an extension module of that name.
        defines: symbols that it exports.
        needs: symbols that others must define.
        fatbin: the contents of its GPU code section.
        first: C statements that the module begins with when it is imported.
        soname: its name for others, and
        version: of its symbols, such as ``GLIBC_2.99``.
        against: libraries that it is linked to.
    """

    module: str = ""
    defines: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    fatbin: bytes = b""
    first: str = ""
    soname: str = ""
    version: str = ""
    against: tuple[Source, ...] = ()


def library(source: Source, folder: Path) -> Path:
    """Compile it, once in a test run; returns the file."""
    if source not in _compiled or not _compiled[source].exists():
        links = [library(other, folder) for other in source.against]
        target = folder / f"compiled-{len(_compiled)}.so"
        _compile(source, target, links)
        _compiled[source] = target
    return _compiled[source]


def _compile(source: Source, target: Path, links: list[Path]) -> None:
    lines = []
    for number, name in enumerate(source.defines):
        lines.append(f'int d{number}(void) __asm__("{name}"); int d{number}(void) {{ return {number}; }}')
    for number, name in enumerate(source.needs):
        lines.append(f'extern int n{number}(void) __asm__("{name}");')
    lines.append(
        f"int all{len(_compiled)}(void) {{ return 0{''.join(f' + n{i}()' for i in range(len(source.needs)))}; }}"
    )
    if source.module:
        lines.append(_MODULE.replace("NAME", source.module).replace("FIRST", source.first))
    if source.fatbin:
        numbers = ",".join(map(str, source.fatbin))
        lines.append(
            f'__attribute__((used, aligned(8), section(".nv_fatbin"))) static const unsigned char f[] = {{{numbers}}};'
        )
    command = [compiler(), "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(target), "-Wl,--no-as-needed"]
    if source.soname:
        command.append(f"-Wl,-soname,{source.soname}")
    if source.version:
        script = target.with_suffix(".version")
        script.write_text(f"{source.version} {{ *; }};")
        command.append(f"-Wl,--version-script,{script}")
    command += ["-x", "none", *map(str, links)] if links else []
    subprocess.run(command, input="\n".join(lines), text=True, check=True, capture_output=True)


def fatbin(*code: tuple[str, int, tuple[int, int]]) -> bytes:
    """A container of GPU code as nvcc writes it: ("sass" or "ptx", capability as 90, (major, minor) of its format)."""
    entries = b""
    for kind, capability, (major, minor) in code:
        payload = bytes(16)
        entries += struct.pack("<HHIQ", 2 if kind == "sass" else 1, 0x101, 64, len(payload))
        entries += struct.pack("<IIHHI", 0, 64, minor, major, capability) + bytes(64 - 32) + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


@dataclass
class Made:
    """An environment that was made, and how its user's shell is set.

    Attributes:
        prefix: its folder.
        site: its site-packages.
        home: the user's empty home.
        folder: the folder that the user works in, empty.
        variables: the user's environment variables.
    """

    prefix: Path
    site: Path
    home: Path
    folder: Path
    variables: dict[str, str]
    libraries: Path = field(default_factory=Path)

    @property
    def python(self) -> Path:
        return self.prefix / "bin/python"

    def extension(self, source: Source, suffix: str = "") -> Path:
        """Put an extension module into it."""
        target = self.site / f"{source.module}{suffix or SUFFIX}"
        shutil.copy(library(source, self.libraries), target)
        return target

    def package(self, name: str, files: Mapping[str, str]) -> Path:
        """Put a Python package into it."""
        for path, text in files.items():
            target = self.site / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return self.site / name

    def distribution(self, name: str, version: str, *, requires: Iterable[str] = (), **more: str) -> Path:
        """Put a dist-info into it; ``more`` are its further files by name."""
        return write_distribution(self.site, name, version, requires=requires, **more)

    def tool(self, name: str, script: str) -> Path:
        """Put a program first on PATH."""
        folder = self.home / "tools"
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        if str(folder) not in self.variables["PATH"].split(":"):
            self.variables["PATH"] = f"{folder}:{self.variables['PATH']}"
        return path

    def gpu(self, name: str = "NVIDIA A100-SXM4-80GB", capability: str = "8.0", driver: str = "580.65.06") -> None:
        """A GPU, by a stand-in for nvidia-smi; and the driver's library."""
        self.tool("nvidia-smi", f"echo '{name}, {capability}, {driver}'")
        folder = self.home / "driver"
        folder.mkdir(exist_ok=True)
        (folder / "libcuda.so.1").write_bytes(b"")
        self.variables["LD_LIBRARY_PATH"] = str(folder)


def write_distribution(site: Path, name: str, version: str, *, requires: Iterable[str] = (), **more: str) -> Path:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (folder / "METADATA").write_text("\n".join(lines) + "\n\nA package.\n")
    for file, text in more.items():
        (folder / file).write_text(text)
    return folder


def bare(root: Path, libraries: Path) -> Made:
    """An environment with nothing in it, as ``python -m venv --without-pip`` makes it."""
    prefix, home, folder = root / "env", root / "home", root / "work"
    site = prefix / f"lib/python{VERSION}/site-packages"
    for place in (prefix / "bin", site, home, folder):
        place.mkdir(parents=True)
    base = Path(sys.base_prefix) / "bin" / f"python{VERSION}"
    base = base if base.exists() else Path(sys.executable).resolve()
    (prefix / "bin/python").symlink_to(base)
    (prefix / "pyvenv.cfg").write_text(
        f"home = {base.parent}\ninclude-system-site-packages = false\nversion = {VERSION}\n"
    )
    variables = {
        "PATH": f"{prefix / 'bin'}:/usr/bin:/bin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PYTHONNOUSERSITE": "1",
    }
    return Made(prefix, site, home, folder, variables, libraries)


def torch(made: Made, version: str = "2.5.1+cu124", cuda: str = "12.4", defines: Iterable[str] = OF_TORCH_25) -> None:
    """A stand-in for torch whose libraries define what is given."""
    number = f"'{cuda}'" if cuda else "None"
    made.package("torch", {"__init__.py": _TORCH, "version.py": f"__version__ = '{version}'\ncuda = {number}\n"})
    (made.site / "torch/lib").mkdir()
    for name, source in (
        ("libc10.so", Source(defines=tuple(defines))),
        ("libtorch_cpu.so", Source(defines=("torch_cpu",))),
    ):
        shutil.copy(library(source, made.libraries), made.site / "torch/lib" / name)
    made.distribution("torch", version, INSTALLER="pip\n")


def kernels(made: Made, needs: Iterable[str] = OF_TORCH_25, **more: object) -> None:
    """Both packages with their extensions, which need what is given."""
    for module in ("causal_conv1d_cuda", "selective_scan_cuda"):
        made.extension(Source(module=module, needs=tuple(needs), **more))  # type: ignore[arg-type]
    made.package(
        "causal_conv1d",
        {
            "__init__.py": "from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn\n",
            "causal_conv1d_interface.py": CONV,
        },
    )
    made.package(
        "mamba_ssm",
        {
            "__init__.py": "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn\n",
            "ops/__init__.py": "",
            "ops/selective_scan_interface.py": SCAN,
            "modules/mamba_simple.py": "class Mamba: pass\n",
        },
    )
    made.distribution("causal-conv1d", "1.5.0", requires=["torch"], INSTALLER="pip\n")
    made.distribution("mamba-ssm", "2.2.4", requires=["torch", "packaging ; extra == 'dev'"], INSTALLER="pip\n")


def healthy(root: Path, libraries: Path) -> Made:
    """A whole environment in which nothing is wrong."""
    made = bare(root, libraries)
    torch(made)
    kernels(made)
    return made
