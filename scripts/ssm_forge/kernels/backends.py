"""The functions under test, behind one set of names, so that a wrong one can be put in their place.

``installed`` gives the CUDA kernels of causal-conv1d and mamba-ssm; ``emulated`` gives honest float32
versions in plain PyTorch, written another way than the reference (nn.functional.conv1d, a parallel scan):
the yardstick of the benchmarks, and what the checks themselves are tested with where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody reads)
from torch import Tensor

Function = Callable[..., Any]


def _absent(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("this release, or this emulation, has no such function")


@dataclass(frozen=True)
class Backend:
    """The public functions of both packages, with upstream's arguments.

    Attributes:
        conv: ``causal_conv1d_fn``.
        conv_update: ``causal_conv1d_update``.
        conv_states: ``causal_conv1d_varlen_states``.
        scan: ``selective_scan_fn``.
        blocks: ``mamba`` and ``mamba2``, the classes.
        calls: how often each kernel of the scan was taken in this process; nothing where a build has one only.
        inner: ``mamba_inner_fn``.
        siso: ``mamba3_siso_combined``.
    """

    name: str
    conv: Function
    conv_update: Function
    conv_states: Function
    scan: Function
    blocks: dict[str, Function]
    calls: Callable[[], dict[str, int]] = dict
    inner: Function = _absent
    siso: Function = _absent


def installed() -> Backend:
    """The functions of the packages under test.

    Raises:
        ImportError: when one of them does not load.
    """
    import selective_scan_cuda
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
    from mamba_ssm import Mamba, Mamba2
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

    try:
        from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined as siso
    except ModuleNotFoundError:
        siso = _absent
    return Backend(
        name="installed",
        conv=causal_conv1d_fn,
        conv_update=causal_conv1d_update,
        conv_states=causal_conv1d_varlen_states,
        scan=selective_scan_fn,
        blocks={"mamba": Mamba, "mamba2": Mamba2},
        calls=getattr(selective_scan_cuda, "calls", dict),
        inner=mamba_inner_fn,
        siso=siso,
    )


def emulated() -> Backend:
    """Correct functions in float32 PyTorch, on any device."""
    return Backend("emulated", conv, conv_update, conv_states, parallel_scan, {})


def _mask_other_sequences(x: Tensor, seq_idx: Tensor, initial: Tensor | None, width: int) -> Tensor:
    """Windows (B, D, L, W) of x with other sequences' tokens set to zero."""
    first = seq_idx[:, :1] if initial is not None else torch.full_like(seq_idx[:, :1], -1)
    owners = torch.cat([first.expand(-1, width - 1), seq_idx], dim=1).unfold(1, width, 1)
    windows = x.unfold(2, width, 1)
    return windows * (owners == seq_idx[..., None])[:, None]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """causal_conv1d_fn in float32 PyTorch.

    Args:
        x, initial_states: (B, D, L) and (B, D, W-1).
        weight, bias: (D, W) and (D,).
        seq_idx: (B, L) int32.

    Returns:
        out (B, D, L) in x's dtype; with ``return_final_states`` also the last W-1 inputs.
    """
    width, length = weight.shape[1], x.shape[2]
    wide, filters = x.float(), weight.float()
    before = F.pad(wide, (width - 1, 0))
    if initial_states is not None:
        before = torch.cat([initial_states.float(), wide], dim=2)
    if seq_idx is None:
        out = F.conv1d(before, filters[:, None], None if bias is None else bias.float(), groups=x.shape[1])
    else:
        windows = _mask_other_sequences(before, seq_idx, initial_states, width)
        out = torch.einsum("bdlw,dw->bdl", windows, filters)
        out = out if bias is None else out + bias.float()[:, None]
        out = out.masked_fill((seq_idx < 0)[:, None], 0.0)
    out = (F.silu(out) if activation == "silu" else out).to(x.dtype)
    return (out, before[:, :, length:].to(x.dtype)) if return_final_states else out


def conv_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """causal_conv1d_update in float32 PyTorch: out like ``x``, (B, D) or (B, D, L); writes ``conv_state`` (S, D, K)."""
    if x.dim() == 2:
        with_time = x[:, :, None]
        updated = conv_update(with_time, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
        return updated[:, :, 0]
    batch, dim, length = x.shape
    width, kept = weight.shape[1], conv_state.shape[2]
    rows = torch.arange(batch, device=x.device) if conv_state_indices is None else conv_state_indices.long()
    real = rows >= 0
    chosen = conv_state[rows.clamp(min=0)]
    if cache_seqlens is None:
        together = torch.cat([chosen, x], dim=2)
        window, new = together[:, :, -(length + width - 1) :], together[:, :, -kept:]
    else:
        positions = cache_seqlens.long()[:, None]
        past = (positions + torch.arange(-(width - 1), 0, device=x.device)) % kept
        fresh = (positions + torch.arange(length, device=x.device)) % kept
        window = torch.cat([chosen.gather(2, past[:, None].expand(-1, dim, -1)), x], dim=2)
        new = chosen.scatter(2, fresh[:, None].expand(-1, dim, -1), x)
    conv_state[rows[real]] = new[real]
    out = F.conv1d(window.float(), weight.float()[:, None], None if bias is None else bias.float(), groups=dim)
    out = (F.silu(out) if activation == "silu" else out).to(x.dtype)
    return out * real[:, None, None]


def conv_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """causal_conv1d_varlen_states in PyTorch: (S, D, state_len) of the S sequences that ``x`` (T, D) packs."""
    parts = x.split(cu_seqlens.diff().tolist())
    return torch.stack([F.pad(part.T, (state_len, 0))[:, -state_len:] for part in parts])


def parallel_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,  # noqa: N803 (upstream's argument names)
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """selective_scan_fn by Hillis and Steele's scan: log2(L) rounds over all of (B, D, N, L).

    Arguments and results have the shapes of :func:`ssm_forge.kernels.reference.selective_scan`, the output u's dtype.
    """
    batch, dim, length = u.shape
    # Converted once: a second cast would round its gradient to 16 bits a second time.
    wide, step = u.float(), delta.float()
    if delta_bias is not None:
        step = step + delta_bias[:, None]
    if delta_softplus:
        step = F.softplus(step)

    def over_time(matrix: Tensor) -> Tensor:
        if matrix.dim() == 2:
            return matrix[None, :, :, None]
        matrix = matrix.float() if matrix.dim() == 4 else matrix.float()[:, None]
        if A.is_complex():
            matrix = torch.view_as_complex(matrix.unflatten(-1, (-1, 2)).contiguous())
        return matrix.repeat_interleave(dim // matrix.shape[1], dim=1)

    decay = torch.exp(step[:, :, None] * A[None, :, :, None])
    state = (step * wide)[:, :, None] * over_time(B)
    state = state.expand(batch, dim, A.shape[1], length)
    reach = 1
    while reach < length:
        state = state + F.pad(decay[..., reach:] * state[..., :-reach], (reach, 0))
        decay = torch.cat([decay[..., :reach], decay[..., reach:] * decay[..., :-reach]], dim=-1)
        reach *= 2
    out = (over_time(C) * state).sum(dim=2)
    out = 2 * out.real if out.is_complex() else out
    if D is not None:
        out = out + D[:, None] * wide
    if z is not None:
        out = out * F.silu(z.float())
    out = out.to(u.dtype)
    return (out, state[..., -1]) if return_last_state else out


@contextmanager
def poisoned(device: torch.device) -> Iterator[str]:
    """Memory that a kernel allocates holds NaN until written, so that what it forgets to write shows.

    Yields:
        How: torch fills every new tensor (torch 2.2 and newer, by its deterministic mode), or the caching
        allocator was left full of NaN.
    """
    flags = getattr(torch.utils, "deterministic", None)
    if flags is None:
        if device.type == "cuda":
            for megabytes in (1, 16, 256):
                torch.full((megabytes << 18,), torch.nan, device=device)
        yield "allocator"
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        flags.fill_uninitialized_memory,
    )
    # The same switch would change which backward runs; the cases choose that by themselves.
    switches = [n for n in ("CAUSAL_CONV1D_DETERMINISTIC", "MAMBA_DETERMINISTIC") if n not in os.environ]
    os.environ.update(dict.fromkeys(switches, "0"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    flags.fill_uninitialized_memory = True
    try:
        yield "torch"
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        flags.fill_uninitialized_memory = before[2]
        for name in switches:
            del os.environ[name]
