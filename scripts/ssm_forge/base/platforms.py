"""The platforms that packages are made for, and what each of them is called by conda, Debian, NVIDIA and the kernel."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base.errors import MachineError, UsageError, did_you_mean


@dataclass(frozen=True)
class Platform:
    """A kind of machine that packages can be for.

    Attributes:
        subdir: conda's name, which is that of a channel's folder too: ``linux-64``.
        machine: as uname, wheels and compilers have it: ``x86_64``.
        people: as people write it: ``x86-64``.
        debian: Debian's name of the architecture: ``amd64``.
        cuda_target: NVIDIA's name of the folder below ``targets/``: ``x86_64-linux``.
        elf: number of the machine in the header of an ELF file.
        loader: file name of the program that loads programs.
    """

    subdir: str
    machine: str
    people: str
    debian: str
    cuda_target: str
    elf: int
    loader: str

    @property
    def triple(self) -> str:
        """What conda's compilers for it are called by: ``x86_64-conda-linux-gnu``."""
        return f"{self.machine}-conda-linux-gnu"

    @property
    def multiarch(self) -> str:
        """Debian's folder of its libraries, which is also in the names of Python's extensions: ``x86_64-linux-gnu``."""
        return f"{self.machine}-linux-gnu"

    @property
    def targets(self) -> str:
        """Where a toolkit of conda-forge's layout has its headers and libraries, below the prefix."""
        return f"targets/{self.cuda_target}"

    @property
    def wheel(self) -> str:
        """The tag of a wheel that says nothing about the C library: ``linux_x86_64``."""
        return f"linux_{self.machine}"


LINUX_64 = Platform("linux-64", "x86_64", "x86-64", "amd64", "x86_64-linux", 62, "ld-linux-x86-64.so.2")
LINUX_AARCH64 = Platform("linux-aarch64", "aarch64", "aarch64", "arm64", "sbsa-linux", 183, "ld-linux-aarch64.so.1")

# Packages were made for the first alone, so whatever says nothing is for that.
PLATFORMS = (LINUX_64, LINUX_AARCH64)


def of(subdir: str) -> Platform:
    """The platform that conda calls so.

    Raises:
        UsageError: for one that nothing is made for.
    """
    found = next((known for known in PLATFORMS if known.subdir == subdir), None)
    if found is None:
        names = [known.subdir for known in PLATFORMS]
        raise UsageError(
            f"there is no platform '{subdir}' here; there are {' and '.join(names)}.",
            fix=f"{did_you_mean(subdir, names)}Use --platform {names[0]} or --platform {names[1]}.",
        )
    return found


def of_debian(architecture: str) -> Platform:
    """The platform of Debian's architecture ``amd64`` or ``arm64``.

    Raises:
        UsageError: for another, or for ``all``.
    """
    found = next((known for known in PLATFORMS if known.debian == architecture), None)
    if found is None:
        raise UsageError(f"Debian's architecture '{architecture}' is none that packages are made for.")
    return found


def of_elf(header: bytes) -> Platform | str | None:
    """The platform of an ELF file by its first 20 bytes; its number for any other, None for a file that is none."""
    if header[:4] != b"\x7fELF" or len(header) < 20:
        return None
    number = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return next((known for known in PLATFORMS if known.elf == number), f"machine {number}")


def of_program(path: Path) -> Platform | str | None:
    """As :func:`of_elf`, of a file; None where there is none, or it can't be read."""
    try:
        with path.open("rb") as stream:
            return of_elf(stream.read(20))
    except OSError:
        return None


def known_here(machine: str = "") -> Platform | None:
    """This machine's platform; None for one that nothing is made for.

    Args:
        machine: as uname has it; else this machine's.
    """
    name = (machine or platform.machine()).lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
    return next((known for known in PLATFORMS if known.machine == name), None)


def here(machine: str = "") -> Platform:
    """This machine's platform.

    Args:
        machine: as uname has it; else this machine's.

    Raises:
        MachineError: for one that nothing is made for.
    """
    found = known_here(machine)
    if found is None:
        raise MachineError(
            f"this machine is {machine or platform.machine()}, and packages are made for "
            f"{' and '.join(known.people for known in PLATFORMS)} only."
        )
    return found
