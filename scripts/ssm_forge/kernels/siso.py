"""Mamba-3's scan with one input and one output (SISO), of Triton kernels only, against float64.

Upstream takes everything but the step, the decay, the biases and D as bfloat16, and stores what it turns, scales and
sums over the sequence (phases, too) as bfloat16. So the bound is that of :mod:`blocks` for bfloat16, doubled.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssm_forge.kernels import blocks, reference
from ssm_forge.kernels.backends import Backend, poisoned
from ssm_forge.kernels.draws import Case, Draw
from ssm_forge.kernels.plans import Plan
from ssm_forge.kernels.sequences import zipped
from ssm_forge.kernels.tolerance import UNIT, Comparison, compare_to_scale

STATES, CHANNELS, ANGLES = 64, 64, 16
NO_MAMBA3 = "this mamba-ssm has no Mamba-3"


def available() -> bool:
    """Whether the mamba_ssm of this environment has Mamba-3; nothing is imported."""
    spec = importlib.util.find_spec("mamba_ssm")
    folders = (spec.submodule_search_locations or []) if spec else []
    return any((Path(folder) / "modules" / "mamba3.py").is_file() for folder in folders)


@contextmanager
def first_configurations() -> Iterator[None]:
    """Mamba-3's Triton kernels with one configuration each: to try all 200 takes minutes, and changes no result."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("mamba_ssm.ops.triton.mamba3.")]
    values = [value for module in modules for value in vars(module).values()]
    tuned = {id(v): v for v in values if type(v).__name__ == "Autotuner"}
    before = [(tuner, tuner.configs) for tuner in tuned.values()]
    for tuner, configs in before:
        tuner.configs = configs[:1]
    try:
        yield
    finally:
        for tuner, configs in before:
            tuner.configs = configs


def _turned(x: Tensor, bias: Tensor, phase: Tensor) -> Tensor:
    """x (B, L, 1, N) plus a bias (H, N) for each head, its pairs of numbers turned by phases (B, L, H, R), R <= N/2."""
    pairs = (x + bias).unflatten(-1, (-1, 2))
    whole = torch.nn.functional.pad(phase, (0, pairs.shape[-2] - phase.shape[-1]))
    cos, sin = torch.cos(whole), torch.sin(whole)
    return torch.stack(
        [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos], -1
    ).flatten(-2)


def _phase(p: dict[str, Tensor]) -> Tensor:
    """The angle (B, L, H, R) by which each token is turned: the sum of pi * tanh(rate) * step so far."""
    return torch.cumsum(torch.tanh(p["Angles"]) * math.pi * p["DT"].transpose(1, 2)[..., None], dim=1)


def exact(p: dict[str, Tensor]) -> Tensor:
    """The recurrence in float64, of the trapezoidal rule, by upstream's names and shapes.

    h[t] = a[t] (h[t-1] + (1 - s[t]) dt[t] v[t-1] k[t-1]) + s[t] dt[t] v[t] k[t], where a = exp(ADT), s = sigmoid(Trap);
    y[t] = h[t] q[t] + D v[t], gated by silu(z); q and k with their biases, turned.

    Args:
        p: Q, K (B, L, 1, N); V, Z (B, L, H, P); ADT, DT, Trap (B, H, L); Q_bias, K_bias (H, N); Angles (B, L, H, R);
            D (H,).

    Returns:
        (B, L, H, P).
    """
    phase, v, dt = _phase(p), p["V"], p["DT"]
    q, k = _turned(p["Q"], p["Q_bias"], phase), _turned(p["K"], p["K_bias"], phase)
    alpha, share = torch.exp(p["ADT"]), torch.sigmoid(p["Trap"])
    outer = v[..., :, None] * k[..., None, :]
    state, outs = torch.zeros_like(outer[:, 0]), []
    for t in range(v.shape[1]):
        if t:
            state = state + ((1 - share) * dt)[:, :, t, None, None] * outer[:, t - 1]
        state = alpha[:, :, t, None, None] * state + (share * dt)[:, :, t, None, None] * outer[:, t]
        outs.append((state * q[:, t, :, None]).sum(dim=-1))
    y = torch.stack(outs, dim=1) + p["D"][:, None] * v
    return y * reference.silu(p["Z"])


def emulated(chunk_size: int = 64, **inputs: Tensor) -> Tensor:
    """mamba3_siso_combined in float32 PyTorch, without a recurrence: as attention with decays, L x L for each head."""
    p = {name: tensor.float() for name, tensor in inputs.items()}
    phase = _phase(p)
    q, k = _turned(p["Q"], p["Q_bias"], phase), _turned(p["K"], p["K_bias"], phase)
    share, decay = torch.sigmoid(p["Trap"]), torch.cumsum(p["ADT"], dim=2)
    own = share * p["DT"]
    later = torch.nn.functional.pad(((1 - share) * p["DT"])[..., 1:], (0, 1))
    causal = torch.ones(own.shape[2], own.shape[2], device=own.device).tril(-1)
    span = (decay[..., :, None] - decay[..., None, :]) * causal
    products = torch.einsum("blhn,bshn->bhls", q, k)
    weights = products * (torch.exp(span) * causal * (own + later)[..., None, :] + torch.diag_embed(own))
    y = torch.einsum("bhls,bshp->blhp", weights, p["V"]) + p["D"][:, None] * p["V"]
    return (y * torch.nn.functional.silu(p["Z"])).to(inputs["V"].dtype)


@dataclass(frozen=True)
class SisoCase(Case):
    """mamba3_siso_combined, forward and backward, with gate and skip, for two heads of 64 channels or more.

    ``compiled`` calls it within what torch.compile makes.
    """

    dtype: str = "bf16"
    batch: int = 2
    length: int = 200
    heads: int = 4
    compiled: bool = False

    def invalid(self) -> str:
        if self.dtype != "bf16":
            return "upstream computes in bfloat16"
        return "" if self.length >= 16 else "a token by itself is turned against itself: its gradient is rounding only"

    def _leaves(self, draw: Draw) -> dict[str, Tensor]:
        """Steps and decays as the block has them at first, q and k as its norms leave them."""
        wide, low = (self.batch, self.length, self.heads), self.torch_dtype
        per_head = (self.batch, self.heads, self.length)
        step = draw.uniform(math.log(0.001), math.log(0.1), *per_head).exp()
        made = {
            "Q": draw.normal(self.batch, self.length, 1, STATES, dtype=low),
            "K": draw.normal(self.batch, self.length, 1, STATES, dtype=low),
            "V": draw.normal(*wide, CHANNELS, dtype=low),
            "ADT": -step * draw.uniform(0.1, 2.0, *per_head),
            "DT": step,
            "Trap": draw.normal(*per_head, dtype=low),
            "Q_bias": 1 + draw.normal(self.heads, STATES) / 4,
            "K_bias": 1 + draw.normal(self.heads, STATES) / 4,
            "Angles": draw.uniform(-0.5, 2.0, *wide, ANGLES, dtype=low),
            "D": draw.normal(self.heads),
            "Z": draw.normal(*wide, CHANNELS, dtype=low),
        }
        return {name: tensor.requires_grad_() for name, tensor in made.items()}

    def _call(self, backend: Backend) -> Callable[..., Tensor]:
        if not self.compiled:
            return backend.siso
        compiled: Callable[..., Tensor] = torch.compile(
            lambda **inputs: backend.siso(**inputs) * 1.0, backend="aot_eager"
        )
        return compiled

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        draw = Draw(seed, self, device)
        leaves = self._leaves(draw)
        grad = draw.normal(self.batch, self.length, self.heads, CHANNELS, dtype=self.torch_dtype)
        # What torch.compile makes has memory of its own.
        with first_configurations(), nullcontext() if self.compiled else poisoned(device):
            out = self._call(backend)(**leaves, chunk_size=64)
            gradients = torch.autograd.grad(out, list(leaves.values()), grad)
        wide = {name: reference.wide(tensor.detach()).requires_grad_() for name, tensor in leaves.items()}
        expected = exact(wide)
        expected_gradients = torch.autograd.grad(expected, list(wide.values()), reference.wide(grad))
        unit = 2 * UNIT[self.torch_dtype]
        comparisons = [compare_to_scale("out", out, expected, blocks.FORWARD * unit)]
        for name, got, wanted in zipped(leaves, gradients, expected_gradients):
            comparisons.append(compare_to_scale(f"d{name}", got, wanted, blocks.GRADIENT * unit))
        return comparisons


def full() -> list[Plan]:
    """The plans of ``--full``."""
    cases = (SisoCase(), SisoCase(length=64, heads=2), SisoCase(batch=1, length=333))
    lacks = "" if available() else NO_MAMBA3
    compiled = (SisoCase(compiled=True),)
    return [
        Plan("mamba3 SISO forward and backward bf16", () if lacks else cases, lacks),
        Plan("mamba3 SISO under torch.compile bf16", () if lacks else compiled, lacks),
    ]
