"""What the kernels should compute, in float64 and plain PyTorch, written from the definitions.

Shapes: B batch, D channels, L length, N states, G groups, W filter width. Every function takes tensors of
any floating dtype, converts them to float64 (complex128), and is differentiable by autograd. Speed is no
goal here: recurrences are loops over time, so that they read like the equations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssm_forge.kernels.sequences import pairwise


def wide(tensor: Tensor) -> Tensor:
    """The same numbers in float64 or complex128 (exact: both hold every narrower value)."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x)."""
    return x * torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), without overflow; its gradient is right at 0, too, where clamp and abs have none."""
    return torch.logaddexp(x, torch.zeros_like(x))


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """out[t] = act(bias + sum_w weight[w] * x[t - (W-1) + w]), a filter per channel.

    Args:
        x: (B, D, L).
        weight: (D, W).
        bias: (D,).
        seq_idx: (B, L) int32, the sequence each token belongs to; a token sees only its own sequence, and
            a negative number is padding, whose output is 0.
        initial_states: (B, D, W-1), what came before x[0]; it belongs to the sequence of the first token.
            Zero when absent.
        activation: None or ``silu``.

    Returns:
        out (B, D, L), and the final states (B, D, W-1): the last W-1 inputs.
    """
    x, weight = wide(x), wide(weight)
    batch, dim, length = x.shape
    width = weight.shape[1]
    before = x.new_zeros(batch, dim, width - 1) if initial_states is None else wide(initial_states)
    extended = torch.cat([before, x], dim=2)
    owner = None
    if seq_idx is not None:
        first = seq_idx[:, :1] if initial_states is not None else torch.full_like(seq_idx[:, :1], -1)
        owner = torch.cat([first.expand(batch, width - 1), seq_idx], dim=1)
    out = x.new_zeros(batch, dim, length)
    for tap in range(width):
        term = weight[:, tap, None] * extended[:, :, tap : tap + length]
        if owner is not None:
            same = owner[:, tap : tap + length] == seq_idx
            term = torch.where(same[:, None, :], term, torch.zeros_like(term))
        out = out + term
    if bias is not None:
        out = out + wide(bias)[:, None]
    if activation == "silu":
        out = silu(out)
    if seq_idx is not None:
        out = torch.where((seq_idx < 0)[:, None, :], torch.zeros_like(out), out)
    return out, extended[:, :, length:]


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cache_seqlens: Sequence[int] | None = None,
    state_indices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """One or more tokens of generation: the filter over what the state remembers, then the new tokens.

    Args:
        x: (B, D, L), the new tokens.
        state: (S, D, K) with K >= W-1; row ``state_indices[b]`` (or b) belongs to batch entry b.
        cache_seqlens: where each ring buffer stands; None for a buffer that shifts left.
        state_indices: rows of ``state``; a negative one is padding: output 0, state untouched.

    Returns:
        out (B, D, L) and the new state (S, D, K).
    """
    x, weight, new_state = wide(x), wide(weight), wide(state).clone()
    batch, dim, length = x.shape
    width, kept = weight.shape[1], state.shape[2]
    out = x.new_zeros(batch, dim, length)
    for entry in range(batch):
        row = entry if state_indices is None else state_indices[entry]
        if row < 0:
            continue
        old = new_state[row].clone()
        if cache_seqlens is None:
            new_state[row] = torch.cat([old, x[entry]], dim=1)[:, -kept:]
            past = old[:, kept - (width - 1) :]
        else:
            at = cache_seqlens[entry]
            past = old[:, [(at - (width - 1) + i) % kept for i in range(width - 1)]]
            for token in range(length):
                new_state[row, :, (at + token) % kept] = x[entry, :, token]
        window = torch.cat([past, x[entry]], dim=1)
        for token in range(length):
            value = (weight * window[:, token : token + width]).sum(dim=1)
            if bias is not None:
                value = value + wide(bias)
            out[entry, :, token] = silu(value) if activation == "silu" else value
    return out, new_state


def varlen_states(x: Tensor, cu_seqlens: Sequence[int], state_len: int) -> Tensor:
    """The last ``state_len`` tokens of each packed sequence, zeros before a short one.

    Args:
        x: (T, D), sequences one after the other.
        cu_seqlens: S + 1 boundaries, from 0 to T.

    Returns:
        (S, D, state_len).
    """
    states = wide(x).new_zeros(len(cu_seqlens) - 1, x.shape[1], state_len)
    for row, (start, end) in enumerate(pairwise(cu_seqlens)):
        for back in range(1, min(state_len, end - start) + 1):
            states[row, :, state_len - back] = wide(x[end - back])
    return states


def _per_channel(matrix: Tensor, dim: int, *, is_complex: bool) -> Tensor:
    """B or C as (B, D, N, L), or (D, N, 1) broadcastable over batch and time when constant."""
    if matrix.dim() == 2:
        return wide(matrix)[:, :, None]
    matrix = wide(matrix)
    if is_complex:
        matrix = torch.view_as_complex(matrix.unflatten(-1, (-1, 2)).contiguous())
    if matrix.dim() == 3:
        matrix = matrix[:, None]
    return matrix.repeat_interleave(dim // matrix.shape[1], dim=1)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nudge: Tensor | None = None,
    push: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t];  y[t] = C[t] h[t] + D u[t], gated by silu(z).

    With a complex A the states come in conjugate pairs, of which one is kept: y is twice the real part.

    Args:
        u, delta, z: (B, D, L).
        a: (D, N), real or complex.
        b, c: constant (D, N) with A's dtype, or varying with time: (B, N, L), (B, G, N, L), and for a
            complex A the last axis is 2L, real and imaginary parts in turn.
        d, delta_bias: (D,).
        nudge: zeros (D, N) with A's dtype, which change nothing; their gradient is the sum over b and t of
            dh[t] delta[t]^2 B[t] u[t], the part of dA that :mod:`tolerance` speaks of.
        push: zeros (L, B, D, N) with A's dtype, which change nothing either; their gradient is dh[t] B[t] u[t],
            what the gradient of a step sums over the states.

    Returns:
        y (B, D, L) and the last state (B, D, N).
    """
    # Long: one formula, to be read in one piece beside the paper; half of it says what the shapes are.
    u, delta, a = wide(u), wide(delta), wide(a)
    batch, dim, length = u.shape
    if delta_bias is not None:
        delta = delta + wide(delta_bias)[:, None]
    if delta_softplus:
        delta = softplus(delta)
    b = _per_channel(b, dim, is_complex=a.is_complex())
    c = _per_channel(c, dim, is_complex=a.is_complex())
    state = a.new_zeros(batch, dim, a.shape[1])
    outputs = []
    for t in range(length):
        b_t = b[..., t if b.shape[-1] > 1 else 0]
        c_t = c[..., t if c.shape[-1] > 1 else 0]
        step = delta[:, :, t, None]
        added = (step if push is None else step + push[t]) * b_t * u[:, :, t, None]
        if nudge is not None:
            added = added * (1 + nudge * step)
        state = torch.exp(step * a) * state + added
        y = (c_t * state).sum(dim=-1)
        outputs.append(2 * y.real if y.is_complex() else y)
    out = torch.stack(outputs, dim=2)
    if d is not None:
        out = out + wide(d)[:, None] * u
    if z is not None:
        out = out * silu(wide(z))
    return out, state


def scan_walks(inputs: Mapping[str, Tensor | None], grad: Tensor, push: Tensor, *, softplus: bool) -> dict[str, float]:
    """How large the sums are that the gradients of a scan's D, delta and delta_bias are, whatever is left of them.

    The terms have random signs, so a sum is as large as the root of the sum of their squares, and may cancel.

    Args:
        inputs: u, z, delta with its gradient, and delta_bias of :func:`selective_scan`, in float64.
        grad: of y, (B, D, L).
        push: the gradient of ``push`` there, (L, B, D, N).
        softplus: whether delta is its argument.
    """
    u, z, delta, bias = (inputs[name] for name in ("u", "z", "delta", "delta_bias"))
    assert u is not None and delta is not None and delta.grad is not None
    with torch.no_grad():
        d = (grad * u * (1.0 if z is None else silu(z))).square()
        slope = torch.sigmoid(delta if bias is None else delta + bias[:, None]) if softplus else torch.ones_like(delta)
        steps = push.abs().square().sum(dim=3).permute(1, 2, 0) * slope.square()
        # Where the states before count for more, the gradient itself is the larger.
        steps = torch.maximum(steps, delta.grad.square())
        squares = {"d": d.sum(dim=(0, 2)), "delta": steps, "delta_bias": steps.sum(dim=(0, 2))}
        return {name: float(sums.max().sqrt()) for name, sums in squares.items()}


def selective_scan_closed_form(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The same map without a recurrence, to check :func:`selective_scan` by another road.

    y[t] = sum over s <= t of C[t] exp(A * (delta[s+1] + ... + delta[t])) delta[s] B[s] u[s], an L x L
    matrix per channel. Arguments as there, without options.
    """
    u, delta, a = wide(u), wide(delta), wide(a)
    length = u.shape[2]
    b = _per_channel(b, u.shape[1], is_complex=a.is_complex()).expand(*u.shape[:2], a.shape[1], length)
    c = _per_channel(c, u.shape[1], is_complex=a.is_complex()).expand(*u.shape[:2], a.shape[1], length)
    elapsed = torch.cumsum(delta, dim=2)
    span = elapsed[:, :, :, None] - elapsed[:, :, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=u.device).tril()
    decay = torch.exp(a[None, :, :, None, None] * torch.where(causal, span, 0.0)[:, :, None])
    matrix = (c[..., :, None] * decay * b[..., None, :]).sum(dim=2) * causal
    out = (matrix * (delta * u)[:, :, None, :]).sum(dim=3)
    return 2 * out.real if out.is_complex() else out
