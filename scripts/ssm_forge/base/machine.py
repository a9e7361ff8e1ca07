"""What this machine is: GPU and driver, glibc, cores, memory, disk."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from ssm_forge.base.arch import Capability


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as the driver reports it.

    Attributes:
        name: product name.
        capability: compute capability.
        driver: driver version, ``580.65.06``.
    """

    name: str
    capability: Capability
    driver: str


@functools.lru_cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; empty where there is no driver or it does not answer in 10 s."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    listed = []
    for line in answer.splitlines():
        parts = [part.strip() for part in line.rsplit(",", 2)]
        # Warnings come on stdout too, and a GPU that fell off the bus answers "[N/A]".
        if len(parts) == 3 and re.fullmatch(r"\d+\.\d", parts[1]):
            listed.append(Gpu(parts[0], Capability.parse(parts[1]), parts[2]))
    return tuple(listed)


def glibc() -> str:
    """The running C library, ``2.36``."""
    return platform.libc_ver()[1]


def cores() -> int:
    """Cores this process may use (affinity and cgroup quota respected)."""
    usable = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, _, period = quota.read_text().partition(" ")
        if limit != "max":
            usable = min(usable, max(1, int(limit) // int(period)))
    return usable


def free_memory() -> int:
    """Bytes that can be used without swapping, cgroup limits included."""
    available = psutil.virtual_memory().available
    limit_file, used_file = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit_file.exists() and used_file.exists():
        limit = limit_file.read_text().strip()
        if limit != "max":
            used = int(used_file.read_text()) - _page_cache(limit_file.with_name("memory.stat"))
            available = min(available, int(limit) - used)
    return int(available)


def _page_cache(statistics: Path) -> int:
    """Bytes that a cgroup is charged for as cached files, which the kernel gives back when asked for memory."""
    if not statistics.exists():
        return 0
    fields = dict(line.split() for line in statistics.read_text().splitlines())
    return int(fields.get("active_file", 0)) + int(fields.get("inactive_file", 0))


def free_disk(path: Path) -> int:
    """Bytes free on the disk of ``path``, or of its nearest parent that exists."""
    return shutil.disk_usage(_existing(path)).free


def device(path: Path) -> int:
    """The number of the file system of ``path``, or of its nearest parent that exists."""
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
