"""What the machine has: GPUs and driver, C library, compilers, memory, disks."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.doctor.binary import numbers
from ssm_forge.doctor.environment import text_of
from ssm_forge.doctor.processes import Clock, ask

_SYSTEM_FOLDERS = (
    *(f"{folder}/{machine}-linux-gnu" for machine in ("x86_64", "aarch64") for folder in ("/lib", "/usr/lib")),
    *("/lib64", "/usr/lib64", "/usr/lib", "/lib"),
)
WSL_FOLDER = "/usr/lib/wsl/lib"


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it; ``capability`` as (9, 0)."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class System:
    """The machine as the user's shell sees it.

    Attributes:
        variables: environment variables.
        folder: the working folder.
        gpus: those that nvidia-smi lists.
        driver: version of the NVIDIA driver, (580, 65, 6); empty where there is none.
        driver_text: the same as it is written, ``580.65.06``.
        smi_error: what nvidia-smi said where it failed.
        glibc: (2, 36); empty with another C library.
        nvccs: every nvcc that a build could take: CUDA_HOME's, then PATH's.
    """

    variables: Mapping[str, str]
    folder: Path
    gpus: tuple[Gpu, ...]
    driver: tuple[int, ...]
    driver_text: str
    smi_error: str
    glibc: tuple[int, ...]
    nvccs: tuple[Path, ...]

    @property
    def driver_cuda(self) -> int:
        """The CUDA major that the driver runs; 0 where that is not known."""
        first = self.driver[0] if self.driver else 0
        return 13 if first >= 580 else 12 if first >= 525 else 11 if first >= 450 else 10 if first else 0

    def which(self, name: str) -> str | None:
        """The path of a program on the user's PATH; None where there is none."""
        return shutil.which(name, path=self.variables.get("PATH"))

    def loader_folders(self) -> list[Path]:
        """The folders in which the loader looks after LD_LIBRARY_PATH."""
        folders = [Path(folder) for folder in _SYSTEM_FOLDERS]
        for file in sorted(Path("/etc/ld.so.conf.d").glob("*.conf")):
            folders += [Path(line.strip()) for line in text_of(file).splitlines() if line.strip().startswith("/")]
        return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]

    def path_of(self, variable: str) -> list[Path]:
        """The folders that a variable lists; none for an empty entry."""
        return [Path(entry) for entry in self.variables.get(variable, "").split(":") if entry]


def look(variables: Mapping[str, str], folder: Path, clock: Clock) -> System:
    """The machine as it answers now; what does not answer is left out.

    Args:
        variables: the user's environment variables.
        folder: the user's working folder.
    """
    gpus: list[Gpu] = []
    driver = error = ""
    smi = shutil.which("nvidia-smi", path=variables.get("PATH"))
    if smi is not None:
        query = [smi, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
        answer = ask(query, variables, clock.left(0.6))
        for line in answer.output.splitlines():
            match = re.match(r"(.+), *(\d+)\.(\d), *(\d+(?:\.\d+)*) *$", line)
            if match is not None:
                gpus.append(Gpu(match.group(1).strip(), (int(match.group(2)), int(match.group(3)))))
                driver = match.group(4)
        if not gpus:
            lines = (answer.output + answer.errors).strip().splitlines()
            error = lines[0][:200] if lines else "nvidia-smi did not answer" if answer.code is None else ""
    if not driver:
        loaded = re.search(r"Kernel Module\D* (\d+(?:\.\d+)+)", text_of(Path("/proc/driver/nvidia/version")))
        driver = loaded.group(1) if loaded else ""
    return System(variables, folder, tuple(gpus), numbers(driver), driver, error, _glibc(), _nvccs(variables))


def _glibc() -> tuple[int, ...]:
    try:
        return numbers((os.confstr("CS_GNU_LIBC_VERSION") or "").rpartition(" ")[2])
    except (ValueError, OSError, AttributeError):
        return ()


def _nvccs(variables: Mapping[str, str]) -> tuple[Path, ...]:
    homes = [variables.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) / "bin" for home in homes if home]
    folders += [Path(folder) for folder in variables.get("PATH", "").split(os.pathsep) if folder]
    folders.append(Path("/usr/local/cuda/bin"))
    paths: dict[Path, Path] = {}
    for folder in folders:
        path = folder / "nvcc"
        # Not Path.is_file(): a folder that may not be read is no nvcc either.
        if os.path.isfile(str(path)) and os.access(str(path), os.X_OK):  # noqa: PTH113
            paths.setdefault(path.resolve(), path)
    return tuple(paths.values())


def nvcc_release(nvcc: Path, variables: Mapping[str, str], clock: Clock) -> tuple[int, ...]:
    """The CUDA release of an nvcc, (12, 4); empty where it does not say."""
    output = ask([str(nvcc), "--version"], variables, clock.left(0.4)).output
    match = re.search(r"release (\d+\.\d+)", output)
    return numbers(match.group(1)) if match else ()


def free_memory() -> int:
    """Bytes that programs can still get; the control group's limit counts. 0 where that is not known."""
    match = re.search(r"^MemAvailable: *(\d+) kB", text_of(Path("/proc/meminfo")), re.MULTILINE)
    free = int(match.group(1)) * 1024 if match else 0
    limit = text_of(Path("/sys/fs/cgroup/memory.max")).strip()
    used = text_of(Path("/sys/fs/cgroup/memory.current")).strip()
    if limit.isdigit() and used.isdigit():
        cached = re.findall(r"^(?:in)?active_file (\d+)", text_of(Path("/sys/fs/cgroup/memory.stat")), re.MULTILINE)
        free = min(free, int(limit) - int(used) + sum(map(int, cached)))
    return max(free, 0)


def free_disk(folder: Path) -> int | None:
    """Bytes free on the disk of a folder; None where it can't be told."""
    try:
        return shutil.disk_usage(str(folder)).free
    except OSError:
        return None


def lacks_file_locks(folder: Path) -> bool:
    """Whether the file system of a folder has no file locks; nothing is written for that."""
    try:
        import fcntl

        handle = os.open(str(folder), os.O_RDONLY)
    except (OSError, ImportError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
    finally:
        os.close(handle)
