"""``pack`` and ``unpack``: an environment as one archive, for machines with no network."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

from ssm_forge.base import machine, paths
from ssm_forge.base.arch import Capability
from ssm_forge.base.ui import human_bytes, out, say
from ssm_forge.commands.install_mamba import trust_option
from ssm_forge.install import marker, pack_tools
from ssm_forge.install import pack as packing
from ssm_forge.install.downloads import Mirror
from ssm_forge.solve import lock, source_packages


@click.command()
@click.argument("name", required=False)
@click.option(
    "--prefix",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Pack an installed environment as it is, instead of a locked one.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Default: dist/ssm-forge-NAME.tar.",
)
@click.option("--no-kernels", is_flag=True, help="Only what is locked, without causal-conv1d and mamba-ssm.")
@click.option("--gpu", metavar="9.0", help="Compute capability of the other machine's GPU; default: this one's.")
@click.option(
    "--with-tools", is_flag=True, help="Add this project and its wheels: the other machine needs only Python."
)
@click.option("--mirror", "mirrors", multiple=True, metavar="URL=DIR", help="Take packages under URL from DIR.")
@click.option("--lock", "lock_file", type=click.Path(dir_okay=False, path_type=Path), help="Another lock.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def pack(
    name: str | None,
    prefix: Path | None,
    output: Path | None,
    no_kernels: bool,
    gpu: str | None,
    with_tools: bool,
    mirrors: tuple[str, ...],
    lock_file: Path | None,
    as_json: bool,
) -> None:
    """Write one archive of environment NAME: packages, lock and built kernels."""

    if (name is None) == (prefix is None):
        raise click.UsageError("Give the NAME of a locked environment, or --prefix DIR of an installed one.")
    workspace = paths.workspace()
    installed = None
    if prefix is not None:
        locked = packing.of_prefix(prefix.resolve())
        installed = marker.read_marker(prefix)
    else:
        assert name is not None
        lock_path = lock_file or workspace.lock
        locked = lock.environment(lock_path, name)
        if no_kernels:
            locked = replace(locked, sources=())
        elif locked.sources:
            locked = source_packages.finished(locked, lock_path, workspace)
        else:
            this_gpu = min((g.capability for g in machine.gpus()), default=None)
            locked = packing.add_kernels(locked, workspace, gpu=Capability.parse(gpu) if gpu else this_gpu)
    target = output or workspace.root / "dist" / f"ssm-forge-{locked.name}.tar"
    contents = packing.pack(
        locked,
        target,
        mirrors=[Mirror.parse(text) for text in mirrors],
        workspace=workspace,
        installed=installed,
        add_tools=(lambda top: pack_tools.add_tools(top, workspace)) if with_tools else None,
    )
    size = target.stat().st_size
    say(f"{target}: {contents.packages} packages, {len(contents.kernels)} of them built here, {human_bytes(size)}.")
    if as_json:
        out.print_json(json.dumps({"file": str(target), "bytes": size, **asdict(contents)}))


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--prefix", type=click.Path(file_okay=False, path_type=Path), help="Folder; default: .pixi/envs/NAME.")
@click.option("--force", is_flag=True, help="Make an environment that exists anew.")
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def unpack(source: Path, prefix: Path | None, force: bool, trust: Path | None, as_json: bool) -> None:
    """Install the archive (or folder) SOURCE that pack wrote, and verify it. Uses no network."""

    target, report = packing.unpack(source.resolve(), prefix, workspace=paths.workspace(), force=force, trust=trust)
    say(f"{target}: {report.packages} packages, {report.files} files, all as locked.")
    if as_json:
        out.print_json(json.dumps({"prefix": str(target), "packages": report.packages, "files": report.files}))
