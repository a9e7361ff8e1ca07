"""``install-mamba``: from nothing to verified kernels; also the options that other commands share with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from ssm_forge.base import machine
from ssm_forge.base.errors import BuildError, InstallError, SolveError, UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.base.ui import note
from ssm_forge.build.origin import conda_reachable
from ssm_forge.existing import job
from ssm_forge.existing.plan import Wishes, applies, for_condas_torch, require_existing
from ssm_forge.existing.reader import folder_of
from ssm_forge.flow import advice, fitting, pipeline
from ssm_forge.flow.plan import Options
from ssm_forge.manifest import variants
from ssm_forge.manifest.variants import DEFAULT_VARIANT
from ssm_forge.package.kernels import DEFAULT, KERNELS, Kernels
from ssm_forge.trees import install as installing


def target_options(command: click.decorators.FC) -> click.decorators.FC:
    """Add to a command the options that say which variant, for which Python, GPU and source."""
    for option in reversed(
        [
            click.option("--variant", default=DEFAULT_VARIANT, show_default=True, help="Row of the build matrix."),
            click.option("--python", metavar="X.Y", help="Python minor version.  [default: 3.12, else the newest]"),
            click.option(
                "--cuda-arch",
                metavar="ARCH",
                help='native, families, all, or a list such as 9.0 or "8.0;9.0+PTX".  '
                "[default: this machine's GPU, else 8.0;9.0+PTX]",
            ),
            click.option(
                "--source",
                type=click.Choice(["auto", "conda", "bridge"]),
                default="auto",
                show_default=True,
                help="Where dependencies come from.",
            ),
            click.option(
                "--kernels",
                type=click.Choice(KERNELS),
                default=DEFAULT,
                show_default=True,
                help="upstream: their kernels as they are, none of our patches to what runs.",
            ),
            click.option("--jobs", type=click.IntRange(min=1), help="Parallel compilers.  [default: what fits]"),
            click.option(
                "--host-compiler",
                default="auto",
                show_default=True,
                metavar="auto|system|bridge|PATH",
                help="The C++ compiler: this machine's, Debian's brought along, or the one named. auto takes "
                "this machine's where nvcc accepts it.",
            ),
        ]
    ):
        command = option(command)
    return command


def platform_option(command: click.decorators.FC) -> click.decorators.FC:
    """What packages are for, where that is not this machine's platform."""
    return click.option(
        "--platform",
        metavar="linux-64|linux-aarch64",
        help="What the packages are for; cross-compiled where it is not this machine's.  [default: this machine's]",
    )(command)


def tree_option(command: click.decorators.FC) -> click.decorators.FC:
    """Add to a command the option for source trees that are built instead of the two projects."""
    return click.option(
        "--source-tree",
        "trees",
        multiple=True,
        metavar="DIR|URL|FILE",
        help="Build this instead: a fork, an old release, any setup.py with a CUDAExtension. May be repeated.",
    )(command)


def require_no_kernels(kernels: Kernels, trees: Sequence[str]) -> None:
    """Refuse a choice of kernels for source trees, which have their own.

    Raises:
        UsageError: when upstream's are asked for.
    """
    if trees and kernels != DEFAULT:
        raise UsageError(
            f"--kernels {kernels} is about the patches of this project's recipes; {trees[0]} is built as it is.",
            fix="Leave --kernels out, or --source-tree.",
        )


def trust_option(command: click.decorators.FC) -> click.decorators.FC:
    """Add to a command the option for the policy that whatever is installed must satisfy."""
    return click.option(
        "--trust",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Policy on signed statements.  [default: SSM_FORGE_TRUST, recipes/trust.toml]",
    )(command)


@click.command("install-mamba")
@target_options
@platform_option
@click.option("--prefix", type=click.Path(path_type=Path), help="Environment to install into.")
@click.option(
    "--channel",
    "channels",
    multiple=True,
    metavar="URL",
    help="Take built packages from here, the first channel that has one wins; compile only what none has.",
)
@trust_option
@tree_option
@click.option(
    "--with-deps",
    is_flag=True,
    help="In an environment of pip's or uv's: install einops, transformers and so on where they are missing.",
)
@click.option(
    "--target",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Beside an environment that stays as it is (a notebook's, say): install here, for PYTHONPATH.",
)
@click.option("--mamba-ssm", metavar="X.Y.Z", help="In an environment with a torch: this release.  [default: newest]")
@click.option("--causal-conv1d", metavar="X.Y.Z", help="The same for causal-conv1d.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan and the result as JSON.")
@click.pass_context
def install_mamba(
    context: click.Context,
    variant: str,
    python: str | None,
    cuda_arch: str | None,
    source: str,
    kernels: Kernels,
    platform: str | None,
    jobs: int | None,
    host_compiler: str,
    prefix: Path | None,
    channels: tuple[str, ...],
    trust: Path | None,
    trees: tuple[str, ...],
    with_deps: bool,
    target: Path | None,
    mamba_ssm: str | None,
    causal_conv1d: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build what the channel lacks, install causal-conv1d and mamba-ssm, and verify them.

    With --prefix: into an environment that you have, for the torch that is in it.
    """
    # Long: its arguments are the options, and each is handed on once.
    fitting.require_architecture()
    releases = {"causal-conv1d": causal_conv1d, "mamba-ssm": mamba_ssm}
    wishes = Wishes({name: version for name, version in releases.items() if version}, with_deps)
    if trees and wishes.releases:
        name = next(iter(wishes.releases))
        raise UsageError(f"--source-tree is built instead of {name}.", fix=f"Leave --{name} out.")
    require_no_kernels(kernels, trees)
    if trees and with_deps:
        raise UsageError(
            "--with-deps installs what causal-conv1d and mamba-ssm import, and --source-tree is built instead of them.",
            fix="Leave --with-deps out; what a tree requires beyond torch, a note names.",
        )
    options = Options(
        variant=variant,
        python=python,
        cuda_arch=cuda_arch,
        source=source,  # type: ignore[arg-type]
        prefix=folder_of(prefix),
        jobs=jobs,
        host_compiler=host_compiler,
        channels=channels,
        trust=trust,
        kernels=kernels,
        platform=platform,
    )
    existing = applies(prefix, workspace(), target)
    require_existing(existing, {"--target": target, "--mamba-ssm": mamba_ssm, "--causal-conv1d": causal_conv1d})
    if trees or existing is not None:
        fitting.require_own(platform, "--source-tree" if trees else "--prefix")
    named = context.get_parameter_source("variant") is not ParameterSource.DEFAULT
    try:
        if existing is not None:
            job.require_no_variant(existing, variant if named else source if source != "auto" else None)
        else:
            options = _fitting(options, named=named)
        if trees:
            installing.install(trees, options, existing, dry_run=dry_run, as_json=as_json)
        elif existing is not None:
            job.install_mamba(existing, options, wishes, dry_run=dry_run, as_json=as_json)
        else:
            pipeline.install_mamba(options, dry_run=dry_run, as_json=as_json)
    except (BuildError, InstallError, SolveError) as error:
        if error.log is not None:
            error.advice = advice.of_log(Path(str(error.log)))
        raise


def _fitting(options: Options, *, named: bool) -> Options:
    """The options with the variant that fits the environment's torch or this machine, where none was named."""
    matrix = variants.load(workspace().variants)
    chosen = options if named else for_condas_torch(options, workspace())
    if named or chosen is not options:
        why = fitting.driver_note(chosen.variant, machine.gpus(), matrix)
    else:
        chosen, why = fitting.default(options, machine.gpus(), matrix, conda_reachable)
    if why:
        note(why)
    return chosen
