"""The compile cache: an object compiled once for (source, flags, toolkit, headers, architecture) is reused.

ccache does it: the one on PATH (conda-forge's, under pixi), else Debian's, unpacked into the tools. Builds use
paths relative to the sources (``recipes/common/compile.sh``), so another folder, prefix or Python finds the
same objects, and .cu files do without torch's headers (``recipes/common/own_headers.py``), so another torch does, too;
only the file that binds to both is compiled for each.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ssm_forge.base import platforms
from ssm_forge.base.errors import ForgeError
from ssm_forge.base.folders import give_place
from ssm_forge.base.paths import Workspace
from ssm_forge.base.platforms import LINUX_64
from ssm_forge.base.ui import note
from ssm_forge.bridge import deb_file, debian, pylock

_SIZE = "10G"


def environment(workspace: Workspace) -> dict[str, str]:
    """Variables that switch the cache on in a build; empty when there is no ccache or the user wants none.

    ``SSM_FORGE_CCACHE=off`` disables it, ``SSM_FORGE_CCACHE_DIR`` is its folder. ``SSM_FORGE_CCACHE_REMOTE`` names a
    shared cache as ccache writes it:
    ``redis://host``, ``http://host/path`` or ``file:///folder``.
    """
    choice = os.environ.get("SSM_FORGE_CCACHE", "")
    if choice == "off":
        return {"SSM_FORGE_CCACHE": ""}
    tool = choice or shutil.which("ccache") or _from_debian(workspace)
    if not tool:
        return {"SSM_FORGE_CCACHE": ""}
    folder = Path(os.environ.get("SSM_FORGE_CCACHE_DIR") or workspace.cache / "ccache").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "ccache.conf"
    if not settings.exists():
        settings.write_text(f"max_size = {_SIZE}\n")
    return {"SSM_FORGE_CCACHE": str(tool), "SSM_FORGE_CCACHE_DIR": str(folder)}


def _from_debian(workspace: Workspace) -> Path | None:
    """Debian's ccache, unpacked once; None where it can't be had, which is said and costs only time."""
    own = platforms.known_here() or LINUX_64
    lock = workspace.bridge_locks / f"debs.ccache{pylock.suffix(own)}.toml"
    identity = hashlib.sha256(lock.read_bytes()).hexdigest()[:12]
    root = workspace.cache / "tools" / f"ccache-{identity}"
    tool = root / "usr/bin/ccache"
    if tool.exists():
        return tool
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=".ccache-") as scratch:
            unpacked = Path(scratch) / "made"
            for path in debian.fetch_debs(debian.read_lock(lock), workspace).values():
                deb_file.unpack(path, unpacked)
            patchelf = shutil.which("patchelf") or "patchelf"
            library_path = f"$ORIGIN/../lib/{own.multiarch}"
            subprocess.run([patchelf, "--set-rpath", library_path, unpacked / "usr/bin/ccache"], check=True)
            subprocess.run([unpacked / "usr/bin/ccache", "--version"], check=True, capture_output=True)
            give_place(unpacked, root)
    except (ForgeError, OSError, subprocess.SubprocessError) as error:
        note(f"no compile cache, so nothing compiled is kept for the next build: {error}")
        return None
    return tool
