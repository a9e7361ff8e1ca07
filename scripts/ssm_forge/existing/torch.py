"""The torch of an environment, read from its files: release, CUDA, C++ ABI, and whose it is."""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base.errors import InstallError
from ssm_forge.existing.reader import Existing, conda_records, read_distribution, read_record

# What compiling against it takes.
_NEEDED = ("__init__.py", "include/torch/extension.h", "include/c10/util/Exception.h", "utils/cpp_extension.py")
_LIBRARIES = ("libc10.so", "libc10_cuda.so", "libtorch_cpu.so", "libtorch_cuda.so", "libtorch_python.so")
_CONDA_NAMES = ("pytorch", "pytorch-gpu", "libtorch")


@dataclass(frozen=True)
class Torch:
    """A torch with CUDA that kernels can be compiled against.

    Attributes:
        folder: the package's folder.
        version: ``2.7.1+cu126``.
        cuda: of the build, ``12.6``.
        cxx11: whether its C++ ABI is the one of GCC 5 and later.
        identity: a digest of its files: the same for the same wheel, whoever installed it and wherever.
    """

    folder: Path
    version: str
    cuda: str
    cxx11: bool
    identity: str

    @property
    def release(self) -> str:
        return self.version.partition("+")[0]

    @property
    def minor(self) -> str:
        return ".".join(self.release.split(".")[:2])


def is_condas(prefix: Path) -> bool:
    """Whether the torch of a conda environment is a conda package, by conda's own records.

    Raises:
        InstallError: when conda's records and what is installed are two torches.
    """
    records = conda_records(prefix)
    record = next(((name, *records[name]) for name in _CONDA_NAMES if name in records), None)
    if record is None:
        return False
    name, version, build = record
    for info in sorted(prefix.glob("lib/python3*/site-packages/torch-*.dist-info")):
        distribution = read_distribution(info)
        if distribution is not None and (
            distribution.version.partition("+")[0] != version or distribution.installer in ("pip", "uv")
        ):
            raise InstallError(
                f"{prefix} has two torches, one over the other: conda's {name} {version} ({build}), and "
                f"torch {distribution.version} that {distribution.installer or 'pip'} installed.",
                fix=f"Remove one: '{prefix}/bin/python -m pip uninstall torch' and then conda's again with "
                f"'conda install --force-reinstall {name}', or 'conda remove --force {name}' and then pip's again.",
            )
    return True


def read(existing: Existing) -> Torch:
    """The torch that an environment's Python imports, from the environment's files.

    Raises:
        InstallError: when there is none, it is broken, there are two, or it is one without CUDA.
    """
    where = existing.prefix
    site = next((site for site in existing.folders if (site / "torch").is_dir()), None)
    infos = sorted((site or existing.sites[0]).glob("torch-*.dist-info"))
    if len(infos) > 1:
        names = " and ".join(info.name.removesuffix(".dist-info") for info in infos)
        raise InstallError(
            f"{where} has two torches, {names}, one over the other.",
            fix=f"Remove both and install one: {_again(existing, 'torch')}.",
        )
    if site is None:
        more = ", though its dist-info is there" if infos else ""
        raise InstallError(f"{where} has no torch{more}.", fix=f"Install one with CUDA: {_again(existing, 'torch')}.")
    folder = site / "torch"
    version_py = _text(folder / "version.py")
    version = re.search(r"^__version__ *(?::[^=]*)?= *['\"]([^'\"]+)", version_py, re.MULTILINE)
    if version is None:
        raise InstallError(
            f"the torch in {folder} is broken: its version.py tells no version.",
            fix=f"Install it again: {_again(existing, '--force-reinstall torch')}.",
        )
    release = version.group(1)
    info = next((path for path in sorted(site.glob("torch-*.dist-info"))), None)
    listed = read_distribution(info) if info else None
    if info is None or listed is None:
        state = "there is none" if info is None else f"{info} has no METADATA with a name and a version"
        raise InstallError(
            f"the torch {release} in {folder} has no usable dist-info ({state}).",
            fix=f"Install it again: {_again(existing, f'--force-reinstall torch=={release}')}.",
        )
    if listed.version.partition("+")[0] != release.partition("+")[0]:
        raise InstallError(
            f"{where} has two torches, one over the other: {folder}/version.py says {release}, {info.name} says "
            f"{listed.version}.",
            fix=f"Install one again: {_again(existing, f'--force-reinstall torch=={listed.version}')}.",
        )
    cuda = _cuda(version_py, release, existing)
    _check_whole(folder, release, existing)
    # Of torch's own symbols: the C++ library, which is in it, has those of both ABIs.
    cxx11 = re.search(rb"_ZN3c105ErrorC[12]\w*__cxx11", (folder / "lib/libc10.so").read_bytes()) is not None
    return Torch(folder, release, cuda, cxx11, _identity(info))


def _again(existing: Existing, what: str) -> str:
    """The line that installs something into the environment."""
    if existing.target is not None:
        what = f"--target {shlex.quote(str(existing.target))} {what}"
    if existing.by_uv:
        return f"'uv pip install --python {existing.python} {what}'".replace("--force-reinstall", "--reinstall")
    return f"'{existing.python} -m pip install {what}'"


def _cuda(version_py: str, release: str, existing: Existing) -> str:
    cuda = re.search(r"^cuda *(?::[^=]*)?= *['\"](\d+\.\d+)", version_py, re.MULTILINE)
    if cuda:
        return cuda.group(1)
    hip = re.search(r"^hip *(?::[^=]*)?= *['\"]([\d.]+)", version_py, re.MULTILINE)
    kind = f"for AMD's ROCm {hip.group(1)}" if hip else "without CUDA (a CPU-only build)"
    again = _again(existing, f"--force-reinstall torch=={release.partition('+')[0]}")
    raise InstallError(
        f"the torch {release} of {existing.prefix} is one {kind}; the kernels are for NVIDIA GPUs.",
        fix=f"Install one with CUDA: {again}.",
    )


def _check_whole(folder: Path, release: str, existing: Existing) -> None:
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    missing += [f"lib/{name}" for name in _LIBRARIES if not (folder / "lib" / name).exists()]
    if missing:
        again = _again(existing, f"--force-reinstall torch=={release.partition('+')[0]}")
        raise InstallError(
            f"the torch {release} in {folder} is broken: it has no {missing[0]}.",
            fix=f"Install it again: {again}.",
        )


def _identity(info: Path) -> str:
    """Of what the wheel brought: neither of what installers add, nor of the folder that it is in."""
    lines = sorted(
        f"{path} {digest}"
        for path, digest in read_record(info)
        if path.startswith(("torch/", "torchgen/", "functorch/")) and digest and not path.endswith(".pyc")
    )
    if not lines:
        raise InstallError(f"{info} is broken: its RECORD lists no file of torch.", fix="Install torch again.")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
