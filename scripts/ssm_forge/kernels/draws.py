"""What all cases share: sizes and switches as one frozen value, and random tensors that a seed gives everywhere."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ssm_forge.kernels.backends import Backend
from ssm_forge.kernels.tolerance import Comparison

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Draw:
    """Random tensors from one seed; made on the CPU, so that every machine draws the same."""

    def __init__(self, seed: int, case: object, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator().manual_seed(seed ^ zlib.crc32(repr(case).encode()))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normally distributed numbers of mean 0 and variance 1."""
        return torch.randn(*shape, generator=self._generator).to(self._device, dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Evenly distributed numbers in [low, high)."""
        return (low + (high - low) * torch.rand(*shape, generator=self._generator)).to(self._device, dtype)

    def integers(self, low: int, high: int, count: int) -> list[int]:
        """``count`` numbers in [low, high)."""
        drawn: list[int] = torch.randint(low, high, (count,), generator=self._generator).tolist()
        return drawn

    def shuffled(self, count: int) -> list[int]:
        """The numbers from 0 to ``count`` - 1 in random order."""
        drawn: list[int] = torch.randperm(count, generator=self._generator).tolist()
        return drawn


@dataclass(frozen=True)
class Case:
    """What all cases share."""

    dtype: str = "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        return DTYPES[self.dtype]

    def invalid(self) -> str:
        """Why upstream's kernel does not take these sizes; empty when it does."""
        return ""

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        """Call ``backend`` with inputs drawn from ``seed``: a comparison for each tensor that comes out or is changed.

        Raises:
            Exception: whatever the function under test raises.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Have an environment variable set to ``value`` for as long as the context lasts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
