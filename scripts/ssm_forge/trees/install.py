"""Builds source trees and puts them into an environment: as wheels where torch is pip's, else as conda packages."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssm_forge.base import paths
from ssm_forge.base.errors import VerifyError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import note, open_log, out, say
from ssm_forge.build.leftovers import sweep
from ssm_forge.channel import policy
from ssm_forge.existing import in_use
from ssm_forge.existing import install as existing_install
from ssm_forge.existing.reader import Existing
from ssm_forge.flow.pipeline import base_of, install_packages
from ssm_forge.flow.plan import Options, Plan, PlannedPackage
from ssm_forge.package import wheel
from ssm_forge.trees import target
from ssm_forge.trees.build import Built, as_record, build, look
from ssm_forge.trees.recipe import imports, loads


def install(
    addresses: Sequence[str], options: Options, existing: Existing | None, *, dry_run: bool, as_json: bool
) -> None:
    """Build the tree at each address, in this order, put all of them into an environment, and load their kernels.

    Args:
        existing: an environment with a torch of pip's; None for the one that ``options`` name.
        dry_run: say what the trees are, and build nothing.
        as_json: print what was done as JSON.

    Raises:
        ForgeError: whatever the step that failed says.
    """
    workspace = paths.workspace()
    if dry_run:
        seen = [look(address, workspace) for address in addresses]
        trees = [{"name": t.name, "version": t.version, **as_record(t, patches)} for t, patches in seen]
        if as_json:
            out.print_json(json.dumps({"trees": trees}))
        return
    sweep(workspace)
    if existing is not None:
        plan, built = _into_existing(addresses, options, existing, workspace)
        python, folder = existing.python, existing.root
    else:
        plan, built = _into_prefix(addresses, options, workspace)
        python, folder = plan.prefix / "bin" / "python", plan.prefix
    for one in built:
        _require_loads(one.tree.name, python, existing.target if existing else None)
    if as_json:
        trees = [{"name": b.tree.name, "version": b.tree.version, **as_record(b.tree, [*b.patches])} for b in built]
        out.print_json(json.dumps({**target.merged(plan, built).as_dict(), "changed": True, "trees": trees}))
    say(f"Done: {', '.join(f'{one.tree.name} {one.tree.version}' for one in built)} in {folder}")


def _into_existing(
    addresses: Sequence[str], options: Options, existing: Existing, workspace: Workspace
) -> tuple[Plan, list[Built]]:
    """Build for the torch of an environment, and put wheels into it."""
    plan, torch = target.of_existing(existing, options, workspace)
    in_use.require_idle(existing, torch)
    built = [build(address, plan, options.jobs, workspace) for address in addresses]
    with existing_install.locked(existing, workspace), tempfile.TemporaryDirectory(prefix="ssm-forge-") as scratch:
        in_use.require_idle(existing, torch)  # Minutes later.
        for one in built:
            file = wheel.from_conda(one.file, Path(scratch), compress=False)
            replaced = existing_install.put(existing, one.tree.name, file)
            if replaced:
                note(f"{one.tree.name} {replaced} was replaced by {one.tree.version}")
    return plan, built


def _into_prefix(addresses: Sequence[str], options: Options, workspace: Workspace) -> tuple[Plan, list[Built]]:
    """Build for a variant, and put conda packages into a prefix."""
    plan = target.of_variant(options, workspace)
    policy.require_used(plan.trust, plan.channels)
    built = [build(address, plan, options.jobs, workspace) for address in addresses]
    packages = tuple(PlannedPackage("in channel", one.package.request) for one in built)
    with open_log(workspace.logs, "install-tree") as log:
        install_packages(replace(plan, packages=packages), base_of(plan), workspace, log)
    return plan, built


def _require_loads(name: str, python: Path, beside: Path | None) -> None:
    """Load the libraries of a package as they are in the environment, and say which of its modules don't import.

    Args:
        beside: the folder of ``--target``, which is not on Python's path by itself.

    Raises:
        VerifyError: when a library of the package does not load beside the environment's torch.
    """
    loaded = _run(python, loads(name), beside)
    if loaded.returncode:
        last_line = loaded.stderr.strip().rpartition("\n")[2]
        raise VerifyError(f"{name} was installed, and its kernels do not load: {last_line}.")
    # Its Python code may need a GPU, or older releases of what it imports than there are: whoever named it knows.
    for failure in _run(python, imports(name), beside).stdout.splitlines():
        note(f"its kernels load, and this module of {name} does not import here: {failure}")


def _run(python: Path, program: str, beside: Path | None) -> subprocess.CompletedProcess[str]:
    variables = {"PYTHONPATH": str(beside)} if beside is not None else {}
    command = [str(python), "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
