"""Whole Mamba and Mamba2 blocks, and generation with them, against the step-by-step recurrence.

The reference takes a block's own parameters to float64 and computes the definition with the loops of
:mod:`reference`. A block in 16 bits rounds after each of its stages (projection, convolution, step size,
scan, gate, norm, projection), so here the bound is

    |block - exact| <= r * u * max|exact|

with u the unit roundoff of the block's dtype and r stated below: 4 forward, 8 for gradients and for
generation, whose state is kept in the block's dtype and rounded at every token; twice that for Mamba2, whose
chunked form stores the products and states of each chunk in that dtype, too. For float32, u is 2^-24 *
sqrt(terms of the longest sum) in Mamba; Mamba2's Triton kernels multiply float32 matrices as TF32, so
there u is 2^-11. Those kernels run with one tile size each (see ``machine.missing_packages``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssm_forge.kernels import reference
from ssm_forge.kernels.backends import Backend, poisoned
from ssm_forge.kernels.draws import Case, Draw
from ssm_forge.kernels.plans import PRECISIONS, Plan
from ssm_forge.kernels.tolerance import UNIT, Comparison, compare_to_scale

FORWARD, GRADIENT, GENERATION = 4, 8, 8
TF32 = 2.0**-11
NORM_EPS = 1e-5

STATEMENT = (
    f"blocks: |block - exact| <= r*u*max|exact|; r = {FORWARD} forward, {GRADIENT} gradients, {GENERATION} "
    "generation, twice that for Mamba2; u = 2^-11 (fp16), 2^-8 (bf16), 2^-24*sqrt(length*inner channels) "
    "(fp32 Mamba), 2^-11 (fp32 Mamba2, whose matrix products are TF32)"
)

Parameters = dict[str, Tensor]


def _conv(p: Parameters, x: Tensor) -> Tensor:
    """The block's short convolution with SiLU; x is (B, D, L)."""
    return reference.causal_conv1d(x, p["conv1d.weight"][:, 0], p["conv1d.bias"], activation="silu")[0]


def mamba(p: Parameters, x: Tensor) -> Tensor:
    """Mamba (Gu and Dao 2023, section 3.4): x (B, L, M) to (B, L, M).

    Args:
        p: the block's parameters by upstream's names, float64.
    """
    inner, xz = p["out_proj.weight"].shape[1], x @ p["in_proj.weight"].T
    rank, states = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    u = _conv(p, xz[..., :inner].transpose(1, 2))
    rank_b_c = u.transpose(1, 2) @ p["x_proj.weight"].T
    step, b, c = (t.transpose(1, 2) for t in rank_b_c.split([rank, states, states], dim=-1))
    y, _ = reference.selective_scan(
        u,
        p["dt_proj.weight"] @ step,
        -torch.exp(p["A_log"]),
        b,
        c,
        p["D"],
        xz[..., inner:].transpose(1, 2),
        delta_bias=p["dt_proj.bias"],
        delta_softplus=True,
    )
    return y.transpose(1, 2) @ p["out_proj.weight"].T


def mamba2(p: Parameters, x: Tensor, *, states: int, groups: int) -> Tensor:
    """Mamba2 (Dao and Gu 2024, section 7): as Mamba with one decay and one step per head of channels.

    Args:
        p: the block's parameters by upstream's names, float64.
        states: N, states per channel.
        groups: G, how many B and C there are.
    """
    inner, heads = p["out_proj.weight"].shape[1], p["A_log"].shape[0]
    per_head = inner // heads
    z, xbc, step = (x @ p["in_proj.weight"].T).split([inner, inner + 2 * groups * states, heads], dim=-1)
    u, b, c = _conv(p, xbc.transpose(1, 2)).split([inner, groups * states, groups * states], dim=1)

    def spread(per_head_value: Tensor, dim: int) -> Tensor:
        return per_head_value.repeat_interleave(per_head, dim=dim)

    y, _ = reference.selective_scan(
        u,
        spread(step.transpose(1, 2), 1),
        spread(-torch.exp(p["A_log"]), 0)[:, None].expand(inner, states),
        b.unflatten(1, (groups, states)),
        c.unflatten(1, (groups, states)),
        spread(p["D"], 0),
        delta_bias=spread(p["dt_bias"], 0),
        delta_softplus=True,
    )
    gated = (y.transpose(1, 2) * reference.silu(z)).unflatten(-1, (groups, inner // groups))
    normed = gated * torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + NORM_EPS)
    return (normed.flatten(-2) * p["norm.weight"]) @ p["out_proj.weight"].T


@dataclass(frozen=True)
class BlockCase(Case):
    """One block: forward and backward, or (``generate``) a prompt and then token after token."""

    kind: str = "mamba"
    batch: int = 2
    length: int = 64
    d_model: int = 64
    states: int = 16
    fused: bool = True
    generate: bool = False

    def invalid(self) -> str:
        if self.kind == "mamba2" and (self.d_model % 256 or self.states % 16):
            return "8 heads of 64 channels, so that the convolution's strides are multiples of 8; tiles of 16"
        if self.d_model % 16 or self.states < 2:
            return "channels come in multiples of 16"
        return "a prompt needs at least 2 tokens" if self.generate and self.length < 2 else ""

    @property
    def unit(self) -> float:
        """``u`` of the bound above; for Mamba2 doubled."""
        if self.kind == "mamba2":
            return 2 * (TF32 if self.dtype == "fp32" else UNIT[self.torch_dtype])
        if self.dtype == "fp32":
            return 2.0**-24 * math.sqrt(self.length * 2 * self.d_model)
        return UNIT[self.torch_dtype]

    def _build(self, backend: Backend, device: torch.device, seed: int) -> Any:
        torch.manual_seed(seed)
        make = backend.blocks[self.kind]
        path = "use_fast_path" if self.kind == "mamba" else "use_mem_eff_path"
        switch = {path: self.fused}
        return make(self.d_model, d_state=self.states, layer_idx=0, device=device, dtype=self.torch_dtype, **switch)

    def _exact(self, block: Any, x: Tensor) -> tuple[Tensor, Parameters, Tensor]:
        parameters = {name: reference.wide(p.detach()).requires_grad_() for name, p in block.named_parameters()}
        wide = reference.wide(x.detach()).requires_grad_()
        if self.kind == "mamba":
            return mamba(parameters, wide), parameters, wide
        return mamba2(parameters, wide, states=self.states, groups=1), parameters, wide

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        draw = Draw(seed, self, device)
        block = self._build(backend, device, seed)
        x = draw.normal(self.batch, self.length, self.d_model, dtype=self.torch_dtype)
        exact, parameters, wide = self._exact(block, x)
        if self.generate:
            with torch.no_grad(), poisoned(device):
                got = self._generate(block, x)
            return [compare_to_scale("generated", got, exact, GENERATION * self.unit)]
        grad = draw.normal(self.batch, self.length, self.d_model, dtype=self.torch_dtype)
        leaf = x.detach().requires_grad_()
        with poisoned(device):
            got = block(leaf)
            got.backward(grad)
        exact.backward(reference.wide(grad))
        comparisons = [compare_to_scale("out", got, exact, FORWARD * self.unit)]
        pairs = {"x": (leaf, wide), **{n: (p, parameters[n]) for n, p in block.named_parameters()}}
        for name, (own, expected) in pairs.items():
            gradient = torch.full_like(own, torch.nan) if own.grad is None else own.grad
            comparisons.append(compare_to_scale(f"d{name}", gradient, expected.grad, GRADIENT * self.unit))
        return comparisons

    def _generate(self, block: Any, x: Tensor) -> Tensor:
        """Half of x as the prompt, the rest one token at a time with the state kept."""
        prompt = self.length // 2
        memory = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
        outputs = [block(x[:, :prompt], inference_params=memory)]
        for t in range(prompt, self.length):
            memory.seqlen_offset = t
            outputs.append(block(x[:, t : t + 1], inference_params=memory))
        return torch.cat(outputs, dim=1)


def quick() -> list[Plan]:
    """A plan of Mamba2's block, once: the kernels that Triton compiles where they are used, and no package holds."""
    case = BlockCase(dtype="fp16", kind="mamba2", d_model=256, states=64)
    return [Plan("mamba2 block forward and backward fp16 (Triton)", (case,))]


def full() -> list[Plan]:
    """The plans of ``--full``: both blocks in each precision, and generation with both."""
    plans = []
    for kind, dtype in ((k, d) for k in ("mamba", "mamba2") for d in PRECISIONS):
        states, d_model = (16, 64) if kind == "mamba" else (64, 256)
        blocks = tuple(
            BlockCase(dtype=dtype, kind=kind, d_model=d_model, states=states, length=length, fused=fused)
            for length in (64, 200)
            for fused in (True, False)
        )
        plans.append(Plan(f"{kind} block forward and backward {dtype}", blocks))
        loop = BlockCase(dtype=dtype, kind=kind, d_model=d_model, states=states, length=24, generate=True)
        plans.append(Plan(f"{kind} generation {dtype}", (loop,)))
    return plans
