"""One command from nothing to verified kernels: plan, bridge, solve, build, install, verify."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rattler import RepoDataRecord
from rich.text import Text

from ssm_forge.base import paths, platforms
from ssm_forge.base.credentials import for_engine
from ssm_forge.base.errors import SolveError, VerifyError
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.tables import FoldingTable
from ssm_forge.base.ui import Log, console, human_bytes, human_seconds, note, open_log, out, say
from ssm_forge.bridge.assemble import assemble
from ssm_forge.build import offline
from ssm_forge.build.leftovers import sweep
from ssm_forge.build.run import build
from ssm_forge.channel import folder as channel
from ssm_forge.channel import others as remote
from ssm_forge.channel import policy
from ssm_forge.flow import advice, locked_environment, pixi_kernels, planning
from ssm_forge.flow import needs as flow_needs
from ssm_forge.flow.plan import Options, Plan, PlannedPackage
from ssm_forge.install import marker, registry
from ssm_forge.install import prefix as install
from ssm_forge.manifest.variants import Variant
from ssm_forge.manifest.virtual import channel_url, virtual_packages
from ssm_forge.package import installed as package_installed
from ssm_forge.solve import prefix as solve_prefix
from ssm_forge.solve import recipes as solve_only
from ssm_forge.solve.recipes import solve_builds
from ssm_forge.solve.solver import require_reachable
from ssm_forge.verify import installed as verify
from ssm_forge.verify import report as verify_report
from ssm_forge.verify import toolchain


@for_engine()
def install_mamba(options: Options, *, dry_run: bool, as_json: bool) -> None:
    """Carry out the installation that ``options`` ask for, and print what was done.

    Args:
        dry_run: only print the plan.
        as_json: print it, and what came of it, as JSON.

    Raises:
        ForgeError: whatever the step that failed says.
    """
    workspace = paths.workspace()
    if not dry_run:
        # What a killed run left compiling takes memory that the plan counts.
        sweep(workspace)
    choice = planning.choose(options, workspace)
    kept = pixi_kernels.choose(options, choice, workspace)
    if kept is not None and dry_run:
        options = replace(options, prefix=kept.prefix, cuda_arch=str(kept.archs))
    elif kept is not None and _install_kept(kept, options, workspace, as_json):
        return
    work = planning.make(options, workspace, choice)
    policy.require_used(work.trust, work.channels)
    if dry_run:
        _show(work, as_json)
        return
    if work.nothing_to_do:
        say(f"Nothing to do: {_names(work)} are installed in {work.prefix}.")
        if as_json:
            out.print_json(json.dumps({**work.as_dict(), "changed": False}))
        return
    started = time.monotonic()
    with open_log(workspace.logs, "install-mamba") as log:
        prepare(work, workspace, log)
        base = base_of(work)
        # What does not fit together is known now, and not after an hour of compiling.
        solve_environment(work, base, workspace, pending=work.to_build)
        build_missing(work, workspace, log)
        install_packages(work, base, workspace, log)
        failed = _verify(work, workspace, log, as_json)
    _require_passed(failed, work.prefix)
    took = human_seconds(time.monotonic() - started)
    say(Text.assemble(("Done", "green"), f" in {took}: {_names(work)} in {work.prefix}"))
    _say_how_to_use()


def _install_kept(kept: pixi_kernels.Kept, options: Options, workspace: Workspace, as_json: bool) -> bool:
    """Let pixi build, install and keep the kernels, and verify them; False where this pixi can't build."""
    started = time.monotonic()
    with open_log(workspace.logs, "install-mamba") as log:
        say(f"Full log: {log.path}")
        say(f"pixi builds and keeps the kernels in {kept.prefix}, as recipes/pixi.lock says, for {kept.archs}")
        if not pixi_kernels.install_kept(kept, workspace, log, jobs=options.jobs):
            return False

        report = verify.verify(kept.prefix)
        log(json.dumps(report.as_dict(), indent=2))
    if as_json:
        facts = {"variant": kept.variant, "python": kept.python, "cuda_arch": str(kept.archs)}
        out.print_json(json.dumps({**facts, "prefix": str(kept.prefix), "verify": report.as_dict()}))
    else:
        verify_report.show(report)
    _require_passed(len(report.failed), kept.prefix)
    took = human_seconds(time.monotonic() - started)
    say(Text.assemble(("Done", "green"), f" in {took}: {kept.variant} in {kept.prefix}"))
    _say_how_to_use()
    return True


def _say_how_to_use() -> None:
    say(f"Use it: {launcher()} python -c 'import torch, mamba_ssm', or {launcher()} shell")
    say(f"In a pixi workspace of your own: {launcher()} export --format pixi DIR writes it")


def _require_passed(failed: int, prefix: Path) -> None:
    if failed:
        error = VerifyError(
            f"{prefix} was installed, but {failed} check{'s' if failed > 1 else ''} failed.",
            fix=f"See them with '{launcher()} verify --prefix {shlex.quote(str(prefix))}'.",
        )
        error.advice = advice.of_environment(prefix)
        raise error


def build_packages(work: Plan, workspace: Workspace) -> list[Path]:
    """Build what the channel lacks, and install nothing.

    Returns:
        The packages in the channel.

    Raises:
        ForgeError: whatever the step that failed says.
    """
    if work.to_build:
        with open_log(workspace.logs, "build") as log:
            make_packages(work, workspace, log)
    else:
        say("Nothing to build: the channel has both packages.")
    return [workspace.channel / work.platform.subdir / package.filename for package in work.packages]


def make_packages(work: Plan, workspace: Workspace, log: Log) -> None:
    """Say what is planned, and build what the channel lacks, in order."""
    prepare(work, workspace, log)
    build_missing(work, workspace, log)


def prepare(work: Plan, workspace: Workspace, log: Log) -> None:
    """Say what is planned, assemble the bridge where it is used, and solve what the builds need.

    Raises:
        NetworkError: when a channel can't be reached.
        SolveError: when a build would find no set of packages.
    """
    say(f"Full log: {log.path}")
    _announce(work)
    log(json.dumps(work.as_dict(), indent=2))
    if work.parts is not None:
        assemble(work.parts, workspace, log)
    channel.ensure_indexed(workspace.channel)
    if not work.to_build:
        return
    rendered = [package.request.rendered for package in work.to_build if package.request.locked is None]
    # One quick, clear error where the engine would retry for minutes.
    if rendered:
        require_reachable(work.channels)
    elif lacks := offline.lacking([package.request for package in work.to_build], workspace):
        offline.require_reachable(work.channels, lacks)
    # What recipes/pixi.lock has is not solved.
    for package in work.to_build:
        policy.enforce(package.request.built_with, work.trust, log)
    machine = [v for v in solve_prefix.machine_virtual_packages() if not v.name.startswith("__cuda")]
    # As in the build worker: a package is built for its GPU, wherever that is done.
    target = (*virtual_packages(cuda=work.variant.cuda, cuda_arch=str(work.archs.sass[0]))[:2], *machine)
    purpose = f"for {work.variant.name} with Python {work.python}"
    to_build = {package.filename for package in work.to_build}
    for solved in solve_builds(rendered, work.channels, target, purpose):
        log(f"solved: {solved.package}: {solved.kind}: {len(solved.records)} packages")
        # Those that are still to be built are nobody else's; the engine makes the environment of a build itself.
        policy.enforce([r for r in solved.records if r.file_name not in to_build], work.trust, log)


def build_missing(work: Plan, workspace: Workspace, log: Log) -> None:
    """Build what the channel lacks, in order."""
    for package in work.to_build:
        say(f"Building {package.name} {package.version} for {work.archs} with {work.jobs} jobs")
        build(package.request, channel=workspace.channel, jobs=work.jobs, workspace=workspace, log=log)


@dataclass(frozen=True)
class Base:
    """What the kernels are put on.

    Attributes:
        in_place: they are added to an environment that is there, and not made by us.
        locked: the packages that a new environment is made from, where pixi.lock says it.
        specs: what else a new environment is to have.
    """

    in_place: bool
    locked: tuple[RepoDataRecord, ...] = ()
    specs: tuple[str, ...] = ()


def base_of(work: Plan) -> Base:
    """What the kernels of a plan are put on: an environment that is there, the locked one, or a new one."""
    if marker.is_foreign(work.prefix):
        return Base(in_place=True)
    if work.locked is not None:
        return Base(in_place=False, locked=work.locked.records)
    if work.parts is not None and work.parts.cross is not None:
        # The compilers of the other platform run there, and are not made here.
        return Base(in_place=False, specs=("pip", f"cuda-version {work.variant.cuda}.*"))
    return Base(in_place=False, specs=("pip", *_companions(work.variant)))


def _companions(variant: Variant) -> tuple[str, ...]:
    """What an environment of pixi.toml has beside what the kernels depend on: Triton compiles with CC at run time."""
    if variant.source == "bridge":
        return toolchain.specs(variant)
    compiler = f"gxx_{platforms.here().subdir} {variant.row['cxx_compiler_version']}.*"
    return compiler, f"cuda-version {variant.cuda}.*"


def solve_environment(
    work: Plan,
    base: Base,
    workspace: Workspace,
    *,
    pending: Sequence[PlannedPackage] = (),
    snapshot: Path | None = None,
) -> list[RepoDataRecord]:
    """Solve the environment with the kernels in it; the records of all its packages come out.

    Args:
        pending: those of our packages that are still to be built.
        snapshot: folder of recorded channel data, to solve offline.

    Raises:
        SolveError: when they do not fit into it.
    """
    local = channel_url(workspace.channel.resolve().as_uri())
    specs = [
        package.spec + ("" if package in pending else f"[channel='{package.channel or local}']")
        for package in work.packages
    ]
    pending_entries = solve_only.pending([package.request.rendered for package in pending])
    if base.locked:
        kernel_channels = [url for url in work.channels if work.locked is not None and url not in work.locked.channels]
        try:
            return locked_environment.solve_on_top(
                [*specs, f"python {work.python}.*"],
                base.locked,
                kernel_channels,
                solve_prefix.target_machine(work.variant.cuda, work.archs),
                pending_entries,
            )
        except SolveError as error:
            note(f"the kernels need more than pixi.lock has ({error}): the channels are asked.")
    return solve_prefix.solve_for_prefix(
        [*specs, f"python {work.python}.*", *base.specs],
        work.channels,
        prefix=work.prefix if base.in_place else None,
        cuda=work.variant.cuda,
        archs=work.archs,
        locked=base.locked,
        pending=pending_entries,
        snapshot=snapshot,
        subdir=work.platform.subdir,
    )


def install_packages(work: Plan, base: Base, workspace: Workspace, log: Log) -> None:
    """Solve the environment and link it into the plan's prefix; one that was there before keeps its packages.

    Raises:
        ForgeError: whatever the step that failed says.
    """
    records = solve_environment(work, base, workspace)
    log("\n".join(f"solved: {r.name.normalized} {r.version} {r.build} {r.url}" for r in records))
    urls = {r.file_name: r.url for r in records}
    for package in work.packages:
        remote.require_origin(package.filename, urls.get(package.filename, ""), package.channel)
    by_hand = [] if base.in_place else package_installed.added_by_hand(work.prefix)
    if by_hand:
        note(f"the environment is made anew, without what was added by hand: {', '.join(by_hand)}")
    installed = marker.Installed(
        variant=work.variant.name,
        python=work.python,
        source=work.variant.source,
        packages=tuple(package.filename for package in work.packages),
        created=not base.in_place,
    )
    install.install(records, work.prefix, installed, workspace, log, work.trust)
    registry.remember(work.prefix, workspace)
    say(f"Installed {len(records)} packages into {work.prefix}")


def _verify(work: Plan, workspace: Workspace, log: Log, as_json: bool) -> int:

    report = verify.verify(work.prefix)
    log(json.dumps(report.as_dict(), indent=2))
    if as_json:
        out.print_json(json.dumps({**work.as_dict(), "changed": True, "verify": report.as_dict()}))
    else:
        verify_report.show(report)
    return len(report.failed)


def _names(work: Plan) -> str:
    return " and ".join(f"{package.name} {package.version}" for package in work.packages)


def _announce(work: Plan) -> None:
    facts = work.as_dict()
    whose = "upstream's " if work.kernels == "upstream" else ""
    described = (
        f": CUDA {work.variant.cuda}, torch {work.variant.torch}, "
        f"Python {facts['python']}, {whose}kernels for {work.archs}, from {work.variant.source}"
    )
    say(Text.assemble("Variant ", (work.variant.name, "bold"), described))
    if waits := flow_needs.jit_note(work):
        note(waits)
    needs = [f"disk {human_bytes(work.disk_bytes)}"]
    if work.download_bytes:
        needs.insert(0, f"download {human_bytes(work.download_bytes)}")
    if work.memory_bytes:
        needs.append(f"memory up to {human_bytes(work.memory_bytes)}")
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
        table.add_row("python", work.parts.interpreter.version, work.parts.interpreter.origin)
        table.add_row("C++ compiler", work.parts.compiler.version, work.parts.compiler.origin)
        for deb in work.parts.debs:
            table.add_row(deb.package, deb.version, f"Debian {deb.suite}")
        for wheel in (*work.parts.toolkit.wheels, *work.parts.wheels):
            table.add_row(wheel.name, wheel.version, "wheel")
        out.print(table)
    console.print(f"Prefix: {work.prefix}\nChannels: {', '.join(work.channels)}")
