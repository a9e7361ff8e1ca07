"""A Mamba block in plain PyTorch with upstream's parameter names, to test the block checks with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssm_forge.kernels import backends


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T, rounded once: torch before 2.2 has no products of half precision on a CPU."""
    return F.linear(x.float(), weight.float()).to(x.dtype)


class EmulatedMamba:
    """Upstream's Mamba, as far as the checks use it.

    Args:
        remember: tokens of the past that generation may see; None for all. Anything less is a fault.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int,
        device: torch.device,
        dtype: torch.dtype,
        remember: int | None = None,
        **ignored: Any,
    ) -> None:
        inner, rank = 2 * d_model, max(1, d_model // 16)
        self.remember = remember
        self._parameters = {
            "A_log": torch.log(torch.arange(1.0, d_state + 1)).repeat(inner, 1),
            "D": torch.ones(inner),
            "in_proj.weight": torch.randn(2 * inner, d_model, dtype=dtype) / d_model**0.5,
            "conv1d.weight": torch.randn(inner, 1, 4, dtype=dtype) / 2,
            "conv1d.bias": torch.randn(inner, dtype=dtype) / 2,
            "x_proj.weight": torch.randn(rank + 2 * d_state, inner, dtype=dtype) / inner**0.5,
            "dt_proj.weight": torch.randn(inner, rank, dtype=dtype) / rank**0.5,
            "dt_proj.bias": torch.empty(inner).uniform_(-5.0, -2.0).to(dtype),
            "out_proj.weight": torch.randn(d_model, inner, dtype=dtype) / inner**0.5,
        }
        for name, value in self._parameters.items():
            self._parameters[name] = value.to(device).requires_grad_()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Upstream's name and the tensor of each parameter."""
        yield from self._parameters.items()

    def __call__(self, x: Tensor, inference_params: Any = None) -> Tensor:
        if inference_params is None:
            return self._forward(x)
        memory, length = inference_params.key_value_memory_dict, x.shape[1]
        past = memory.get(0, x[:, :0])
        if self.remember is not None:
            past = past[:, past.shape[1] - min(self.remember, past.shape[1]) :]
        memory[0] = torch.cat([past, x], dim=1)
        return self._forward(memory[0])[:, -length:]

    def _forward(self, x: Tensor) -> Tensor:
        p = self._parameters
        states, rank = p["A_log"].shape[1], p["dt_proj.weight"].shape[1]
        u, z = _product(x, p["in_proj.weight"]).transpose(1, 2).chunk(2, dim=1)
        u = backends.conv(u, p["conv1d.weight"][:, 0], p["conv1d.bias"], activation="silu")
        parts = _product(u.transpose(1, 2), p["x_proj.weight"]).split([rank, states, states], dim=-1)
        b, c = (part.transpose(1, 2) for part in parts[1:])
        y = backends.parallel_scan(
            u,
            _product(parts[0], p["dt_proj.weight"]).transpose(1, 2),
            -torch.exp(p["A_log"]),
            b,
            c,
            p["D"],
            z,
            p["dt_proj.bias"].float(),
            delta_softplus=True,
        )
        return _product(y.transpose(1, 2), p["out_proj.weight"])
