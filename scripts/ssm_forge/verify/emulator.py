"""Programs of another platform on this machine: QEMU's user emulation, and a C library for them to start with."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base import platforms
from ssm_forge.base.errors import ForgeError, MachineError
from ssm_forge.base.files import sha256_of
from ssm_forge.base.folders import give_place
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import Platform
from ssm_forge.bridge import deb_file, debian

# What of the packages is kept; the programs for all other machines are 20 times larger.
_KEPT = ("usr/bin/qemu-{machine}-static", "lib/{multiarch}", "usr/lib/{multiarch}", "lib/{loader}", "usr/share/doc")


@dataclass(frozen=True)
class Emulator:
    """What runs programs of another platform.

    Attributes:
        platform: whose programs it runs.
        program: qemu.
        root: the folder with the C library that they start with; an environment has none of its own.
    """

    platform: Platform
    program: Path
    root: Path

    @property
    def command(self) -> tuple[str, ...]:
        """What a program and its arguments are put after."""
        return str(self.program), "-L", str(self.root)

    @property
    def description(self) -> str:
        """What it is, for people."""
        said = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False).stdout
        words = said.partition("\n")[0].split()
        version = words[words.index("version") + 1] if "version" in words else "of an unknown version"
        return f"{self.program.name} {version}"


def foreign(prefix: Path) -> Platform | None:
    """The platform of an environment that is not this machine's; None where its Python runs here, or can't be read."""
    found = platforms.of_program(prefix / "bin/python")
    return found if isinstance(found, Platform) and found != platforms.known_here() else None


def find(platform: Platform, workspace: Workspace) -> Emulator:
    """Debian's QEMU for the programs of a platform, unpacked once, with Debian's C library of that platform.

    Raises:
        MachineError: where there is none that runs on this machine, or it can't be had.
    """
    lock = workspace.bridge_locks / f"debs.qemu-{platform.subdir}.toml"
    why = "no emulator is locked for it"
    if lock.exists() and platforms.known_here() == platforms.LINUX_64:
        root = workspace.cache / "tools" / f"qemu-{platform.machine}-{sha256_of(lock)[:12]}"
        emulator = Emulator(platform, root / f"usr/bin/qemu-{platform.machine}-static", root)
        if emulator.program.exists():
            return emulator
        try:
            _unpack(lock, platform, root, workspace)
            return emulator
        except (ForgeError, OSError) as error:
            why = str(error)
    raise MachineError(
        f"programs for {platform.people} do not run on this machine ({os.uname().machine}), and can't be emulated: "
        f"{why.rstrip('.')}.",
        fix=f"Run this on a machine that is {platform.people}.",
    )


def _unpack(lock: Path, platform: Platform, root: Path, workspace: Workspace) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=".qemu-") as scratch:
        unpacked, made = Path(scratch, "unpacked"), Path(scratch, "made")
        for path in debian.fetch_debs(debian.read_lock(lock), workspace).values():
            deb_file.unpack(path, unpacked)
        for pattern in _KEPT:
            name = pattern.format(machine=platform.machine, multiarch=platform.multiarch, loader=platform.loader)
            if (unpacked / name).exists() or (unpacked / name).is_symlink():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(unpacked / name, made / name)
        give_place(made, root)
