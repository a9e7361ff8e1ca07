"""``bench kernels`` and ``bench build``: what calls and builds cost, measured on this machine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from ssm_forge.base import paths
from ssm_forge.base.errors import UsageError
from ssm_forge.base.ui import open_log, out, say
from ssm_forge.bench import baseline as build_baseline
from ssm_forge.bench import report as build_report
from ssm_forge.bench import run as build_bench
from ssm_forge.build import costs as compile_costs
from ssm_forge.commands.install_mamba import target_options
from ssm_forge.existing import check
from ssm_forge.existing.plan import applies
from ssm_forge.package.kernels import DEFAULT, Kernels
from ssm_forge.verify import gpu
from ssm_forge.verify import installed as verify


@click.group()
def bench() -> None:
    """Measure: each figure with the machine and versions it was measured on."""


@bench.command()
@click.option("--prefix", type=click.Path(path_type=Path), help="Environment to measure.  [default: the last one]")
@click.option("--small", is_flag=True, help="A few sizes only.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Only this precision.  May be repeated.",
)
@click.option(
    "--other",
    multiple=True,
    metavar="LABEL=DIR",
    help="Another build of the extensions to compare with, such as upstream's own.  May be repeated.",
)
@click.option("--first-use", type=float, metavar="SECONDS", help="Measure the wait before the first call, too.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="DIR", help="Write PNG charts here.")
@click.option("--limit", type=float, metavar="SECONDS", help="Leave out what does not fit in this time.")
@click.option("--allow-missing-gpu", is_flag=True, help="Exit 0 where there is no GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def kernels(
    prefix: Path | None,
    small: bool,
    dtypes: tuple[str, ...],
    other: tuple[str, ...],
    first_use: float | None,
    plot: Path | None,
    limit: float | None,
    allow_missing_gpu: bool,
    as_json: bool,
) -> None:
    """Time the kernels against this GPU's memory, plain PyTorch, and other builds of them."""

    arguments: list[str] = ["--small"] if small else []
    for name in dtypes:
        arguments += ["--dtype", name]
    for text in other:
        label, equals, folder = text.partition("=")
        if not (label.isidentifier() and equals and Path(folder).is_dir()):
            raise UsageError(f"--other '{text}' is not LABEL=DIR with an existing folder and a plain word as label.")
        arguments += ["--other", f"{label}={Path(folder).absolute()}"]
    for name, value in (("--first-use", first_use), ("--limit", limit)):
        if value is not None:
            arguments += [name, str(value)]
    if plot is not None:
        arguments += ["--plot", str(plot.absolute())]
    existing = applies(prefix, paths.workspace())
    environment = check.place(existing) if existing else gpu.of_conda(verify.choose_prefix(prefix))
    document = gpu.kernels(environment, "bench", arguments)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        gpu.show_bench(document)
    raise SystemExit(gpu.exit_code(document, allow_missing_gpu=allow_missing_gpu))


@bench.command()
@target_options
@click.option("--second-python", default="3.11", show_default=True, metavar="X.Y", help="Build for this one, too.")
@click.option("--baseline", is_flag=True, help="Upstream's own build, too: an hour on two cores.")
@click.option(
    "--same-capability",
    is_flag=True,
    help="Upstream's flags for the one capability, too: sizes, and whether the SASS is the same.",
)
@click.option("--record", is_flag=True, help="For maintainers: write what each file took to recipes/compile-costs.txt.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Work here, and keep what was built.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw a chart.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def build(
    variant: str,
    python: str | None,
    cuda_arch: str | None,
    source: str,
    kernels: Kernels,
    jobs: int | None,
    host_compiler: str,
    second_python: str,
    baseline: bool,
    same_capability: bool,
    record: bool,
    keep: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Time builds: cold, warm, for a second Python, from the channel; memory, sizes, and where the time goes."""
    # Long: its arguments are the options, and each is handed on once.
    from importlib.util import find_spec

    if plot is not None and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib.", fix="Leave --plot out, or draw it from the JSON elsewhere.")
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise UsageError(f"{keep} is not empty.", fix="Name another folder with --keep.")
    if record and kernels != DEFAULT:
        raise UsageError("--record is about this project's kernels.", fix="Leave --kernels out, or --record.")
    workspace = paths.workspace()
    workspace.cache.mkdir(parents=True, exist_ok=True)
    target = build_bench.Target(
        variant, python or "3.12", second_python, cuda_arch or "9.0", source, jobs, host_compiler, kernels
    )
    kinds: list[build_baseline.Kind] = ["same capability"] if same_capability or baseline else []
    kinds += ["default"] if baseline else []
    with open_log(workspace.logs, "bench-build") as log, tempfile.TemporaryDirectory(dir=workspace.cache) as scratch:
        say(f"Full log: {log.path}")
        results = log.path.with_suffix(".json")

        def save(document: build_bench.Document) -> None:
            results.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

        folder = keep.absolute() if keep is not None else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        document = build_bench.Bench(target, folder, workspace, log, save).run(baseline=kinds)
        document["ratios"] = build_report.ratios(document)
        save(document)
        if record:
            say(f"Written: {compile_costs.write(workspace, build_bench.recordable(document))}")
        if plot is not None:
            say(f"Chart: {build_report.draw(document, plot)}")
        if as_json:
            click.echo(json.dumps(document, indent=2))
        else:
            out.print(build_report.tables(document))
        say(f"Figures: {results}")
