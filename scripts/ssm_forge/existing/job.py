"""Carries out an installation into an environment that is there: build what is missing, wheels, checks."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from ssm_forge.base import paths
from ssm_forge.base.errors import UsageError, VerifyError
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.tables import FoldingTable
from ssm_forge.base.ui import Log, human_bytes, human_seconds, note, open_log, out, say
from ssm_forge.build.leftovers import sweep
from ssm_forge.existing import check, in_use, install, needs, plan, reader
from ssm_forge.existing.plan import Wishes, Work
from ssm_forge.existing.reader import Existing
from ssm_forge.flow.pipeline import build_missing, prepare
from ssm_forge.flow.plan import Options
from ssm_forge.package import wheel
from ssm_forge.verify.report import show


def install_mamba(existing: Existing, options: Options, wishes: Wishes, *, dry_run: bool, as_json: bool) -> None:
    """Make the kernels for the torch of an environment, install them into it, and verify them there.

    Raises:
        ForgeError: whatever the step that failed says.
    """
    # Long: the steps of one installation, in their order.
    workspace = paths.workspace()
    if not dry_run:
        sweep(workspace)
    check_options(existing, options)
    work = plan.make(existing, options, wishes, workspace)
    if dry_run:
        _show(work, as_json)
        return
    if work.plan.nothing_to_do and not work.needs.wanted:
        say(f"Nothing to do: {_names(work)} are installed in {existing.root}.")
        if as_json:
            out.print_json(json.dumps({**work.as_dict(), "changed": False}))
        return
    started = time.monotonic()
    in_use.require_idle(existing, work.torch)
    with open_log(workspace.logs, "install-mamba") as log, install.locked(existing, workspace):
        _announce(work)
        if work.needs.wanted:
            needs.install(existing, work.needs.wanted, log)
            say(f"Installed {', '.join(work.needs.wanted)}, as --with-deps asks.")
            # What was installed is linked to, and may have brought more.
            existing = reader.read(existing.prefix, python=existing.python, target=existing.target)
            work = plan.make(existing, options, replace(wishes, with_deps=False), workspace)
        if work.plan.to_build:
            prepare(work.plan, workspace, log)
            build_missing(work.plan, workspace, log)
        # Minutes later.
        in_use.require_idle(existing, work.torch)
        _put(work, workspace, log)
        report = check.run(work.existing)
        log(json.dumps(report.as_dict(), indent=2))
        if as_json:
            out.print_json(json.dumps({**work.as_dict(), "changed": True, "verify": report.as_dict()}))
        else:
            show(report)
    if failed := len(report.failed):
        raise VerifyError(
            f"{existing.root} has the kernels now, but {failed} check{'s' if failed > 1 else ''} failed.",
            fix=f"See them with '{launcher()} verify {existing.option}'.",
        )
    took = human_seconds(time.monotonic() - started)
    say(Text.assemble(("Done", "green"), f" in {took}: {_names(work)} in {existing.root}"))
    variables = f"PYTHONPATH={shlex.quote(str(existing.target))} " if existing.target else ""
    say(f"Use it: {variables}{existing.python} -c 'import torch, mamba_ssm'")
    if existing.target:
        say(f"In a notebook, before the first import: import sys; sys.path.insert(0, {str(existing.target)!r})")


def require_no_variant(existing: Existing, named: str | None) -> None:
    """Refuse a variant or source for an environment that has a torch.

    Raises:
        UsageError: when a variant or a source is named for an environment whose torch decides.
    """
    if named is not None:
        raise UsageError(
            f"{existing.prefix} has a torch of its own, which decides what is made; '{named}' says otherwise.",
            fix="Leave --variant and --source out; a new environment for a variant needs another --prefix.",
        )


def check_options(existing: Existing, options: Options) -> None:
    """Refuse options that ask for something else than the environment has.

    Raises:
        UsageError: when an option asks for what the environment has decided.
    """
    if options.python is not None and options.python != existing.minor:
        raise UsageError(
            f"{existing.prefix} has Python {existing.minor}, not {options.python}.", fix="Leave --python out."
        )
    if options.channels or options.trust is not None:
        raise UsageError(
            f"--channel and --trust are for conda environments; {existing.prefix} gets wheels that are made here.",
            fix="Leave them out.",
        )


def _put(work: Work, workspace: Workspace, log: Log) -> None:
    """Convert the packages that are not there yet, and install them."""
    with tempfile.TemporaryDirectory(prefix="ssm-forge-wheels-") as scratch:
        for package in work.plan.packages:
            if package.state == "installed":
                continue
            file = wheel.from_conda(
                workspace.channel / work.plan.platform.subdir / package.filename, Path(scratch), compress=False
            )
            replaced = install.put(work.existing, package.name, file)
            log(f"installed {file.name}" + (f" instead of {replaced}" if replaced else ""))
            if replaced and replaced != package.version:
                note(f"{package.name} {replaced} was replaced by {package.version}")
    say(f"Installed {_names(work)} into {work.existing.site}")


def _names(work: Work) -> str:
    return " and ".join(f"{package.name} {package.version}" for package in work.plan.packages)


def _announce(work: Work) -> None:
    facts = f"Python {work.existing.version}, torch {work.torch.version}"
    abi = "" if work.torch.cxx11 else ", the C++ ABI of before GCC 5"
    say(Text.assemble((str(work.existing.prefix), "bold"), f": {facts}{abi} ({_kind(work.existing)})"))
    parts = work.plan.parts
    newer = (
        f", ptxas {parts.toolkit.ptxas.version} for what that does not know" if parts and parts.toolkit.ptxas else ""
    )
    say(f"For it: {_names(work)} for {work.plan.archs}, compiled with nvcc {work.plan.variant.cuda}{newer}")
    for lack in work.row.lacks:
        note(lack)
    if warning := plan.driver_note(work):
        note(warning)


def _kind(existing: Existing) -> str:
    maker = ", made by uv" if existing.by_uv else ""
    return {"venv": "a venv", "conda": "conda, with pip's torch", "plain": "an installation of Python"}[
        existing.kind
    ] + maker


def _show(work: Work, as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps(work.as_dict()))
        return
    _announce(work)
    say(f"These releases, because: {work.row.why}.")
    needed = f"download {human_bytes(work.plan.download_bytes)}, disk {human_bytes(work.plan.disk_bytes)}"
    if work.plan.to_build:
        say(f"Needs: {needed}, memory up to {human_bytes(work.plan.memory_bytes)}")
    table = FoldingTable("package", "version", "build", "what happens", wraps=["what happens"])
    actions = {"installed": "nothing", "in channel": "installed as a wheel", "to build": "built, installed as a wheel"}
    for package in work.plan.packages:
        table.add_row(package.name, package.version, package.build, actions[package.state])
    for name in work.needs.wanted:
        table.add_row(name, "", "", "installed by uv, as --with-deps asks")
    out.print(table)
