"""mamba_inner_fn with norms on the step size, B and C, as transformers calls it to train falcon_mamba.

One function of convolution, projections, scan and output projection, with a backward of its own, compared with the
recurrence in float64 by the bound of :mod:`blocks`, doubled: the norms round once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_forge.kernels import backends, blocks, reference
from ssm_forge.kernels.backends import Backend, Function, poisoned
from ssm_forge.kernels.draws import Case, Draw
from ssm_forge.kernels.plans import PRECISIONS, Plan
from ssm_forge.kernels.sequences import zipped
from ssm_forge.kernels.tolerance import UNIT, Comparison, compare_to_scale

# Not small beside the squares below, so that a norm taken twice is seen.
EPS = 1e-2
RANK, OUT = 4, 24
NORMS = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., C) divided by the root of its mean square, times ``weight`` (C,)."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def exact(p: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    """The definition in float64: xz (B, 2D, L) to (B, L, O); the step size is normalized once it is projected."""
    x, z = p["xz"].chunk(2, dim=1)
    rank, states = p["delta_proj_weight"].shape[1], p["A"].shape[1]
    u = reference.causal_conv1d(x, p["conv1d_weight"][:, 0], p["conv1d_bias"], activation="silu")[0]
    step, b, c = (u.transpose(1, 2) @ p["x_proj_weight"].T).split([rank, states, states], dim=-1)
    y, _ = reference.selective_scan(
        u,
        rms_norm(step @ p["delta_proj_weight"].T, weights["dt_rms_weight"], EPS).transpose(1, 2),
        p["A"],
        rms_norm(b, weights["b_rms_weight"], EPS).transpose(1, 2),
        rms_norm(c, weights["c_rms_weight"], EPS).transpose(1, 2),
        p["D"],
        z,
        delta_bias=p["delta_bias"],
        delta_softplus=True,
    )
    return y.transpose(1, 2) @ p["out_proj_weight"].T


def emulated(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: None,
    A: Tensor,  # noqa: N803 (upstream's argument names)
    *,
    D: Tensor,  # noqa: N803
    delta_bias: Tensor,
    b_rms_weight: Tensor,
    c_rms_weight: Tensor,
    dt_rms_weight: Tensor,
    b_c_dt_rms_eps: float,
    norm_of_b: Function = rms_norm,
) -> Tensor:
    """mamba_inner_fn with norms in float32 PyTorch, for any device; arguments as upstream has them.

    Args:
        norm_of_b: another one is a fault.
    """
    x, z = xz.float().chunk(2, dim=1)
    u = backends.conv(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    step, b, c = (u.transpose(1, 2) @ x_proj_weight.float().T).split([rank, states, states], dim=-1)
    y = backends.parallel_scan(
        u,
        rms_norm(step @ delta_proj_weight.float().T, dt_rms_weight, b_c_dt_rms_eps).transpose(1, 2),
        A,
        norm_of_b(b, b_rms_weight, b_c_dt_rms_eps).transpose(1, 2),
        rms_norm(c, c_rms_weight, b_c_dt_rms_eps).transpose(1, 2),
        D,
        z,
        delta_bias,
        delta_softplus=True,
    )
    return (y.transpose(1, 2) @ out_proj_weight.float().T).to(xz.dtype)


@dataclass(frozen=True)
class InnerCase(Case):
    """mamba_inner_fn with all three norms, forward and backward."""

    batch: int = 2
    dim: int = 64
    length: int = 100
    states: int = 16

    def invalid(self) -> str:
        if self.dim % 8 or self.states < 2:
            return "channels come in multiples of 8; a norm of one number is its sign"
        return ""

    def _leaves(self, draw: Draw) -> dict[str, Tensor]:
        """By upstream's names, in its order: what the projections give is about as large as the root of EPS."""
        rows, wide, narrow = RANK + 2 * self.states, self.torch_dtype, torch.float32
        made = {
            "xz": draw.normal(self.batch, 2 * self.dim, self.length, dtype=wide),
            "conv1d_weight": draw.uniform(-0.5, 0.5, self.dim, 1, 4, dtype=wide),
            "conv1d_bias": draw.uniform(-0.5, 0.5, self.dim, dtype=wide),
            "x_proj_weight": (draw.normal(rows, self.dim) / math.sqrt(8 * self.dim)).to(wide),
            "delta_proj_weight": draw.normal(self.dim, RANK, dtype=wide),
            "out_proj_weight": (draw.normal(OUT, self.dim) / math.sqrt(self.dim)).to(wide),
            "A": -torch.exp(draw.uniform(-2.3, 1.4, self.dim, self.states)).to(narrow),
            "D": draw.normal(self.dim),
            "delta_bias": draw.uniform(-4.0, -2.0, self.dim),
        }
        return {name: tensor.requires_grad_() for name, tensor in made.items()}

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        draw = Draw(seed, self, device)
        leaves = self._leaves(draw)
        sizes = (self.states, self.states, self.dim)
        weights = {name: draw.uniform(0.5, 1.5, size) for name, size in zipped(NORMS, sizes)}
        grad = draw.normal(self.batch, self.length, OUT, dtype=self.torch_dtype)
        named = {name: tensor for name, tensor in leaves.items() if name in ("D", "delta_bias")}
        before = [tensor for name, tensor in leaves.items() if name not in named | {"A": None}]
        with poisoned(device):
            # The bias of the output projection, which is between its weight and A, is left out.
            out = backend.inner(*before, None, leaves["A"], **named, **weights, b_c_dt_rms_eps=EPS)
            gradients = torch.autograd.grad(out, list(leaves.values()), grad)
        wide = {name: reference.wide(tensor.detach()).requires_grad_() for name, tensor in leaves.items()}
        expected = exact(wide, {name: reference.wide(weight) for name, weight in weights.items()})
        expected_gradients = torch.autograd.grad(expected, list(wide.values()), reference.wide(grad))
        unit = UNIT[self.torch_dtype] * (math.sqrt(self.length * self.dim) if self.dtype == "fp32" else 1)
        comparisons = [compare_to_scale("out", out, expected, 2 * blocks.FORWARD * unit)]
        for name, got, wanted in zipped(leaves, gradients, expected_gradients):
            comparisons.append(compare_to_scale(f"d{name}", got, wanted, 2 * blocks.GRADIENT * unit))
        return comparisons


def full() -> list[Plan]:
    """The plans of ``--full``: one for each precision."""
    return [
        Plan(f"mamba_inner_fn with norms, forward and backward {dtype}", (InnerCase(dtype=dtype),))
        for dtype in PRECISIONS
    ]
