"""What fits this machine: which variant where none is named, and what nothing here can help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ssm_forge.base import platforms
from ssm_forge.base.arch import Capability, code_for
from ssm_forge.base.errors import MachineError, UsageError
from ssm_forge.base.machine import Gpu
from ssm_forge.flow.plan import Options
from ssm_forge.manifest.variants import Matrix, Source, Variant

# NVIDIA's driver from which on a CUDA major runs.
DRIVERS = {"11": 450, "12": 525, "13": 580}

# The oldest that any compiler here, and Triton, makes code for.
_OLDEST = Capability(7, 0)


def require_architecture(machine: str = "") -> None:
    """Refuse a machine that nothing is built for.

    Args:
        machine: as uname has it; else this machine's.

    Raises:
        MachineError: for anything but x86-64 and aarch64.
    """
    platforms.here(machine)


def require_own(platform: str | None, what: str) -> None:
    """Refuse another platform than this machine's for what is only made for that.

    Args:
        what: the option that it goes with.

    Raises:
        UsageError: naming both platforms.
    """
    own = platforms.here()
    if platform is not None and platforms.of(platform) != own:
        raise UsageError(
            f"what {what} names is built for this machine's platform, {own.subdir}, and not for {platform}.",
            fix="Leave --platform out, or run this on such a machine.",
        )


class Fitting(NamedTuple):
    """Options whose variant runs here, and one line that says why it is another than before; empty where it is not."""

    options: Options
    why: str = ""


def default(options: Options, gpus: Sequence[Gpu], matrix: Matrix, conda_is_reached: Callable[[], bool]) -> Fitting:
    """``options`` with the newest variant that this machine's driver and GPUs run, where the default is not one.

    Args:
        options: in which no variant was named.
        gpus: those of this machine.
        matrix: all variants.
        conda_is_reached: whether a conda channel can be; asked only where it matters.

    Raises:
        MachineError: when no variant runs here.
    """
    require_possible(gpus)
    variant = options.variant
    if not gpus or any(misfit(row, gpus) == "" for row in matrix.variants if row.name == variant):
        return Fitting(options)
    reached = conda_is_reached() if options.source == "auto" else options.source == "conda"
    sources: tuple[Source, ...] = ("conda", "bridge") if reached and options.source == "auto" else ("bridge",)
    if options.source != "auto":
        sources = (options.source,)
    rows = [matrix.get(name, source) for name in matrix.names for source in sources if source in matrix.sources(name)]
    fitting = [row for row in rows if not misfit(row, gpus) and (options.python or row.pythons[0]) in row.pythons]
    listed = "; ".join(dict.fromkeys(f"{gpu.name} ({gpu.capability}, driver {gpu.driver})" for gpu in gpus))
    if not fitting:
        reasons = "; ".join(dict.fromkeys(f"{row.name}: {misfit(row, gpus)}" for row in reversed(rows)))
        raise MachineError(
            f"no variant to be had here runs on this machine's {listed}: {reasons}.",
            fix="Update the driver, or name what to build for with --variant and --cuda-arch.",
        )
    best = max(fitting, key=lambda row: _key(row.cuda))
    why = next(text for row in matrix.variants if row.name == variant and (text := misfit(row, gpus)))
    return Fitting(replace(options, variant=best.name), f"{listed}: {best.name} is taken and not {variant} ({why}).")


def driver_note(variant: str, gpus: Sequence[Gpu], matrix: Matrix) -> str:
    """What to tell a user whose driver is too old for the variant that was named; empty where it is not.

    Raises:
        MachineError: when every GPU is older than what any build is for.
    """
    require_possible(gpus)
    old = next((text for row in matrix.variants if row.name == variant and (text := too_old(row.cuda, gpus))), "")
    return f"{old}: nothing of {variant} runs here before the driver is updated." if old else ""


def require_possible(gpus: Sequence[Gpu]) -> None:
    """Refuse GPUs that no build can help.

    Raises:
        MachineError: when every GPU is older than what any build is for.
    """
    if gpus and all(gpu.capability < _OLDEST for gpu in gpus):
        raise MachineError(
            f"this machine's {gpus[0].name} ({gpus[0].capability}) is older than {_OLDEST} (Volta), where "
            "the compilers and Triton begin: no build can help.",
            fix="Use the plain PyTorch implementations of the models (transformers has them), or a newer GPU.",
        )


def misfit(row: Variant, gpus: Sequence[Gpu]) -> str:
    """Why a variant does not run on these GPUs; empty where it does."""
    supported = row.supported_archs
    lacking = [gpu for gpu in gpus if code_for(gpu.capability, supported) not in supported]
    if lacking:
        return f"nvcc {row.cuda} makes no code for {lacking[0].capability}"
    return too_old(row.cuda, gpus)


def too_old(cuda: str, gpus: Sequence[Gpu]) -> str:
    """Why a driver is too old for a CUDA release; empty where none is."""
    wanted = DRIVERS.get(cuda.split(".")[0], 0)
    for gpu in gpus:
        major = gpu.driver.split(".")[0]
        if major.isdigit() and int(major) < wanted:
            return f"CUDA {cuda.split('.')[0]} needs driver {wanted}, and there is {gpu.driver}"
    return ""


def _key(cuda: str) -> tuple[int, ...]:
    return tuple(int(part) for part in cuda.split("."))
