"""How users call the kernels: autocast, torch.compile, CUDA graphs, streams, checkpointing, packed sequences.

Each case makes a call that way and compares it with the same call made plainly (the kernels' results are compared with
float64 elsewhere), or, where rounding differs by design, with the float64 recurrence.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssm_forge.kernels import blocks, reference
from ssm_forge.kernels.backends import Backend
from ssm_forge.kernels.draws import Case, Draw, environment
from ssm_forge.kernels.plans import Plan
from ssm_forge.kernels.sequences import zipped
from ssm_forge.kernels.tolerance import UNIT, Comparison, compare_to_scale, identical

# Sums of float32 in another order: atomic additions, and the rounding of what was made from them.
REORDERED = 1e-5


def _leaves(draw: Draw, *, batch: int = 2, dim: int = 128, length: int = 600) -> dict[str, Tensor]:
    """Inputs of a scan that the kernel along the sequence takes."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.requires_grad_()

    return {
        "u": leaf(draw.normal(batch, dim, length)),
        "delta": leaf(draw.uniform(-4.0, 0.0, batch, dim, length)),
        "A": leaf(-torch.exp(draw.uniform(-2.3, 1.4, dim, 16))),
        "B": leaf(draw.normal(batch, 16, length)),
        "C": leaf(draw.normal(batch, 16, length)),
        "D": leaf(draw.normal(dim)),
        "z": leaf(draw.normal(batch, dim, length)),
    }


def _copies(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}


def _gradients(out: Tensor, grad: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return dict(zipped(leaves, gradients))


def _same(got: Tensor, plain: Tensor, got_grads: dict[str, Tensor], plain_grads: dict[str, Tensor]) -> list[Comparison]:
    """The same output to the bit, and gradients that differ by the order of sums."""
    comparisons = [identical("out", got.detach(), plain.detach())]
    return comparisons + [
        compare_to_scale(f"d{n}", g, plain_grads[n].double(), REORDERED) for n, g in got_grads.items()
    ]


@dataclass(frozen=True)
class UsageCase(Case):
    """One way to call; ``way`` names a method here, ``kernels`` the scan's (see ``SSM_FORGE_KERNELS``)."""

    way: str = "side_stream"
    kernels: str = "upstream"

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        with environment("SSM_FORGE_KERNELS", self.kernels):
            comparisons: list[Comparison] = getattr(self, self.way)(backend, Draw(seed, self, device), device, seed)
        return comparisons

    def _plain(self, backend: Backend, leaves: dict[str, Tensor], grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = backend.scan(**leaves, delta_softplus=True)
        return out, _gradients(out, grad, leaves)

    def side_stream(self, backend: Backend, draw: Draw, device: torch.device, seed: int) -> list[Comparison]:
        """On a stream of its own, while the default stream is busy."""
        leaves = _leaves(draw)
        grad = torch.ones_like(leaves["u"])
        plain, plain_grads = self._plain(backend, _copies(leaves), grad)
        stream, busy = torch.cuda.Stream(device), torch.randn(4096, 4096, device=device)
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            got, grads = self._plain(backend, _copies(leaves), grad)
        for _ in range(10):
            busy = busy @ busy
        torch.cuda.synchronize(device)
        return _same(got, plain, grads, plain_grads)

    def cuda_graph(self, backend: Backend, draw: Draw, device: torch.device, seed: int) -> list[Comparison]:
        """Captured once, replayed twice with other inputs."""
        static, other = _leaves(draw), _leaves(draw)
        grad = torch.ones_like(static["u"])
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._plain(backend, static, grad)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got, grads = self._plain(backend, static, grad)
        with torch.no_grad():
            for name, tensor in static.items():
                tensor.copy_(other[name])
        graph.replay()
        graph.replay()
        torch.cuda.synchronize(device)
        plain, plain_grads = self._plain(backend, other, grad)
        return _same(got, plain, grads, plain_grads)

    def compiled_scan(self, backend: Backend, draw: Draw, device: torch.device, seed: int) -> list[Comparison]:
        """torch.compile around the scan; graphs break there, since upstream registers no op for it."""
        leaves = _leaves(draw)
        grad = torch.ones_like(leaves["u"])
        plain, plain_grads = self._plain(backend, leaves, grad)
        compiled = torch.compile(
            lambda **inputs: backend.scan(**inputs, delta_softplus=True) * 1.0, backend="aot_eager"
        )
        out = compiled(**leaves)
        return _same(out, plain, _gradients(out, grad, leaves), plain_grads)

    def compiled_conv(self, backend: Backend, draw: Draw, device: torch.device, seed: int) -> list[Comparison]:
        """torch.compile around the convolution, without a break: upstream registers an op for it."""
        leaves = {
            "x": draw.normal(2, 64, 300).requires_grad_(),
            "weight": draw.normal(64, 4).requires_grad_(),
            "bias": draw.normal(64).requires_grad_(),
        }
        grad = torch.ones_like(leaves["x"])
        plain = backend.conv(**leaves, activation="silu")
        plain_grads = _gradients(plain, grad, leaves)
        compiled = torch.compile(lambda **g: backend.conv(**g, activation="silu"), backend="aot_eager", fullgraph=True)
        out = compiled(**leaves)
        return _same(out, plain, _gradients(out, grad, leaves), plain_grads)

    def autocast(self, backend: Backend, draw: Draw, device: torch.device, seed: int) -> list[Comparison]:
        """A Mamba block of float32 parameters, computed in 16 bits."""
        torch.manual_seed(seed)
        block = backend.blocks["mamba"](64, d_state=16, layer_idx=0, device=device)
        x = draw.normal(2, 300, 64).requires_grad_()
        with torch.autocast("cuda", self.torch_dtype):
            out = block(x)
        exact_p = {n: reference.wide(p.detach()).requires_grad_() for n, p in block.named_parameters()}
        wide = reference.wide(x.detach()).requires_grad_()
        exact = blocks.mamba(exact_p, wide)
        grad = draw.normal(2, 300, 64)
        out.backward(grad.to(out.dtype))
        exact.backward(reference.wide(grad.to(out.dtype)))
        unit = UNIT[self.torch_dtype]
        comparisons = [compare_to_scale("out", out, exact, 2 * blocks.FORWARD * unit)]
        comparisons.append(compare_to_scale("dx", x.grad, wide.grad, 2 * blocks.GRADIENT * unit))
        for name, parameter in block.named_parameters():
            comparisons.append(
                compare_to_scale(f"d{name}", parameter.grad, exact_p[name].grad, 2 * blocks.GRADIENT * unit)
            )
        return comparisons

    def checkpointed(self, backend: Backend, draw: Draw, device: torch.device, seed: int) -> list[Comparison]:
        """A Mamba block whose forward runs a second time in the backward."""
        checkpoint = importlib.import_module("torch.utils.checkpoint").checkpoint
        torch.manual_seed(seed)
        block = backend.blocks["mamba"](64, d_state=16, layer_idx=0, device=device)
        x = draw.normal(2, 300, 64).requires_grad_()
        leaves = {"x": x, **dict(block.named_parameters())}
        plain = block(x)
        plain_grads = _gradients(plain, torch.ones_like(plain), leaves)
        out = checkpoint(block, x, use_reentrant=False)
        return _same(out, plain, _gradients(out, torch.ones_like(out), leaves), plain_grads)

    def packed(self, backend: Backend, draw: Draw, device: torch.device, seed: int) -> list[Comparison]:
        """A Mamba2 block on sequences one after the other (seq_idx), against each alone."""
        torch.manual_seed(seed)
        block = backend.blocks["mamba2"](256, d_state=64, layer_idx=0, device=device, dtype=self.torch_dtype)
        lengths = [40, 200, 60]
        x = draw.normal(1, sum(lengths), 256, dtype=self.torch_dtype)
        owners = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None].to(device)
        with torch.no_grad():
            got = block(x, seq_idx=owners)
            alone = torch.cat([block(part.contiguous()) for part in x.split(lengths, dim=1)], dim=1)
        unit = blocks.TF32 if self.dtype == "fp32" else UNIT[self.torch_dtype]
        return [compare_to_scale("out", got, alone.double(), 4 * blocks.FORWARD * unit)]


def full() -> list[Plan]:
    """The plans of ``--full``: every way to call, with each of the scan's kernels."""
    ways = {
        "side stream": UsageCase(way="side_stream"),
        "CUDA graph": UsageCase(way="cuda_graph"),
        "torch.compile": UsageCase(way="compiled_scan"),
        "autocast fp16": UsageCase(way="autocast", dtype="fp16"),
        "autocast bf16": UsageCase(way="autocast", dtype="bf16"),
        "gradient checkpointing": UsageCase(way="checkpointed"),
    }
    plans = [Plan(f"usage {name}", (case, replace(case, kernels="along"))) for name, case in ways.items()]
    plans.append(Plan("usage torch.compile, convolution", (UsageCase(way="compiled_conv"),)))
    plans.append(Plan("usage packed sequences", (UsageCase(way="packed", dtype="fp16"),)))
    return plans
