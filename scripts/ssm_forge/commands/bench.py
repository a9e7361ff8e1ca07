from __future__ import annotations

import json
from pathlib import Path

import click


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
    from ssm_forge import gpu, verify
    from ssm_forge.errors import UsageError

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
    document = gpu.kernels(verify.choose_prefix(prefix), "bench", arguments)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        gpu.show_bench(document)
    raise SystemExit(gpu.exit_code(document, allow_missing_gpu=allow_missing_gpu))
