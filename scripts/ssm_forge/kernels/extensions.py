"""The two compiled modules, called without Python in between; also a second build of them by path."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_forge.kernels.draws import DTYPES
from ssm_forge.kernels.timing import Call

MODULES = {"causal_conv1d": "causal_conv1d_cuda", "selective_scan": "selective_scan_cuda"}


@dataclass(frozen=True)
class Build:
    """One build of the extensions.

    Attributes:
        label: ``installed``, or what the user called another one.
        modules: kernel -> its compiled module; another build may have only one of them.
    """

    label: str
    modules: dict[str, Any]


def installed() -> Build:
    """The installed extensions.

    Raises:
        ImportError: when one of them does not load.
    """
    return Build("installed", {kernel: importlib.import_module(name) for kernel, name in MODULES.items()})


def load(label: str, folder: Path) -> Build:
    """The extensions found under ``folder``, loaded beside the installed ones.

    Raises:
        FileNotFoundError: when the folder has none that fits this Python.
    """
    modules = {}
    for kernel, name in MODULES.items():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            paths = sorted(folder.rglob(f"{name}{suffix}"))
            if paths:
                # The part before the dot keeps the two builds apart in sys.modules.
                full = f"ssm_forge_{label}.{name}"
                loader = importlib.machinery.ExtensionFileLoader(full, str(paths[0]))
                spec = importlib.util.spec_from_loader(full, loader)
                assert spec is not None
                modules[kernel] = importlib.util.module_from_spec(spec)
                loader.exec_module(modules[kernel])
                break
    if not modules:
        msg = f"{folder} holds neither {' nor '.join(MODULES.values())} for this Python"
        raise FileNotFoundError(msg)
    return Build(label, modules)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor; ``nbytes`` is younger than torch 2.0."""
    return int(tensor.element_size() * tensor.nelement())


@dataclass(frozen=True)
class ConvInputs:
    """What a convolution reads and writes, made once; SiLU and bias on, as Mamba uses it."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    out: Tensor
    grad: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor

    @classmethod
    def make(
        cls,
        batch: int,
        dim: int,
        length: int,
        width: int,
        dtype: torch.dtype,
        *,
        channel_last: bool,
        device: str = "cuda",
    ) -> ConvInputs:
        """Random tensors: x, out, grad and dx (B, D, L) in ``dtype``; weight (D, W) and bias (D,) in float32."""

        def plane(fill: bool) -> Tensor:
            make = torch.randn if fill else torch.empty
            if channel_last:
                return make(batch, length, dim, device=device, dtype=dtype).transpose(1, 2)
            return make(batch, dim, length, device=device, dtype=dtype)

        weight, bias = torch.randn(dim, width, device=device), torch.randn(dim, device=device)
        return cls(plane(True), weight, bias, plane(False), plane(True), plane(False), weight.clone(), bias.clone())

    def forward(self, build: Build) -> Call:
        """The call of a build's kernel that writes out = silu(conv(x))."""
        run = build.modules["causal_conv1d"].causal_conv1d_fwd
        return lambda: run(self.x, self.weight, self.bias, None, None, self.out, None, True)

    def backward(self, build: Build) -> Call:
        """The call of a build's kernel that writes dx, and adds to what dweight and dbias hold."""
        run = build.modules["causal_conv1d"].causal_conv1d_bwd
        return lambda: run(
            self.x,
            self.weight,
            self.bias,
            self.grad,
            None,
            None,
            None,
            self.dx,
            self.dweight,
            self.dbias,
            None,
            True,
        )

    def bytes_moved(self, *, backward: bool) -> int:
        """The least traffic in bytes: x in and out out; or x and grad in and dx out."""
        return (3 if backward else 2) * _size(self.x)


@dataclass(frozen=True)
class ScanInputs:
    """What a scan reads, as Mamba uses it: B and C vary, D, bias and softplus on, and most times a gate."""

    u: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    z: Tensor | None
    delta_bias: Tensor
    grad: Tensor

    @classmethod
    def make(
        cls,
        batch: int,
        dim: int,
        length: int,
        states: int,
        dtype: torch.dtype,
        *,
        gated: bool = True,
        device: str = "cuda",
    ) -> ScanInputs:
        """Random tensors: u, delta, z, grad (B, D, L) and b, c (B, 1, N, L) in ``dtype``; a (D, N) in float32."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        a = -torch.arange(1.0, states + 1, device=device).repeat(dim, 1)
        return cls(
            normal(batch, dim, length),
            (torch.rand(batch, dim, length, device=device) * 4 - 4).to(dtype),
            a,
            normal(batch, 1, states, length),
            normal(batch, 1, states, length),
            torch.ones(dim, device=device),
            normal(batch, dim, length) if gated else None,
            torch.rand(dim, device=device) * 0.5,
            normal(batch, dim, length),
        )

    def arguments(self) -> tuple[Tensor | None, ...]:
        """All but ``grad``, in the order in which the kernels take them."""
        return self.u, self.delta, self.a, self.b, self.c, self.d, self.z, self.delta_bias

    def forward(self, build: Build) -> Call:
        """The call of a build's forward kernel, which returns out, the states and, with a gate, the gated out."""
        run = build.modules["selective_scan"].fwd
        arguments = self.arguments()
        return lambda: run(*arguments, True)

    def backward(self, build: Build) -> Call:
        """The call of a build's backward kernel, which returns the gradients; the forward runs once here."""
        module, arguments = build.modules["selective_scan"], self.arguments()
        out, states, *_ = module.fwd(*arguments, True)
        ungated = None if self.z is None else out
        return lambda: module.bwd(*arguments, self.grad, states, ungated, None, True, False)

    def bytes_moved(self, *, backward: bool) -> int:
        """The least traffic in bytes of planes (B, D, L), and of B and C.

        u and delta in, out out; backward u, delta and grad in, two gradients out. A gate adds two planes (itself and
        the gated out), backward three (itself, out, its gradient).
        """
        plane, small, gated = _size(self.u), 2 * _size(self.b), self.z is not None
        if backward:
            return (8 if gated else 5) * plane + 2 * small
        return (5 if gated else 3) * plane + small


@dataclass(frozen=True)
class Point:
    """One size to measure.

    Attributes:
        size: the filter width of a convolution, the states of a scan.
        channel_last: the layout of a convolution.
        gated: a scan's output is multiplied with SiLU of a gate, as in Mamba's block.
    """

    kernel: str
    dtype: str
    batch: int
    dim: int
    length: int
    size: int
    channel_last: bool = False
    gated: bool = True

    @property
    def bytes_needed(self) -> int:
        """About how many bytes of GPU memory inputs, outputs and the plain PyTorch way take together."""
        return 12 * self.batch * self.dim * self.length * (4 if self.dtype == "fp32" else 2)

    def inputs(self, device: str = "cuda") -> ConvInputs | ScanInputs:
        """Random inputs of this size, on the device."""
        shape = (self.batch, self.dim, self.length, self.size, DTYPES[self.dtype])
        if self.kernel == "causal_conv1d":
            return ConvInputs.make(*shape, channel_last=self.channel_last, device=device)
        return ScanInputs.make(*shape, gated=self.gated, device=device)
