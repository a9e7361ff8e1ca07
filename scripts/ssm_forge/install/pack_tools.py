"""The tools in a pack: this project and its wheels, so that the other machine needs only Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from ssm_forge.base.errors import MachineError, NetworkError
from ssm_forge.base.paths import Workspace

# What ./run needs to install a pack.
_PARTS = ("run", "pixi.toml", "pixi.lock", "scripts", "recipes", "patches", "LICENSE", "README.md")

_INSTALLER = """\
#!/bin/sh
# Installs this pack with no network at all. Needs Python {python} with the venv module; takes the options of
# './run unpack', such as --prefix DIR.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export SSM_FORGE_NO_PIXI=1 SSM_FORGE_PYTHON=python{python} PIP_NO_INDEX=1 PIP_FIND_LINKS="$here/wheels"
exec "$here/tools/run" unpack "$here" "$@"
"""


def add_tools(top: Path, workspace: Workspace) -> None:
    """Put ``tools/``, ``wheels/`` and ``install.sh`` into a pack that is being made.

    The wheels are for this machine's kind and this Python's minor version.

    Raises:
        NetworkError: when the wheels can't be downloaded.
        MachineError: when this Python has no pip.
    """
    tools = top / "tools"
    tools.mkdir()
    for name in _PARTS:
        source = workspace.root / name
        if source.is_dir():
            shutil.copytree(source, tools / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".pixi"))
        elif source.exists():
            shutil.copy(source, tools / name)
    wheels = top / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--require-hashes", "--only-binary", ":all:", "--no-deps", "--dest", str(wheels)]
    command += ["-r", str(workspace.root / "scripts" / "requirements.lock")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise MachineError(
            "this Python has no pip, which --with-tools needs.",
            fix="Run it as 'SSM_FORGE_NO_PIXI=1 ./run pack ...'.",
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise NetworkError(f"the tools could not be downloaded ({reason}).", fix="Check the network.")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    installer = top / "install.sh"
    installer.write_text(_INSTALLER.format(python=python), encoding="utf-8")
    installer.chmod(0o755)
