"""Builds source trees and puts them into an environment: as wheels where torch is pip's, else as conda packages."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssm_forge.base.errors import VerifyError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.base.ui import note, open_log, say
from ssm_forge.build.leftovers import sweep
from ssm_forge.existing import in_use
from ssm_forge.existing import install as existing_install
from ssm_forge.existing import plan as existing_plan
from ssm_forge.existing.plan import Wishes
from ssm_forge.existing.reader import Existing
from ssm_forge.flow import planning
from ssm_forge.flow.pipeline import base_of, install_packages
from ssm_forge.flow.plan import Options, Plan, PlannedPackage
from ssm_forge.package import wheel
from ssm_forge.trees.build import Built, build, look
from ssm_forge.trees.recipe import loads


def install(trees: Sequence[str], options: Options, existing: Existing | None, *, dry_run: bool) -> None:
    """Build each tree, in this order, and put all of them into an environment.

    Args:
        existing: one with a torch of pip's; None for the one that ``options`` name.

    Raises:
        ForgeError: whatever the step that failed says.
    """
    place = workspace()
    if dry_run:
        for where in trees:
            look(where, place)
        return
    sweep(place)
    if existing is not None:
        work = existing_plan.make(existing, options, Wishes({}, with_deps=True), place)
        in_use.require_idle(existing, work.torch)
        built = [build(where, work.plan, options.jobs, place) for where in trees]
        with existing_install.locked(existing, place), tempfile.TemporaryDirectory(prefix="ssm-forge-") as scratch:
            in_use.require_idle(existing, work.torch)  # Minutes later.
            for one in built:
                file = wheel.from_conda(one.file, Path(scratch), compress=False)
                replaced = existing_install.put(existing, one.tree.name, file)
                note(f"{one.tree.name} {replaced} was replaced by {one.tree.version}") if replaced else None
        python, prefix = existing.python, existing.root
    else:
        planned = planning.make(options, place)
        built = [build(where, planned, options.jobs, place) for where in trees]
        _into_prefix(replace(planned, packages=tuple(_planned(one) for one in built)), place)
        python, prefix = planned.prefix / "bin" / "python", planned.prefix
    for one in built:
        _require_loads(one.tree.name, python, existing.target if existing else None)
    say(f"Done: {', '.join(f'{one.tree.name} {one.tree.version}' for one in built)} in {prefix}")


def _planned(built: Built) -> PlannedPackage:
    return PlannedPackage("in channel", built.request)


def _into_prefix(work: Plan, place: Workspace) -> None:
    with open_log(place.logs, "install-tree") as log:
        install_packages(work, base_of(work), place, log)


def _require_loads(name: str, python: Path, beside: Path | None) -> None:
    """Load the libraries of a package as they are in the environment.

    Args:
        beside: the folder of ``--target``, which is not on Python's path by itself.

    Raises:
        VerifyError: when a library of the package does not load beside the environment's torch.
    """
    more = {"PYTHONPATH": str(beside)} if beside is not None else {}
    command = [str(python), "-c", loads(name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **more})
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        raise VerifyError(f"{name} was installed, and its kernels do not load: {said}.")
