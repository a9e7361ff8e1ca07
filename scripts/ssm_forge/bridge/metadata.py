"""Wheel METADATA as conda metadata: names, versions, requirements."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from ssm_forge.base.platforms import LINUX_64

# PyPI's name -> conda-forge's, where they differ.
_CONDA_NAMES = {
    "torch": "pytorch",
    "typing-extensions": "typing_extensions",
    "huggingface-hub": "huggingface_hub",
}

# NVIDIA's libraries, by their wheels' names without "nvidia-" and "-cu12" -> conda-forge's name.
CUDA_LIBRARIES = {
    "cublas": "libcublas",
    "cuda-cupti": "cuda-cupti",
    "cuda-nvrtc": "cuda-nvrtc",
    "cuda-runtime": "cuda-cudart",
    "cudnn": "libcudnn",
    "cufft": "libcufft",
    "cufile": "libcufile",
    "curand": "libcurand",
    "cusolver": "libcusolver",
    "cusparse": "libcusparse",
    "cusparselt": "cusparselt",
    "nccl": "nccl",
    "nvjitlink": "libnvjitlink",
    "nvshmem": "libnvshmem3",
    "nvtx": "cuda-nvtx",
}


def project(name: str) -> str:
    """``cublas`` for ``nvidia-cublas-cu12``."""
    return re.sub(r"^nvidia-|-cu\d\d$", "", name)


def conda_name(name: str) -> str:
    """conda-forge's name of a project, from PyPI's."""
    canonical = canonicalize_name(name)
    if canonical.startswith("nvidia-"):
        return CUDA_LIBRARIES.get(project(canonical), canonical)
    return _CONDA_NAMES.get(canonical, canonical)


@dataclass(frozen=True)
class Distribution:
    """What a wheel's METADATA says.

    Attributes:
        requires: requirements, markers unevaluated.
        license: SPDX expression or the free text given.
        machine: the kind of machine that its markers are asked about, as uname has it.
    """

    name: str
    version: str
    requires: tuple[Requirement, ...]
    license: str
    summary: str
    machine: str = LINUX_64.machine


def read(wheel: Path, machine: str = LINUX_64.machine) -> Distribution:
    """The METADATA of a wheel file, for machines of a kind."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        headers = HeaderParser().parsestr(archive.read(member).decode("utf-8", "replace"))
    license_text = headers.get("License-Expression") or headers.get("License") or ""
    return Distribution(
        name=canonicalize_name(headers["Name"]),
        version=headers["Version"],
        requires=tuple(Requirement(text) for text in headers.get_all("Requires-Dist", [])),
        license=license_text.strip().splitlines()[0][:80] if license_text.strip() else "",
        summary=headers.get("Summary", ""),
        machine=machine,
    )


def conda_depends(dist: Distribution, others: Mapping[str, Distribution], python: str) -> list[str]:
    """Run requirements of ``dist`` for one Python minor on Linux.

    An extra of another distribution (``cuda-toolkit[cublas]``) becomes that extra's own requirements, since
    conda packages have none. Requirements on what the lock does not hold are left out: the lock was solved
    without them, so no marker asked for them.

    Args:
        others: every distribution of the lock by canonical name.
        python: ``3.12``.
    """
    requirements: dict[str, SpecifierSet] = {}
    _collect(dist, "", others, marker_environment(python, machine=dist.machine), requirements)
    return [f"{name} {conda_version(specifiers)}".strip() for name, specifiers in sorted(requirements.items())]


def _collect(
    dist: Distribution,
    extra: str,
    others: Mapping[str, Distribution],
    environment: dict[str, str],
    requirements: dict[str, SpecifierSet],
) -> None:
    for requirement in dist.requires:
        # The distribution's own requirements are collected where it is named without the extra.
        if extra and "extra" not in str(requirement.marker or ""):
            continue
        if requirement.marker and not requirement.marker.evaluate({**environment, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in others:
            continue
        # One project may be named twice, with different markers: both ranges hold.
        requirements[conda_name(name)] = requirements.get(conda_name(name), SpecifierSet()) & requirement.specifier
        for inner in requirement.extras:
            _collect(others[name], inner, others, environment, requirements)


def conda_version(specifiers: SpecifierSet) -> str:
    """A PEP 440 range as conda writes it: ``>=1.0,<2``, ``1.2.*``, ``==1.2``."""
    parts = []
    for specifier in sorted(specifiers, key=str):
        operator, version = specifier.operator, specifier.version.partition("+")[0]
        if operator == "~=":
            series = ".".join(map(str, Version(version).release[:-1]))
            parts.append(f">={version},{series}.*")
        elif operator == "==" and version.endswith(".*"):
            parts.append(version)
        elif operator == "===":
            parts.append(f"=={version}")
        else:
            parts.append(f"{operator}{version}")
    return ",".join(parts)


def marker_environment(python: str, full: str = "", machine: str = LINUX_64.machine) -> dict[str, str]:
    """The values of PEP 508's markers here, for a Python minor; ``full`` is its whole version where that is known."""
    full = full or f"{python}.0"
    return {
        "implementation_name": "cpython",
        "implementation_version": full,
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": full,
        "python_version": python,
        "sys_platform": "linux",
    }
