"""One call of one kernel with fresh random inputs, compared with the reference.

A case is a frozen set of sizes and switches; ``run`` draws inputs from a seed, calls the function under
test on poisoned memory, and gives one :class:`Comparison` per tensor that comes out or is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssm_forge.kernels import reference
from ssm_forge.kernels.backends import Backend, poisoned
from ssm_forge.kernels.draws import DTYPES, Case, Draw, environment
from ssm_forge.kernels.sequences import zipped
from ssm_forge.kernels.tolerance import COMPLEX, REAL, Comparison, compare, identical

_UPSTREAM = "upstream's kernel ran instead of the one along the sequence"


def _leaf(tensor: Tensor | None, *, wanted: bool) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_(wanted)


def _exact(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else reference.wide(tensor.detach()).requires_grad_(True)


@dataclass(frozen=True)
class ConvCase(Case):
    """causal_conv1d_fn, forward and (unless ``backward`` is off) backward."""

    batch: int = 2
    dim: int = 64
    length: int = 129
    width: int = 4
    weight_dtype: str = "fp32"
    bias: bool = True
    silu: bool = True
    channel_last: bool = False
    sequences: int = 0
    padding: bool = False
    initial: bool = False
    final: bool = False
    sliced: bool = False
    deterministic: bool = False
    backward: bool = True

    def invalid(self) -> str:
        if self.width not in (2, 3, 4):
            return "widths are 2, 3 and 4"
        if self.channel_last and self.dim % 8:
            return "channel-last needs a multiple of 8 channels"
        if not self.channel_last and (self.sequences or self.initial or self.final):
            return "seq_idx and states need channel-last"
        if self.final and self.sequences:
            return "final states exist without seq_idx only"
        if self.padding and not self.sequences:
            return "padding is told by seq_idx"
        return ""

    def _layout(self, draw: Draw, length: int, *, extra: int = 0) -> Tensor:
        """(B, D, length) in this case's memory order, part of a wider tensor if sliced."""
        wider = self.dim + extra
        if self.channel_last:
            drawn = draw.normal(self.batch, length, wider, dtype=self.torch_dtype)
            return drawn[:, :, extra : extra + self.dim].transpose(1, 2)
        return draw.normal(self.batch, wider, length, dtype=self.torch_dtype)[:, extra:]

    def _owners(self, draw: Draw, device: torch.device) -> Tensor | None:
        """seq_idx (B, L): sequences of random lengths one after the other, some tokens padding."""
        if not self.sequences:
            return None
        rows = []
        for _ in range(self.batch):
            cuts = set(draw.integers(0, self.length, self.sequences - 1)) if self.sequences > 1 else set()
            row, current = [], 0
            for t in range(self.length):
                current += t in cuts
                row.append(current)
            if self.padding:
                for t in draw.integers(0, self.length, max(1, self.length // 8)):
                    row[t] = -1
            rows.append(row)
        return torch.tensor(rows, dtype=torch.int32, device=device)

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        draw = Draw(seed, self, device)
        x = self._layout(draw, self.length, extra=64 if self.sliced else 0)
        weight = draw.normal(self.dim, self.width, dtype=DTYPES[self.weight_dtype])
        bias = draw.normal(self.dim, dtype=DTYPES[self.weight_dtype]) if self.bias else None
        initial = self._layout(draw, self.width - 1) if self.initial else None
        seq_idx = self._owners(draw, device)
        inputs = {"x": x, "weight": weight, "bias": bias, "initial_states": initial}
        leaves = {name: _leaf(t, wanted=self.backward) for name, t in inputs.items()}
        before = {name: None if t is None else t.clone() for name, t in inputs.items()}
        grads = [self._layout(draw, self.length)]
        if self.padding and seq_idx is not None:
            # Upstream's backward takes what arrives at padding for real: callers send zeros there.
            grads[0] = grads[0] * (seq_idx >= 0)[:, None]
        if self.final:
            grads.append(self._layout(draw, self.width - 1))

        activation = "silu" if self.silu else None
        mode = environment("CAUSAL_CONV1D_DETERMINISTIC", "1" if self.deterministic else "0")
        with mode, poisoned(device):
            got = backend.conv(**leaves, seq_idx=seq_idx, return_final_states=self.final, activation=activation)
            outs: tuple[Tensor, ...] = got if self.final else (got,)
            if self.backward:
                torch.autograd.backward(outs, [g.to(o.dtype) for o, g in zipped(outs, grads)])

        exact = {name: _exact(t) for name, t in inputs.items()}
        wanted = reference.causal_conv1d(**exact, seq_idx=seq_idx, activation=activation)
        comparisons = [compare("out", outs[0], wanted[0], terms=self.width + 1)]
        if self.final:
            comparisons.append(identical("final_states", outs[1].detach(), wanted[1].detach().to(x.dtype)))
        comparisons += [identical(f"input {n}", t, before[n]) for n, t in inputs.items() if t is not None]
        if self.backward:
            torch.autograd.backward(wanted[: len(grads)], [reference.wide(g) for g in grads])
            sums = {"x": self.width + 1, "initial_states": self.width + 1}
            comparisons += _gradients(leaves, exact, sums, default=self.batch * self.length)
        return comparisons


def _gradients(
    leaves: dict[str, Tensor | None],
    exact: dict[str, Tensor | None],
    terms: dict[str, int],
    *,
    default: int,
    factor: float = REAL,
    roundings: dict[str, int] | None = None,
    cancelled: dict[str, float] | None = None,
) -> list[Comparison]:
    """Every leaf's gradient against the exact one."""
    comparisons = []
    for name, leaf in leaves.items():
        wanted = exact[name]
        if leaf is None or wanted is None:
            continue
        # No gradient at all is how autograd writes one that is zero everywhere.
        got_grad, exact_grad = (t.grad if t.grad is not None else torch.zeros_like(t) for t in (leaf, wanted))
        comparisons.append(
            compare(
                f"d{name}",
                got_grad,
                exact_grad,
                terms=terms.get(name, default),
                factor=factor,
                roundings=(roundings or {}).get(name, 1),
                cancelled=(cancelled or {}).get(name, 0.0),
            )
        )
    return comparisons


@dataclass(frozen=True)
class UpdateCase(Case):
    """causal_conv1d_update: tokens of generation against a rolling or ring-shaped state."""

    batch: int = 4
    dim: int = 64
    length: int = 1
    width: int = 4
    state_len: int = 4
    weight_dtype: str = "fp32"
    bias: bool = True
    silu: bool = True
    ring: bool = False
    gather: bool = False
    padding: bool = False

    def invalid(self) -> str:
        if self.width not in (2, 3, 4):
            return "widths are 2, 3 and 4"
        if self.state_len < self.width - 1:
            return "the state holds at least width - 1 tokens"
        return "padding is told by the gathered indices" if self.padding and not self.gather else ""

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        draw = Draw(seed, self, device)
        x = draw.normal(self.batch, self.dim, self.length, dtype=self.torch_dtype)
        rows = self.batch * 3 if self.gather else self.batch
        state = draw.normal(rows, self.dim, self.state_len, dtype=self.torch_dtype)
        weight = draw.normal(self.dim, self.width, dtype=DTYPES[self.weight_dtype])
        bias = draw.normal(self.dim, dtype=DTYPES[self.weight_dtype]) if self.bias else None
        indices = draw.shuffled(rows)[: self.batch] if self.gather else None
        if self.padding and indices is not None:
            indices[-1] = -1
        seqlens = draw.integers(0, 1000, self.batch) if self.ring else None
        activation = "silu" if self.silu else None
        wanted, new_state = reference.causal_conv1d_update(
            x, state, weight, bias, activation=activation, cache_seqlens=seqlens, state_indices=indices
        )

        def ints(values: list[int] | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

        with poisoned(device):
            out = backend.conv_update(
                x,
                state,
                weight,
                bias,
                activation=activation,
                cache_seqlens=ints(seqlens),
                conv_state_indices=ints(indices),
            )
        return [
            compare("out", out, wanted, terms=self.width + 1),
            identical("conv_state", state, new_state.to(state.dtype)),
        ]


@dataclass(frozen=True)
class StatesCase(Case):
    """causal_conv1d_varlen_states: the tail of each packed sequence."""

    packed: int = 3
    dim: int = 64
    longest: int = 40
    state_len: int = 4

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        draw = Draw(seed, self, device)
        bounds = [0]
        for length in draw.integers(1, self.longest + 1, self.packed):
            bounds.append(bounds[-1] + length)
        x = draw.normal(bounds[-1], self.dim, dtype=self.torch_dtype)
        wanted = reference.varlen_states(x, bounds, self.state_len)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        with poisoned(device):
            got = backend.conv_states(x, cu_seqlens, self.state_len)
        return [identical("states", got, wanted.to(x.dtype))]


@dataclass(frozen=True)
class ScanCase(Case):
    """selective_scan_fn, forward and (unless ``backward`` is off) backward.

    ``groups`` is 0 for B and C of shape (B, N, L), else G of (B, G, N, L). ``along`` takes the kernel that runs
    along the sequence, at whatever size; ``deterministic`` asks for the same gradients to the bit each time.
    """

    batch: int = 2
    dim: int = 8
    length: int = 129
    states: int = 8
    groups: int = 0
    complex_a: bool = False
    constant_b: bool = False
    constant_c: bool = False
    d: bool = True
    z: bool = True
    delta_bias: bool = True
    softplus: bool = True
    last_state: bool = True
    backward: bool = True
    along: bool = False
    deterministic: bool = False

    def invalid(self) -> str:
        if self.along and (self.complex_a or self.constant_b or self.constant_c or self.states > 16):
            return "along the sequence: a real A, B and C that vary, up to 16 states"
        if self.groups and self.dim % self.groups:
            return "groups divide the channels"
        if self.groups > 1 and (self.constant_b or self.constant_c):
            return "groups need both B and C to vary"
        return ""

    def _matrix(self, draw: Draw, *, constant: bool) -> Tensor:
        if constant:
            real = draw.normal(self.dim, self.states)
            return torch.complex(real, draw.normal(self.dim, self.states)) if self.complex_a else real
        length = self.length * (2 if self.complex_a else 1)
        groups = (self.groups,) if self.groups else ()
        return draw.normal(self.batch, *groups, self.states, length, dtype=self.torch_dtype)

    def _inputs(self, draw: Draw) -> dict[str, Tensor | None]:
        """Steps and decays as Mamba has them: memories from one step to about a thousand."""
        shape = (self.batch, self.dim, self.length)
        a = -torch.exp(draw.uniform(-2.3, 1.4, self.dim, self.states))
        if self.complex_a:
            a = torch.complex(a, draw.uniform(-1.0, 1.0, self.dim, self.states))
        low, high = (-4.0, 0.0) if self.softplus else (0.01, 0.5)
        return {
            "u": draw.normal(*shape, dtype=self.torch_dtype),
            "delta": draw.uniform(low, high, *shape, dtype=self.torch_dtype),
            "a": a,
            "b": self._matrix(draw, constant=self.constant_b),
            "c": self._matrix(draw, constant=self.constant_c),
            "d": draw.normal(self.dim) if self.d else None,
            "z": draw.normal(*shape, dtype=self.torch_dtype) if self.z else None,
            "delta_bias": draw.uniform(0.0, 0.5, self.dim) if self.delta_bias else None,
        }

    def _scan(self, backend: Backend, leaves: dict[str, Tensor | None], grad: Tensor, device: torch.device) -> Any:
        """The call, and its backward."""
        kernels = environment("SSM_FORGE_KERNELS", "along" if self.along else "")
        mode = environment("MAMBA_DETERMINISTIC", "1" if self.deterministic else "0")
        names = {n: leaves[n.lower()] for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")}
        with kernels, mode, poisoned(device):
            got = backend.scan(**names, delta_softplus=self.softplus, return_last_state=self.last_state)
            if self.backward:
                (got[0] if self.last_state else got).backward(grad)
        return got

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        # Long: one call and its reference, tensor after tensor.
        draw = Draw(seed, self, device)
        inputs = self._inputs(draw)
        grad = draw.normal(self.batch, self.dim, self.length, dtype=self.torch_dtype)
        leaves = {name: _leaf(t, wanted=self.backward) for name, t in inputs.items()}
        before = {name: None if t is None else t.clone() for name, t in inputs.items()}
        calls = backend.calls()
        got = self._scan(backend, leaves, grad, device)
        out = got[0] if self.last_state else got
        calls_made = {name: count - calls[name] for name, count in backend.calls().items()}

        exact = {name: _exact(t) for name, t in inputs.items()}
        arguments: list[Any] = [exact[n] for n in ("u", "delta", "a", "b", "c", "d", "z")]
        nudge = torch.zeros_like(arguments[2]).requires_grad_(self.backward)
        push = nudge.detach().new_zeros(self.length, self.batch, *nudge.shape).requires_grad_(self.backward)
        options: dict[str, Any] = {
            "delta_bias": exact["delta_bias"],
            "delta_softplus": self.softplus,
            "nudge": nudge,
            "push": push,
        }
        wanted, state = reference.selective_scan(*arguments, **options)
        factor = COMPLEX if self.complex_a else REAL
        terms = self.length + self.states
        comparisons = [compare("out", out, wanted, terms=terms, factor=factor)]
        if self.last_state:
            comparisons.append(compare("last_state", got[1], state, terms=terms, factor=factor))
        comparisons += [identical(f"input {n}", t, before[n]) for n, t in inputs.items() if t is not None]
        if self.along and calls_made:
            upstream_calls = calls_made["forward upstream"] + calls_made["backward upstream"]
            comparisons.append(
                Comparison(
                    "kernel",
                    float(upstream_calls),
                    float("inf") if upstream_calls else 0.0,
                    _UPSTREAM if upstream_calls else "",
                )
            )
        if self.backward and self.deterministic:
            again = {name: _leaf(t, wanted=True) for name, t in before.items()}
            self._scan(backend, again, grad, device)
            for name, leaf in leaves.items():
                repeated = again[name]
                if leaf is not None and leaf.grad is not None and repeated is not None and repeated.grad is not None:
                    comparisons.append(identical(f"d{name} again", repeated.grad, leaf.grad))
        if self.backward:
            wanted.backward(reference.wide(grad))
            assert nudge.grad is not None and push.grad is not None
            walks = reference.scan_walks(exact, reference.wide(grad), push.grad, softplus=self.softplus)
            # B and C of a group gather every channel; a constant A, B, C, D or bias every batch and time.
            shared = terms * self.dim
            sums = {"u": terms, "delta": terms, "z": terms}
            sums.update({n: shared for n in ("b", "c") if not getattr(self, f"constant_{n}")})
            comparisons += _gradients(
                leaves,
                exact,
                sums,
                default=self.batch * self.length,
                factor=factor,
                roundings={"z": 2},
                cancelled={"a": float(nudge.grad.abs().max()), **walks},
            )
        return comparisons
