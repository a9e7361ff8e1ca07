"""What compiling each source file takes, as ``bench build --record`` measured it.

Two things follow: the order in which ninja starts them (``recipes/common/order.py`` reads the same file), and how
many compilers fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ssm_forge.base.errors import BuildError
from ssm_forge.base.files import write_whole
from ssm_forge.base.paths import Workspace
from ssm_forge.build.schedule import Job, longest_first
from ssm_forge.manifest.recipe import EXTENSIONS, PROJECTS

_HEADER = (
    "# What compiling each source file takes for one capability: CPU seconds, and the peak memory of its compilers",
    "# in megabytes. Written by './run bench build --record'; decides the order and number of parallel compilers.",
)


def path(workspace: Workspace) -> Path:
    """The file with the costs."""
    # Beside the recipes and not in their digest: no byte of a package depends on it.
    return workspace.recipes / "compile-costs.txt"


def load(workspace: Workspace, projects: Iterable[str] = PROJECTS) -> list[Job]:
    """The compiler runs of the projects' source files, with what each took.

    Raises:
        BuildError: when the file is missing, is damaged, or has nothing on one of the projects.
    """
    file = path(workspace)
    wanted = {EXTENSIONS[project] for project in projects}
    jobs: list[Job] = []
    extensions = set()
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                extension, source, seconds, megabytes = line.split()
                extensions.add(extension)
                if extension in wanted:
                    jobs.append(Job(source, float(seconds), int(megabytes) * 1_000_000))
    except (OSError, ValueError) as error:
        raise BuildError(f"{file} can't be read ({error}).", fix=f"Restore it: git checkout {file}") from error
    if missing := sorted(wanted - extensions):
        raise BuildError(f"{file} has no costs of {', '.join(missing)}.", fix=f"Restore it: git checkout {file}")
    return jobs


def write(workspace: Workspace, costs: Mapping[str, Sequence[Job]]) -> Path:
    """Write what was measured (extension -> the compiler runs of its files), and return the file."""
    lines = list(_HEADER)
    for extension, jobs in sorted(costs.items()):
        for job in longest_first(jobs):
            lines.append(f"{extension} {job.name} {job.seconds:.1f} {-(-job.memory_bytes // 1_000_000)}")
    file = path(workspace)
    write_whole(file, ("\n".join(lines) + "\n").encode())
    return file
