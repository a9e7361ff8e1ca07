"""``env``: environments from pixi.lock alone, and the proof that a prefix is exactly what is locked."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import click

from ssm_forge.base import paths
from ssm_forge.base.errors import VerifyError
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.ui import out, say
from ssm_forge.channel import policy
from ssm_forge.commands.install_mamba import trust_option
from ssm_forge.install import from_lock, integrity, pixi
from ssm_forge.install.downloads import Mirror
from ssm_forge.install.integrity import Report
from ssm_forge.install.marker import read_marker
from ssm_forge.solve import lock, source_packages
from ssm_forge.solve.lock import LockedEnvironment

_PREFIX = click.option(
    "--prefix", type=click.Path(file_okay=False, path_type=Path), help="Folder; default: .pixi/envs/NAME."
)
_LOCK = click.option(
    "--lock",
    "lock_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Another lock than pixi.lock.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@click.group()
def env() -> None:
    """Make an environment from pixi.lock, or verify one against it."""


@env.command()
@click.argument("name")
@click.option("--locked", is_flag=True, help="From the lock, without a solve: the only way there is.")
@click.option("--mirror", "mirrors", multiple=True, metavar="URL=DIR", help="Take packages under URL from DIR.")
@click.option("--force", is_flag=True, help="Make an environment that exists anew.")
@trust_option
@_PREFIX
@_LOCK
@_JSON
def create(
    name: str,
    locked: bool,
    mirrors: tuple[str, ...],
    force: bool,
    trust: Path | None,
    prefix: Path | None,
    lock_file: Path | None,
    as_json: bool,
) -> None:
    """Make environment NAME from the lock alone; every package's hash is checked."""

    workspace = paths.workspace()
    wanted = _wanted(name, lock_file, workspace)
    target = (prefix or _usual(name, lock_file, workspace)).absolute()
    report = from_lock.create(
        wanted,
        target,
        mirrors=[Mirror.parse(text) for text in mirrors],
        workspace=workspace,
        force=force,
        rules=policy.for_channels(trust, wanted.channels, workspace),
    )
    say(f"{target}: {report.packages} packages, {report.files} files, all as locked.")
    if as_json:
        out.print_json(json.dumps({"prefix": str(target), "packages": report.packages, "files": report.files}))


@env.command()
@click.argument("name")
@_PREFIX
@_LOCK
@_JSON
def verify(name: str, prefix: Path | None, lock_file: Path | None, as_json: bool) -> None:
    """Prove that a prefix holds exactly the packages locked for NAME, unmodified."""

    workspace = paths.workspace()
    wanted = _wanted(name, lock_file, workspace)
    target = (prefix or _usual(name, lock_file, workspace)).absolute()
    report = integrity.verify(target, wanted.records, allowed_channels=[workspace.channel.resolve().as_uri()])
    if as_json:
        out.print_json(json.dumps({"prefix": str(target), "exact": not report.deviations, **asdict(report)}))
    else:
        _print(target, report)
    if report.deviations:
        raise _deviates(name, target, report, prefix_named=prefix is not None)


def _usual(name: str, lock_file: Path | None, workspace: Workspace) -> Path:
    """Where an environment is when nobody says: that of another lock is not in the place of one of pixi's."""
    prefix = workspace.envs / name
    return prefix if lock_file is None else pixi.prefix_for_kernels(prefix, workspace)


def _wanted(name: str, lock_file: Path | None, workspace: Workspace) -> LockedEnvironment:
    """What is locked; of packages from recipes those that the local channel has."""

    lock_path = lock_file or workspace.lock
    return source_packages.finished(lock.environment(lock_path, name), lock_path, workspace)


def _deviates(name: str, prefix: Path, report: Report, *, prefix_named: bool) -> VerifyError:

    marker = read_marker(prefix)
    if marker is not None and marker.source == "bridge":
        return VerifyError(
            f"{prefix} was made from the bridge, not from the lock, so it is not what is locked for {name}.",
            fix=f"'{launcher()} verify' checks such an environment.",
        )
    more = f" (and {len(report.deviations) - 1} more)" if len(report.deviations) > 1 else ""
    prefix_option = f" --prefix {shlex.quote(str(prefix))}" if prefix_named else ""
    return VerifyError(
        f"{prefix} is not what is locked for {name}: {report.deviations[0]}{more}.",
        fix=f"'{launcher()} env create {name} --locked --force{prefix_option}' makes it anew.",
    )


def _print(prefix: Path, report: Report) -> None:
    for deviation in report.deviations:
        out.print(str(deviation), markup=False)
    for package in report.on_top:
        out.print(f"on top of the lock, built here: {package}", markup=False)
    verdict = f"{len(report.deviations)} deviations" if report.deviations else "exactly as locked"
    unhashed = f", {report.unhashed} links and entry points without a recorded hash" if report.unhashed else ""
    out.print(
        f"{prefix}: {report.packages} packages, {report.files} files compared{unhashed}: {verdict}",
        markup=False,
    )
