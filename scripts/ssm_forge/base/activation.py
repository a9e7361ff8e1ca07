"""Running programs inside an environment, activated as conda and pixi do it, without touching any profile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ssm_forge.base.errors import InstallError

# Settings of the tools' own Python and of an outer environment, which would leak into the inner one.
_OWN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "SSM_FORGE_LAUNCHER", "LD_LIBRARY_PATH", "PIXI_IN_SHELL", "INIT_CWD")


def activated_environment(prefix: Path) -> dict[str, str]:
    """The environment variables of a shell in which ``prefix`` was activated.

    Raises:
        InstallError: when an activation script of the environment fails.
    """
    from rattler.shell import ActivationVariables, Shell, activate

    outer = {key: value for key, value in os.environ.items() if key not in _OWN}
    tools = str(Path(sys.prefix) / "bin")
    path = [folder for folder in outer.get("PATH", "").split(os.pathsep) if folder != tools]
    script = activate(prefix, ActivationVariables(None, path), Shell.bash).script
    done = subprocess.run(
        # What the scripts print must not get among the variables.
        ["/bin/bash", "--noprofile", "--norc", "-c", f"exec 3>&1 1>&2\n{script}\nenv -0 >&3"],
        capture_output=True,
        env={**outer, "PATH": os.pathsep.join(path)},
        check=False,
    )
    if done.returncode:
        raise InstallError(f"{prefix} could not be activated: {done.stderr.decode(errors='replace').strip()}")
    pairs = (item.partition("=") for item in done.stdout.decode(errors="surrogateescape").split("\0") if item)
    return {key: value for key, _, value in pairs if key not in ("_", "SHLVL", "PWD")}
