"""Large tensors and their sizes: where they lie, and just beside the edges at which an offset goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Maker:
    """Makes large random tensors where they will lie: on the GPU, without a second copy."""

    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normally distributed numbers of mean 0 and variance 1."""
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(generator=self.generator)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Evenly distributed numbers in [low, high)."""
        return torch.empty(shape, dtype=dtype, device=self.device).uniform_(low, high, generator=self.generator)


def up(number: int, multiple: int) -> int:
    """The next multiple from a number on."""
    return -(-number // multiple) * multiple


def down(number: int, multiple: int) -> int:
    """The last multiple up to a number."""
    return number // multiple * multiple


def fit(elements: int, others: int, multiple: int) -> int:
    """The size of a dimension that brings a tensor to ``elements``, and not across the edge it lies at."""
    beyond = elements > 2**32 or 2**31 < elements < 2**32
    return up(-(-elements // others), multiple) if beyond else down(elements // others, multiple)
