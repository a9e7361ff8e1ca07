"""Doctor's first finding at the end of a task that failed; nothing where doctor finds nothing or can't look."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ssm_forge.base.paths import workspace
from ssm_forge.doctor import diagnosis, report
from ssm_forge.doctor.findings import Target

_MOST_SECONDS = 4.5
# Of an environment of tools alone: that the kernels are not in it is no failure.
_KERNELS = frozenset({"not-installed", "kernels-missing"})


def users_variables(outer: Mapping[str, str]) -> dict[str, str]:
    """Copy the environment variables ``outer``, without what ``./run`` and pixi's environment of the tools added."""
    root = workspace().root
    own = {str(Path(sys.prefix) / "bin"), str(root / ".pixi/envs/default/bin")}
    variables = {name: value for name, value in outer.items() if not name.startswith(("SSM_FORGE_LAUNCHER", "PIXI_"))}
    variables["PATH"] = os.pathsep.join(part for part in outer.get("PATH", "").split(os.pathsep) if part not in own)
    if variables.get("PYTHONPATH") == str(root / "scripts"):
        del variables["PYTHONPATH"]
    for name in ("CONDA_PREFIX", "VIRTUAL_ENV"):
        if variables.get(name) in (sys.prefix, str(root / ".pixi/envs/default")):
            del variables[name]
    return variables


def of_environment(prefix: Path, *, with_kernels: bool = True) -> str:
    """The first error that doctor finds in an environment, as text; empty where it finds none.

    Args:
        with_kernels: whether the kernels should be in it.
    """
    try:
        diagnosed = diagnosis.of_environment(prefix, users_variables(os.environ), Path.cwd(), seconds=_MOST_SECONDS)
        diagnosed.findings = [finding for finding in diagnosed.findings if with_kernels or finding.code not in _KERNELS]
        return report.first_line(diagnosed)
    except Exception:
        # The task's own failure is what counts: a second one must not hide it.
        return ""


def of_log(path: Path) -> str:
    """The first error that doctor recognises in a log, as text; empty where it recognises none."""
    try:
        return report.first_line(diagnosis.of_log(str(path), Target()))
    except Exception:
        return ""
