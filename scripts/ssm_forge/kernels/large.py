"""Tensors so large that an offset in them does not fit in 32 bits: ``check --large``.

Offsets go wrong at 2^31 elements (signed) and at 2^32 (unsigned), in silence or with an illegal access. Each case
here has a size just below or just above one of them, in one tensor of one kernel. The CUDA kernels are compared
with the float64 references on slices at both ends of the tensors. Decays are strong in all of them, so that a slice
of some hundred tokens has in it all that its last tokens depend on. The Triton kernels must give on the far end of a
large tensor the same bits as on a copy of that end alone, which is small; what they give on small tensors is
compared with float64 elsewhere (``check --full``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssm_forge.kernels import reference
from ssm_forge.kernels.backends import Backend
from ssm_forge.kernels.draws import Case
from ssm_forge.kernels.large_tensors import Maker, fit
from ssm_forge.kernels.plans import Plan
from ssm_forge.kernels.sequences import pairwise, zipped
from ssm_forge.kernels.tolerance import Comparison, compare, identical

# Just below and just above. A kernel adds up several products, and each goes wrong by itself: so far above, the product
# that matters is beyond, for all of the last block of 256 tokens of a tensor with rows of 33280.
MARGIN = 2**25
EDGES = {"below 2^31": 2**31 - 2**16, "above 2^31": 2**31 + MARGIN, "above 2^32": 2**32 + MARGIN}
TAIL = 512
# What else is on the GPU: the context, and the references on slices.
OVERHEAD_BYTES = 3 << 30


@dataclass(frozen=True)
class LargeCase(Case):
    """One kernel with one large tensor.

    Attributes:
        what: a key of :data:`KINDS`.
        edge: a key of :data:`EDGES`, or the one size of a kind that has only one.
    """

    dtype: str = "bf16"
    what: str = ""
    edge: str = ""

    @property
    def bytes_needed(self) -> int:
        """Bytes of GPU memory for all tensors of the case."""
        return KINDS[self.what].bytes_per_element * EDGES.get(self.edge, 2**31) + OVERHEAD_BYTES

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        torch.cuda.empty_cache()
        generator = torch.Generator(device).manual_seed(seed)
        comparisons = KINDS[self.what].run(backend, Maker(device, generator), EDGES.get(self.edge, 2**31))
        torch.cuda.empty_cache()
        return comparisons


def _conv_slices(x: Tensor, out: Tensor, weight: Tensor, bias: Tensor) -> list[Comparison]:
    """First and last channels of the first and last sequence, at both ends."""
    length, dim, taps = x.shape[2], x.shape[1], weight.shape[1] - 1
    comparisons = []
    for b in sorted({0, x.shape[0] - 1}):
        for channels in (slice(0, 8), slice(dim - 8, dim)):
            for end in (slice(0, TAIL), slice(length - TAIL, length)):
                part, skip = x[b, channels, end][None], 0 if end.start == 0 else taps
                exact, _ = reference.causal_conv1d(part, weight[channels], bias[channels], activation="silu")
                got, name = out[b, channels, end][None, :, skip:], f"out[{b}, {channels.start}:, {end.start}:]"
                comparisons.append(compare(name, got, exact[:, :, skip:], terms=taps + 2))
    return comparisons


def _conv(
    backend: Backend, make: Maker, elements: int, *, last: bool, view: bool = False, batch: int = 1
) -> list[Comparison]:
    """causal_conv1d, forward and backward.

    Args:
        elements: how far the last row of the last sequence is from the first, in one product of an index and a stride.
        last: channel-last.
        view: the input is part of a wide tensor, which is the large one.
        batch: 1: the product is that of a token or a channel; 3: that of a sequence.
    """
    # Not more tokens than 65535 of the forward's chunks of 64, which a grid ends at.
    dim = 2048
    width = 33280 if view else dim
    length = fit(elements, max(1, batch - 1) * width, 8)
    if last:
        x = make.normal(batch, length, width)[..., width - dim :].transpose(1, 2)
    else:
        x = make.normal(batch, dim, length)
    weight, bias = (make.normal(*shape, dtype=torch.float32) for shape in ((dim, 4), (dim,)))
    leaf = x.detach().requires_grad_()
    out = backend.conv(leaf, weight, bias, activation="silu")
    comparisons = _conv_slices(x, out.detach(), weight, bias)
    # The gradient where it can be known from a slice: kernels recompute the output, and reach 3 tokens on.
    grad = torch.zeros_like(out)
    ends = (slice(0, TAIL), slice(length - TAIL, length))
    for end in ends:
        grad[:, :, end] = make.normal(batch, dim, TAIL)
    out.backward(grad)
    assert leaf.grad is not None
    for b in sorted({0, batch - 1}):
        for end in ends:
            before = min(end.start, 3)
            part = reference.wide(x[b, :8, end.start - before : end.stop].detach())[None].requires_grad_()
            exact, _ = reference.causal_conv1d(part, weight[:8], bias[:8], activation="silu")
            exact[:, :, before:].backward(reference.wide(grad[b, :8, end])[None])
            assert part.grad is not None
            got = leaf.grad[b, :8, end][None]
            comparisons.append(compare(f"dx[{b}, :8, {end.start}:]", got, part.grad[:, :, before:], terms=6))
    return comparisons


def _conv_update(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    """One token for a few rows of a large pool of states, the last among them."""
    dim = 4096
    rows = fit(elements, dim * 4, 1)
    pool = make.normal(rows, dim, 4)
    chosen = [0, rows // 2, rows - 1]
    before = pool[chosen].clone()
    x, weight = make.normal(3, dim, 1), make.normal(dim, 4, dtype=torch.float32)
    exact, after = reference.causal_conv1d_update(x, before, weight, None, activation="silu")
    indices = torch.tensor(chosen, dtype=torch.int32, device=make.device)
    out = backend.conv_update(x, pool, weight, None, activation="silu", conv_state_indices=indices)
    return [compare("out", out, exact, terms=5), identical("conv_state", pool[chosen], after.to(pool.dtype))]


def _conv_states(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    """The tails of packed sequences that end far into a large tensor."""
    dim = 4096
    tokens = fit(elements, dim, 1)
    x = make.normal(tokens, dim)
    bounds = [0, tokens // 2, tokens - 2, tokens]
    got = backend.conv_states(x, torch.tensor(bounds, dtype=torch.int32, device=make.device), 4)
    wanted = torch.zeros_like(got)
    for row, (start, end) in enumerate(pairwise(bounds)):
        kept = min(4, end - start)
        wanted[row, :, 4 - kept :] = x[end - kept : end].T
    return [identical("states", got, wanted)]


def _scan(backend: Backend, make: Maker, elements: int, *, states: int = 4) -> list[Comparison]:
    """selective_scan, forward and (below 2^32, for its memory) backward, at the far end of its inputs."""
    batch, dim = 3, 2048
    length = fit(elements, batch * dim, 8)
    u, delta = make.normal(batch, dim, length), make.uniform(0.5, 1.0, batch, dim, length)
    a = -make.uniform(0.5, 1.5, dim, states, dtype=torch.float32)
    b, c = (make.normal(batch, states, length) for _ in "bc")
    backward = elements < 2**32
    leaves = [t.detach().requires_grad_(backward) for t in (u, delta)]
    out, state = backend.scan(*leaves, a, b, c, return_last_state=True)
    comparisons = []
    for row in (0, batch - 1):
        for channels in (slice(0, 4), slice(dim - 4, dim)):
            end = slice(length - TAIL, length)
            parts = [reference.wide(t[row, channels, end])[None].requires_grad_() for t in (u, delta)]
            exact, exact_state = reference.selective_scan(
                parts[0],
                parts[1],
                reference.wide(a[channels]),
                reference.wide(b[row, :, end])[None],
                reference.wide(c[row, :, end])[None],
            )
            half = slice(TAIL // 2, TAIL)
            name = f"[{row}, {channels.start}:, {length - TAIL // 2}:]"
            comparisons.append(
                compare(f"out{name}", out[row, channels, -TAIL // 2 :][None], exact[:, :, half], terms=TAIL)
            )
            comparisons.append(compare(f"last_state{name}", state[row, channels][None], exact_state, terms=TAIL))
    if backward:
        grad = make.normal(batch, dim, length)
        out.backward(grad)
        row, channels = batch - 1, slice(dim - 4, dim)
        parts = [reference.wide(t[row, channels, -TAIL:])[None].requires_grad_() for t in (u, delta)]
        exact, _ = reference.selective_scan(
            parts[0],
            parts[1],
            reference.wide(a[channels]),
            reference.wide(b[row, :, -TAIL:])[None],
            reference.wide(c[row, :, -TAIL:])[None],
        )
        exact.backward(reference.wide(grad[row, channels, -TAIL:])[None])
        for name, leaf, part in zipped(("du", "ddelta"), leaves, parts):
            assert leaf.grad is not None and part.grad is not None
            got, expected = leaf.grad[row, channels, -TAIL // 2 :][None], part.grad[:, :, TAIL // 2 :]
            comparisons.append(compare(name, got, expected, terms=TAIL))
    return comparisons


def _scan_states(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    """selective_scan whose saved states are the large tensor: two tokens, 256 states a channel."""
    dim, states, length = 4352, 256, 2
    batch = fit(elements, dim * states, 1)
    u, delta = make.normal(batch, dim, length), make.uniform(0.05, 0.5, batch, dim, length)
    a = -make.uniform(0.5, 1.5, dim, states, dtype=torch.float32)
    b, c = (make.normal(batch, states, length) for _ in "bc")
    leaves = [t.detach().requires_grad_() for t in (u, delta, b, c)]
    out, state = backend.scan(leaves[0], leaves[1], a, leaves[2], leaves[3], return_last_state=True)
    grad = make.normal(batch, dim, length)
    out.backward(grad)
    comparisons = []
    for row in (0, batch // 2, batch - 1):
        parts = [reference.wide(t[row][None]).requires_grad_() for t in (u, delta, b, c)]
        exact, exact_state = reference.selective_scan(parts[0], parts[1], reference.wide(a), parts[2], parts[3])
        exact.backward(reference.wide(grad[row][None]))
        comparisons.append(compare(f"out[{row}]", out[row][None], exact, terms=length + states))
        comparisons.append(compare(f"last_state[{row}]", state[row][None], exact_state, terms=length + states))
        for name, leaf, part in zipped(("du", "ddelta", "db", "dc"), leaves, parts):
            assert leaf.grad is not None and part.grad is not None
            terms = (length + states) * (dim if name in ("db", "dc") else 1)
            comparisons.append(compare(f"{name}[{row}]", leaf.grad[row][None], part.grad, terms=terms))
    return comparisons


def _op(name: str) -> Any:
    return importlib.import_module(f"mamba_ssm.ops.triton.{name}")


def _same(name: str, large: Tensor, small: Tensor) -> Comparison:
    return identical(name, large.detach().contiguous(), small.detach().contiguous())


def _ssd_view(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    """Mamba-2's scan whose dt is a view into a wide tensor, as Nemotron has it; against a contiguous copy."""
    heads, per_head, states, wide = 8, 64, 64, 33280
    length = fit(elements, wide, 256)
    dt = make.uniform(0.0, 1.0, 1, length, wide)[..., -heads:]
    x, a = make.normal(1, length, heads, per_head), -make.uniform(0.0, 1.0, heads, dtype=torch.float32)
    b, c = (make.normal(1, length, 1, states) for _ in "bc")
    run = _op("ssd_combined").mamba_chunk_scan_combined
    leaves = [t.detach().requires_grad_() for t in (x, dt)]
    copies = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, dt)]
    grad = make.normal(*x.shape)
    outs = []
    for inputs in (leaves, copies):
        out = run(inputs[0], inputs[1], a, b, c, 256)
        out.backward(grad)
        outs.append(out)
    return [
        _same("out", *outs),
        *(_same(f"d{n}", p.grad, q.grad) for n, p, q in zipped(("x", "dt"), leaves, copies)),
    ]


def _ssd_states(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    """Mamba-2's scan with as many chunk states as the edge says; the last sequence against itself alone."""
    heads, per_head, states, batch = 64, 64, 256, 4
    length = fit(elements, batch * heads * per_head * states, 1) * 256
    x, dt = make.normal(batch, length, heads, per_head), make.uniform(0.0, 1.0, batch, length, heads)
    a = -make.uniform(0.5, 1.0, heads, dtype=torch.float32)
    b, c = (make.normal(batch, length, 1, states) for _ in "bc")
    run = _op("ssd_combined").mamba_chunk_scan_combined
    with torch.no_grad():
        out, last = run(x, dt, a, b, c, 256, return_final_states=True)
        alone, state = run(
            *(t[-1:].clone() for t in (x, dt)), a, *(t[-1:].clone() for t in (b, c)), 256, return_final_states=True
        )
    return [_same("out[-1]", out[-1:], alone), _same("final_states[-1]", last[-1:], state)]


def _rows(module: str, function: str, make: Maker, elements: int, **options: Any) -> list[Comparison]:
    """A norm over rows, forward and backward; the last rows against themselves alone."""
    columns = 4096
    rows = fit(elements, columns, 1)
    x, weight = make.normal(rows, columns), make.normal(columns, dtype=torch.float32)
    run = getattr(_op(module), function)
    leaf, end = x.requires_grad_(), x[-16:].detach().clone().requires_grad_()
    grad = make.normal(16, columns)
    whole_grad = torch.zeros_like(x)
    whole_grad[-16:] = grad
    comparisons = []
    outs = [run(t, weight, None, **options) for t in (leaf, end)]
    comparisons.append(_same("out[-16:]", outs[0][-16:], outs[1]))
    outs[0].backward(whole_grad)
    outs[1].backward(grad)
    assert leaf.grad is not None and end.grad is not None
    return [*comparisons, _same("dx[-16:]", leaf.grad[-16:], end.grad)]


def _swiglu(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    """SwiGLU, forward and backward; the last rows against themselves alone."""
    columns = 4096
    rows = fit(elements, columns, 1)
    x = make.normal(rows, columns)
    ops = _op("k_activations")
    out, small = ops._swiglu_fwd(x), ops._swiglu_fwd(x[-16:].clone())
    grad = make.normal(rows, columns // 2)
    dx, dsmall = ops._swiglu_bwd(x, grad), ops._swiglu_bwd(x[-16:].clone(), grad[-16:].clone())
    return [_same("out[-16:]", out[-16:], small), _same("dx[-16:]", dx[-16:], dsmall)]


def _state_update(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    """A token of generation with a large state; the last sequence against itself alone."""
    heads, per_head, states = 64, 64, 128
    batch = fit(elements, heads * per_head * states, 1)
    state, x = make.normal(batch, heads, per_head, states), make.normal(batch, heads, per_head)
    dt = make.uniform(0.0, 1.0, batch, heads, dtype=torch.float32)[..., None].expand(batch, heads, per_head)
    a = -make.uniform(0.0, 1.0, heads, dtype=torch.float32)[:, None, None].expand(heads, per_head, states)
    b, c = (make.normal(batch, 1, states) for _ in "bc")
    d, bias = (make.normal(heads, dtype=torch.float32)[:, None].expand(heads, per_head) for _ in "db")
    run = _op("selective_state_update").selective_state_update
    alone = state[-1:].clone()
    small = run(alone, x[-1:].clone(), dt[-1:], a, b[-1:].clone(), c[-1:].clone(), d, dt_bias=bias, dt_softplus=True)
    out = run(state, x, dt, a, b, c, d, dt_bias=bias, dt_softplus=True)
    return [_same("out[-1]", out[-1:], small), _same("state[-1]", state[-1:], alone)]


@dataclass(frozen=True)
class Kind:
    """What is large, and how it is checked.

    Attributes:
        bytes_per_element: GPU memory of all tensors for each element of the large one.
        edges: keys of :data:`EDGES`; where memory is what decides, the largest are left to larger GPUs.
    """

    title: str
    run: Callable[[Backend, Maker, int], list[Comparison]]
    bytes_per_element: int
    edges: tuple[str, ...] = tuple(EDGES)


def _first(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    return _conv(backend, make, elements, last=False)


def _last(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    return _conv(backend, make, elements, last=True)


def _view(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    return _conv(backend, make, elements, last=True, view=True)


def _sequences(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    return _conv(backend, make, elements, last=True, batch=3)


def _scan_along(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    """With sixteen states the kernel that runs along the sequence scans."""
    calls = backend.calls()
    comparisons = _scan(backend, make, elements, states=16)
    calls_made = {name: count - calls[name] for name, count in backend.calls().items()}
    upstream_calls = calls_made.get("forward upstream", 0) + calls_made.get("backward upstream", 0)
    problem = "upstream's kernel ran instead of the one along the sequence" if upstream_calls else ""
    return [*comparisons, Comparison("kernel", float(upstream_calls), float("inf") if upstream_calls else 0.0, problem)]


def _gated(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    return _rows("layernorm_gated", "rmsnorm_fn", make, elements, group_size=512)


def _norm(backend: Backend, make: Maker, elements: int) -> list[Comparison]:
    return _rows("layer_norm", "rms_norm_fn", make, elements)


KINDS = {
    "conv": Kind("causal_conv1d, input, output and gradients", _first, 10),
    "conv last": Kind("causal_conv1d channel-last, input, output and gradients", _last, 10),
    "conv batch": Kind("causal_conv1d channel-last, third sequence", _sequences, 15),
    "conv view": Kind("causal_conv1d channel-last, a view into a wide tensor", _view, 3),
    "update": Kind("causal_conv1d_update, pool of states", _conv_update, 3),
    "varlen": Kind("causal_conv1d_varlen_states, packed tokens", _conv_states, 3),
    "scan": Kind("selective_scan, input, output and gradients", _scan, 16),
    "along": Kind("selective_scan along the sequence, input, output and gradients", _scan_along, 17),
    "states": Kind("selective_scan, saved states and gradients", _scan_states, 12, ("below 2^31", "above 2^31")),
    "ssd view": Kind("Mamba-2 scan, dt a view into a wide tensor", _ssd_view, 4),
    "ssd states": Kind("Mamba-2 scan, chunk states", _ssd_states, 16),
    "gated": Kind("gated RMS norm, rows", _gated, 12),
    "norm": Kind("RMS norm, rows", _norm, 12),
    "swiglu": Kind("SwiGLU, rows", _swiglu, 8),
    "token": Kind("Mamba-2 state update, state", _state_update, 4),
}


def plans(free_bytes: int) -> list[Plan]:
    """A plan of each case: to run where it fits in ``free_bytes`` of GPU memory; the others say what they need."""
    result = []
    for key, kind in KINDS.items():
        for edge in kind.edges:
            case = LargeCase(what=key, edge=edge)
            name = f"large: {kind.title}, {edge} ({case.bytes_needed / 1e9:.0f} GB)"
            reason = f"needs {case.bytes_needed / 1e9:.0f} GB of GPU memory, {free_bytes / 1e9:.0f} GB are free"
            result.append(Plan(name, () if case.bytes_needed > free_bytes else (case,), reason))
    return result
