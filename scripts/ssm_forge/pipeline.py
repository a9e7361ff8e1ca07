"""One command from nothing to verified kernels: plan, bridge, build, install, verify."""

from __future__ import annotations

import json
import shlex
import time

from ssm_forge import channel, install, plan, policy, remote, toolchain
from ssm_forge.build import build, sweep
from ssm_forge.credentials import for_engine
from ssm_forge.errors import VerifyError
from ssm_forge.paths import Workspace, launcher, workspace
from ssm_forge.plan import Options, Plan
from ssm_forge.solver import require_reachable
from ssm_forge.tables import FoldingTable
from ssm_forge.ui import Log, console, human_bytes, human_seconds, open_log, out, say


@for_engine()
def install_mamba(options: Options, *, dry_run: bool, as_json: bool) -> None:
    """Carry out an installation, and print what was done.

    Raises:
        ForgeError: whatever the step that failed says.
    """
    place = workspace()
    if not dry_run:
        # What a killed run left compiling takes memory that the plan counts.
        sweep(place)
    work = plan.make(options, place)
    if dry_run:
        _show(work, as_json)
        return
    if work.nothing_to_do:
        say(f"Nothing to do: {_names(work)} are installed in {work.prefix}.")
        if as_json:
            out.print_json(json.dumps({**work.as_dict(), "changed": False}))
        return
    started = time.monotonic()
    with open_log(place.logs, "install-mamba") as log:
        make_packages(work, place, log)
        install_packages(work, place, log)
        failed = _verify(work, place, log, as_json)
    if failed:
        raise VerifyError(
            f"{work.prefix} was installed, but {failed} check{'s' if failed > 1 else ''} failed.",
            fix=f"See them with '{launcher()} verify --prefix {shlex.quote(str(work.prefix))}'.",
        )
    say(f"[green]Done[/] in {human_seconds(time.monotonic() - started)}: {_names(work)} in {work.prefix}")
    say(f"Use it: {launcher()} python -c 'import torch, mamba_ssm', or {launcher()} shell")


def build_packages(options: Options, *, as_json: bool) -> None:
    """Build what the channel lacks, and install nothing.

    Raises:
        ForgeError: whatever the step that failed says.
    """
    place = workspace()
    sweep(place)
    work = plan.make(options, place)
    if work.to_build:
        with open_log(place.logs, "build") as log:
            make_packages(work, place, log)
    else:
        say("Nothing to build: the channel has both packages.")
    packages = [str(place.channel / channel.SUBDIR / package.filename) for package in work.packages]
    if as_json:
        out.print_json(json.dumps({**work.as_dict(), "files": packages}))
    else:
        out.print("\n".join(packages), markup=False)


def make_packages(work: Plan, place: Workspace, log: Log) -> None:
    """Say what is planned, assemble the bridge where it is used, and build what the channel lacks, in order."""
    say(f"Full log: {log.path}")
    _announce(work)
    log(json.dumps(work.as_dict(), indent=2))
    if work.parts is not None:
        from ssm_forge.bridge.assemble import assemble

        assemble(work.parts, place, log)
    channel.ensure_indexed(place.channel)
    if work.to_build:
        # One quick, clear error where the engine would retry for minutes.
        require_reachable(work.channels)
    for package in work.to_build:
        say(f"Building {package.name} {package.version} for {work.archs} with {work.jobs} jobs")
        build(package.request, channel=place.channel, jobs=work.jobs, workspace=place, log=log)


def install_packages(work: Plan, place: Workspace, log: Log) -> None:
    """Solve and link; an environment that was there before keeps its packages."""
    foreign = install.is_foreign(work.prefix)
    if work.variant.source == "conda" and not foreign and work.prefix == place.envs / work.variant.name:
        # pixi makes its own environment, so that it knows it again; ours are then added on top.
        foreign = install.pixi_environment(work.variant.name, place, log)
    specs = [*(package.spec for package in work.packages), f"python {work.python}.*", "pip"]
    if work.variant.source == "bridge" and not foreign:
        # As in pixi.toml's environments; Triton compiles with CC at run time.
        specs += toolchain.specs(work.variant)
    records = install.solve_for_prefix(
        specs,
        work.channels,
        prefix=work.prefix if foreign else None,
        cuda=work.variant.cuda,
        archs=work.archs,
    )
    log("\n".join(f"solved: {r.name.normalized} {r.version} {r.build} {r.url}" for r in records))
    urls = {r.file_name: r.url for r in records}
    for package in work.packages:
        remote.require_origin(package.filename, urls.get(package.filename, ""), package.channel)
    checked = policy.enforce(records, work.trust, log)
    if checked:
        say(f"{checked} packages come with the signed statements that the trust policy asks for")
    lost = [] if foreign else install.added_by_hand(work.prefix)
    if lost:
        say(f"[yellow]note:[/] the environment is made anew, without what was added by hand: {', '.join(lost)}")
    installed = install.Installed(
        variant=work.variant.name,
        python=work.python,
        source=work.variant.source,
        packages=tuple(package.filename for package in work.packages),
        created=not foreign,
    )
    install.install(records, work.prefix, installed, place, log)
    install.remember(work.prefix, place)
    say(f"Installed {len(records)} packages into {work.prefix}")


def _verify(work: Plan, place: Workspace, log: Log, as_json: bool) -> int:
    from ssm_forge import verify

    report = verify.verify(work.prefix)
    log(json.dumps(report.as_dict(), indent=2))
    if as_json:
        out.print_json(json.dumps({**work.as_dict(), "changed": True, "verify": report.as_dict()}))
    else:
        verify.show(report)
    return len(report.failed)


def _names(work: Plan) -> str:
    return " and ".join(f"{package.name} {package.version}" for package in work.packages)


def _announce(work: Plan) -> None:
    facts = work.as_dict()
    say(
        f"Variant [bold]{work.variant.name}[/]: CUDA {work.variant.cuda}, torch {work.variant.torch}, "
        f"Python {facts['python']}, kernels for {work.archs}, from {work.variant.source}"
    )
    note = plan.jit_note(work)
    if note:
        say(f"[yellow]note:[/] {note}")
    needs = [f"disk {human_bytes(work.disk)}"]
    if work.download:
        needs.insert(0, f"download {human_bytes(work.download)}")
    if work.memory:
        needs.append(f"memory up to {human_bytes(work.memory)}")
    say(f"Needs: {', '.join(needs)}")


def _show(work: Plan, as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps(work.as_dict()))
        return
    _announce(work)
    table = FoldingTable("package", "version", "build", "what happens", wraps=["what happens"])
    actions = {
        "installed": "nothing",
        "in channel": "installed from the channel",
        "to build": "built, installed",
    }
    for package in work.packages:
        source = f" {package.channel}" if package.channel and package.state == "in channel" else ""
        table.add_row(package.name, package.version, package.build, actions[package.state] + source)
    out.print(table)
    if work.parts is not None:
        table = FoldingTable("part", "version", "from")
        table.add_row("python", work.parts.interpreter.version, str(work.parts.interpreter.executable))
        table.add_row("C++ compiler", work.parts.compiler.version, work.parts.compiler.origin)
        for deb in work.parts.debs:
            table.add_row(deb.package, deb.version, f"Debian {deb.suite}")
        for wheel in (*work.parts.toolkit.wheels, *work.parts.wheels):
            table.add_row(wheel.name, wheel.version, "wheel")
        out.print(table)
    console.print(f"Prefix: {work.prefix}\nChannels: {', '.join(work.channels)}")
