"""Compute capabilities: what users write, what nvcc and torch take, what a binary holds.

Source for the compatibility rule: NVIDIA CUDA C++ Programming Guide, "Binary Compatibility": SASS for
X.y runs on X.z with z >= y, among desktop and data-centre parts; PTX for X.y is compiled by the driver
for anything newer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ssm_forge.base.errors import UsageError

_PTX_ALONE = re.compile(r"^compute_\d{2,3}$")
_CAPABILITY = re.compile(r"^(\d{1,2})\.(\d)(\+PTX)?$", re.IGNORECASE)

# Tegra parts share a major number with desktop parts but not their binaries.
_TEGRA = frozenset({(5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0)})


@dataclass(frozen=True, order=True)
class Capability:
    """One compute capability, such as 9.0.

    Attributes:
        major: generation.
        minor: part within the generation.
    """

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def sm(self) -> str:
        """The name in nvcc's options and in binaries: ``90`` for 9.0."""
        return f"{self.major}{self.minor}"

    @classmethod
    def parse(cls, text: str) -> Capability:
        """Read ``9.0``.

        Raises:
            UsageError: for anything else.
        """
        match = _CAPABILITY.match(text.strip())
        if match is None or match.group(3):
            raise UsageError(
                f"'{text}' is not a compute capability.", fix="Write it as MAJOR.MINOR, such as 8.0 or 9.0."
            )
        return cls(int(match.group(1)), int(match.group(2)))

    @classmethod
    def from_sm(cls, sm: str) -> Capability:
        """Read ``90``, ``sm_90`` or ``sm_103a`` as binaries name it."""
        digits = re.sub(r"\D", "", sm.removeprefix("sm_").removeprefix("compute_"))
        return cls(int(digits[:-1]), int(digits[-1]))

    def runs_sass_of(self, sass: Capability) -> bool:
        """Whether a GPU of this capability executes machine code made for ``sass``."""
        if self == sass:
            return True
        pair = {(self.major, self.minor), (sass.major, sass.minor)}
        return self.major == sass.major and self.minor >= sass.minor and not pair & _TEGRA


@dataclass(frozen=True)
class ArchList:
    """What a binary holds: SASS for each of ``sass`` and PTX for each of ``ptx``, both sorted."""

    sass: tuple[Capability, ...]
    ptx: tuple[Capability, ...] = ()

    def __str__(self) -> str:
        """The form of TORCH_CUDA_ARCH_LIST: ``8.0;9.0+PTX``; ``compute_90`` for PTX that has no SASS beside it.

        :meth:`parse` reads it back. What has such PTX alone is only ever found in a binary, never asked for.
        """
        alone = [f"compute_{c.sm}" for c in self.ptx if c not in self.sass]
        return ";".join([*(f"{c}+PTX" if c in self.ptx else str(c) for c in self.sass), *alone])

    @property
    def tag(self) -> str:
        """The form in a build string: ``sm80_sm90ptx``; ``compute90`` for PTX that has no SASS beside it."""
        alone = [f"compute{c.sm}" for c in self.ptx if c not in self.sass]
        return "_".join([*(f"sm{c.sm}{'ptx' if c in self.ptx else ''}" for c in self.sass), *alone])

    def support(self, gpu: Capability) -> str:
        """How a GPU runs this binary: ``native``, ``jit`` (PTX, compiled on first use) or ``none``."""
        if any(gpu.runs_sass_of(c) for c in self.sass):
            return "native"
        return "jit" if any(c <= gpu for c in self.ptx) else "none"

    @property
    def is_portable(self) -> bool:
        """Made for more than one generation of GPUs, or for ones to come."""
        return bool(self.ptx) or len({c.major for c in self.sass}) > 1

    @property
    def gpu_range(self) -> str:
        """The GPUs that can run it, as a version range of the virtual package ``__cuda_arch``: ``>=8.0,<10``."""
        intervals: list[tuple[Capability, Capability | None]] = []
        for capability in sorted({*self.sass, *self.ptx}):
            tegra = (capability.major, capability.minor) in _TEGRA
            end = Capability(capability.major, capability.minor + 1) if tegra else Capability(capability.major + 1, 0)
            if capability in self.ptx:
                intervals.append((capability, None))
                break
            if intervals and intervals[-1][1] is not None and intervals[-1][1] >= capability:
                start = intervals.pop()[0]
                intervals.append((start, end))
            else:
                intervals.append((capability, end))
        if len(intervals) > 1 and intervals[-1][1] is None and intervals[-2][1] == intervals[-1][0]:
            intervals[-2:] = [(intervals[-2][0], None)]
        return "|".join(f">={start},<{end}" if end else f">={start}" for start, end in intervals)

    @classmethod
    def parse(cls, text: str) -> ArchList:
        """Read ``8.0;9.0+PTX`` (semicolons, commas or spaces between), and all that :meth:`__str__` writes.

        Raises:
            UsageError: when an item is not a capability, or there is none.
        """
        sass: set[Capability] = set()
        ptx: set[Capability] = set()
        for item in re.split(r"[;,\s]+", text.strip().rstrip(";,")):
            if _PTX_ALONE.match(item):
                ptx.add(Capability.from_sm(item))
                continue
            match = _CAPABILITY.match(item)
            if match is None:
                raise UsageError(
                    f"'{item}' in --cuda-arch '{text}' is not a compute capability.",
                    fix='Use native, families, all, or a list such as 9.0 or "8.0;9.0+PTX".',
                )
            capability = Capability(int(match.group(1)), int(match.group(2)))
            sass.add(capability)
            if match.group(3):
                ptx.add(capability)
        return cls(tuple(sorted(sass)), tuple(sorted(ptx)))

    @classmethod
    def from_tag(cls, tag: str) -> ArchList:
        """Read back what :attr:`tag` wrote; text around it (a build string) is ignored."""
        codes = re.findall(r"(sm|compute)(\d{2,3})(ptx)?(?=_|$)", tag)
        return cls(
            tuple(sorted(Capability.from_sm(sm) for kind, sm, _ in codes if kind == "sm")),
            tuple(sorted(Capability.from_sm(sm) for kind, sm, with_ptx in codes if with_ptx or kind == "compute")),
        )


def families(supported: Iterable[Capability]) -> ArchList:
    """One SASS for each major a toolkit knows: its lowest desktop or data-centre part, else its Tegra parts."""
    lowest: dict[int, Capability] = {}
    tegra = []
    for capability in sorted(supported):
        if (capability.major, capability.minor) in _TEGRA:
            tegra.append(capability)
        else:
            lowest.setdefault(capability.major, capability)
    alone = [c for c in tegra if c.major not in lowest]
    return ArchList(tuple(sorted([*lowest.values(), *alone])))


def code_for(gpu: Capability, supported: Sequence[Capability]) -> Capability:
    """The newest of ``supported`` whose machine code runs on ``gpu``: its own if that can be; ``gpu`` if none does."""
    return max((s for s in supported if gpu.runs_sass_of(s)), default=gpu)


def resolve(
    request: str | None,
    *,
    supported: Sequence[Capability],
    upstream: Sequence[Capability],
    default: str,
    gpus: Sequence[Capability],
) -> ArchList:
    """Turn what the user asked for into a list of architectures.

    Args:
        request: ``native``, ``families``, ``all``, a list, or None for the default (the GPU's own, else
            ``default``).
        supported: what the variant's nvcc can target.
        upstream: what upstream's setup.py hard-codes for this toolkit.
        default: the variant's portable list.
        gpus: compute capabilities of the GPUs of this machine.

    Raises:
        UsageError: for ``native`` without a GPU, or a list that can't be read.
    """
    if request is None:
        codes = [code for g in gpus if (code := code_for(g, supported)) in supported]
        arches = ArchList(tuple(sorted(set(codes)))) if codes else ArchList.parse(default)
    elif request == "native":
        if not gpus:
            raise UsageError(
                "--cuda-arch native needs an NVIDIA GPU, and none was found on this machine.",
                fix='Name the target instead, such as --cuda-arch 9.0 or --cuda-arch "8.0;9.0+PTX".',
            )
        arches = ArchList(tuple(sorted({code_for(g, supported) for g in gpus})))
    elif request == "families":
        arches = families(supported)
    elif request == "all":
        arches = ArchList(tuple(sorted({code_for(a, supported) for a in upstream})))
    else:
        arches = ArchList.parse(request)
        if not set(arches.ptx) <= set(arches.sass):
            raise UsageError(
                f"--cuda-arch '{request}' asks for PTX alone, which torch's builds can't make.",
                fix="Ask for machine code with PTX, such as 9.0+PTX.",
            )
    return arches
