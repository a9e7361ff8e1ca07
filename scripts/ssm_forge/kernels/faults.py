"""Kernels that are wrong on purpose, each in one way: the checks must catch every one.

They are made from the emulated functions, so that they run on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssm_forge.kernels import backends, inner, siso
from ssm_forge.kernels.backends import Backend, Function
from ssm_forge.kernels.blocks import BlockCase
from ssm_forge.kernels.cases import ConvCase, ScanCase, StatesCase, UpdateCase
from ssm_forge.kernels.draws import Case
from ssm_forge.kernels.emulated_block import EmulatedMamba
from ssm_forge.kernels.inner import InnerCase
from ssm_forge.kernels.siso import SisoCase


def honest() -> Backend:
    """Correct functions, and a correct block."""
    return replace(backends.emulated(), blocks={"mamba": EmulatedMamba}, inner=inner.emulated, siso=siso.emulated)


@dataclass(frozen=True)
class Fault:
    """One wrong function.

    Attributes:
        name: what is wrong with it.
        field: the member of :class:`Backend` it takes the place of.
        function: the wrong function.
        case: a case that must fail.
        shows_in: the tensor that the failure must name.
        smallest: what the shrunk case must still say, such as ``length=129``.
    """

    name: str
    field: str
    function: Any
    case: Case
    shows_in: str
    smallest: str = ""

    def backend(self) -> Backend:
        """Correct functions, but for the wrong one."""
        return replace(honest(), name=self.name, **{self.field: self.function})


def _on_output(function: Function, change: Callable[[Tensor], Tensor]) -> Function:
    """``function`` with its first result changed."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        got = function(*args, **kwargs)
        return (change(got[0]), *got[1:]) if isinstance(got, tuple) else change(got)

    return wrong


def _on_gradient(function: Function, argument: str, change: Callable[[Tensor], Tensor]) -> Function:
    """``function`` with the right values and one wrong gradient."""

    def wrong(**kwargs: Any) -> Any:
        leaf = kwargs[argument]
        if leaf is not None and leaf.requires_grad:
            copy = leaf.view_as(leaf)
            copy.register_hook(change)
            kwargs[argument] = copy
        return function(**kwargs)

    return wrong


def _without(function: Function, argument: str) -> Function:
    """``function`` that forgets an argument, but passes it a gradient of zero."""

    def wrong(**kwargs: Any) -> Any:
        return function(**{**kwargs, argument: None})

    return wrong


def _put(out: Tensor, value: float) -> Tensor:
    changed = out.clone()
    changed.view(-1)[-1] = value
    return changed


def _half_written(out: Tensor) -> Tensor:
    """What a kernel leaves that stops a tile too early."""
    # torch before 2.2 fills no new memory of a CPU; see backends.poisoned.
    fresh = torch.empty_like(out) if hasattr(torch.utils, "deterministic") else torch.full_like(out, torch.nan)
    written = max(1, out.shape[-1] // 2)
    fresh[..., :written] = out[..., :written]
    return fresh


def _wrong_before_a_short_rest(gradient: Tensor) -> Tensor:
    """Wrong where a chunk of 64 tokens ends and one to three tokens follow."""
    rest = gradient.shape[2] % 64
    if gradient.shape[2] > 64 and 0 < rest < 4:
        gradient = gradient.clone()
        gradient[:, :, -rest - 1] *= 0.9
    return gradient


def _shifted(out: Tensor) -> Tensor:
    return torch.roll(out, 1, dims=-1)


def _old_final_states(*args: Any, **kwargs: Any) -> Any:
    out, states = backends.conv(*args, **kwargs)
    return out, torch.roll(states, 1, dims=-1)


def _overwrites_input(**kwargs: Any) -> Any:
    got = backends.conv(**kwargs)
    with torch.no_grad():
        kwargs["x"].data[0, 0, 0] += 1
    return got


def _forgets_state(x: Tensor, conv_state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return backends.conv_update(x, conv_state.clone(), *args, **kwargs)


def _writes_padding(x: Tensor, conv_state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out = backends.conv_update(x, conv_state, *args, **kwargs)
    if kwargs["conv_state_indices"] is not None and bool((kwargs["conv_state_indices"] < 0).any()):
        conv_state[-1, :, -1] = conv_state[-1, :, -1] + 1
    return out


def _ring_off_by_one(x: Tensor, conv_state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs["cache_seqlens"] is not None:
        kwargs["cache_seqlens"] = kwargs["cache_seqlens"] + 1
    return backends.conv_update(x, conv_state, *args, **kwargs)


def _leaks_between_sequences(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    ends = cu_seqlens[1:].tolist()
    padded = torch.cat([x.new_zeros(state_len, x.shape[1]), x])
    return torch.stack([padded[end : end + state_len].T for end in ends])


def _state_without_b(*args: Any, **kwargs: Any) -> Any:
    got = backends.parallel_scan(*args, **kwargs)
    return (got[0], got[1] / kwargs["B"]) if kwargs["B"].dim() == 2 else got


def _previous_state(**kwargs: Any) -> Any:
    got = backends.parallel_scan(**kwargs)
    if not kwargs["return_last_state"] or kwargs["u"].shape[2] < 2:
        return got
    shorter = {n: kwargs[n][..., :-1] for n in ("u", "delta", "B", "C")}
    earlier = backends.parallel_scan(**{**kwargs, **shorter, "z": None})
    return got[0], earlier[1]


def _loses_carry(**kwargs: Any) -> Any:
    """Forgets the state at step 128, as a kernel does that drops the carry between tiles."""
    length = kwargs["u"].shape[2]
    if length <= 128:
        return backends.parallel_scan(**kwargs)
    parts = []
    for cut in (slice(0, 128), slice(128, length)):
        along = {n: kwargs[n][..., cut] for n in ("u", "delta", "B", "C", "z") if kwargs[n] is not None}
        parts.append(backends.parallel_scan(**{**kwargs, **along, "return_last_state": True}))
    out = torch.cat([parts[0][0], parts[1][0]], dim=-1)
    return (out, parts[1][1]) if kwargs["return_last_state"] else out


def _bf16_state(**kwargs: Any) -> Any:
    """Keeps in 16 bits what has to be float32."""
    with torch.no_grad():
        kwargs["A"].data = kwargs["A"].data.bfloat16().float()
    return backends.parallel_scan(**kwargs)


def _raises(**kwargs: Any) -> Any:
    raise RuntimeError("no kernel image is available for execution on the device")


def _past_the_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The right value, with a gradient as if there were no norm."""
    return x + (inner.rms_norm(x, weight, eps) - x).detach()


def _no_trapezoid(**kwargs: Any) -> Any:
    return siso.emulated(**{**kwargs, "Trap": kwargs["Trap"] * 0 + 20})


def _slow_phase(**kwargs: Any) -> Any:
    return siso.emulated(**{**kwargs, "Angles": kwargs["Angles"] * 0.5})


class _ScaledOutput(EmulatedMamba):
    def _forward(self, x: Tensor) -> Tensor:
        return super()._forward(x) * 1.05


def every() -> list[Fault]:
    """All faults: one of each kind of mistake."""
    # Long: a table, one entry a mistake.
    conv, scan = backends.conv, backends.parallel_scan
    last = ConvCase(channel_last=True)
    states = replace(last, initial=True, final=True)
    update = UpdateCase(gather=True)
    constant_b = ScanCase(constant_b=True, constant_c=True)
    one_head = SisoCase(batch=1, length=48, heads=1)
    return [
        Fault("conv: NaN in one place", "conv", _on_output(conv, lambda o: _put(o, torch.nan)), last, "out"),
        Fault("conv: infinity", "conv", _on_output(conv, lambda o: _put(o, torch.inf)), last, "out"),
        Fault("conv: half the output unwritten", "conv", _on_output(conv, _half_written), last, "out"),
        Fault("conv: output one step late", "conv", _on_output(conv, _shifted), last, "out", "length=2"),
        Fault(
            "conv: bfloat16 output off by 2 percent",
            "conv",
            _on_output(conv, lambda o: o * 1.02),
            replace(last, dtype="bf16"),
            "out",
        ),
        Fault("conv: no bias", "conv", _without(conv, "bias"), last, "out", "bias=True"),
        Fault(
            "conv: sequences leak into each other",
            "conv",
            _without(conv, "seq_idx"),
            replace(last, sequences=4),
            "out",
        ),
        Fault("conv: no initial states", "conv", _without(conv, "initial_states"), states, "out", "initial=True"),
        Fault("conv: final states off by one", "conv", _old_final_states, states, "final_states"),
        Fault("conv: writes its input", "conv", _overwrites_input, last, "input x"),
        Fault(
            "conv: weight gradient lacks one term",
            "conv",
            _on_gradient(conv, "weight", lambda g: g - 0.01),
            last,
            "dweight",
        ),
        Fault(
            "conv: input gradient one step late",
            "conv",
            _on_gradient(conv, "x", _shifted),
            last,
            "dx",
            "length=2",
        ),
        Fault(
            "conv: a short rest lacks the tokens before it",
            "conv",
            _on_gradient(conv, "x", _wrong_before_a_short_rest),
            replace(last, length=258),
            "dx",
            "length=129",
        ),
        Fault("conv: raises", "conv", _raises, last, "call"),
        Fault("update: state not written", "conv_update", _forgets_state, update, "conv_state"),
        Fault(
            "update: writes for padding",
            "conv_update",
            _writes_padding,
            replace(update, padding=True),
            "conv_state",
            "padding=True",
        ),
        Fault("update: ring off by one", "conv_update", _ring_off_by_one, replace(update, ring=True), "out"),
        Fault(
            "states: other sequences leak in",
            "conv_states",
            _leaks_between_sequences,
            StatesCase(longest=3),
            "states",
        ),
        Fault(
            "scan: NaN in one place",
            "scan",
            _on_output(scan, lambda o: _put(o, torch.nan)),
            ScanCase(),
            "out",
        ),
        Fault("scan: half the output unwritten", "scan", _on_output(scan, _half_written), ScanCase(), "out"),
        Fault("scan: carry lost between tiles", "scan", _loses_carry, ScanCase(length=200), "out", "length=129"),
        Fault("scan: last state off by one", "scan", _previous_state, ScanCase(), "last_state", "length=2"),
        Fault("scan: no gate", "scan", _without(scan, "z"), ScanCase(), "out", "z=True"),
        Fault("scan: no skip", "scan", _without(scan, "D"), ScanCase(), "out"),
        Fault("scan: A rounded to 16 bits", "scan", _bf16_state, ScanCase(), "out"),
        Fault(
            "scan: gradient of A conjugated",
            "scan",
            _on_gradient(scan, "A", torch.conj),
            ScanCase(complex_a=True),
            "da",
            "complex_a=True",
        ),
        Fault(
            "scan: gradient of A off by a thousandth",
            "scan",
            _on_gradient(scan, "A", lambda g: g + 1e-3),
            ScanCase(dtype="bf16", length=3),
            "da",
        ),
        Fault(
            "scan: second group's gradient at another place",
            "scan",
            _on_gradient(scan, "B", lambda g: g if g.dim() < 4 else g.roll(1, dims=1)),
            ScanCase(groups=2, complex_a=True),
            "db",
            "groups=2",
        ),
        Fault("scan: constant B left out of the last state", "scan", _state_without_b, constant_b, "last_state"),
        Fault(
            "scan: gradient of B of half size",
            "scan",
            _on_gradient(scan, "B", lambda g: g / 2),
            ScanCase(groups=2),
            "db",
        ),
        Fault(
            "block: generation forgets the state",
            "blocks",
            {"mamba": partial(EmulatedMamba, remember=3)},
            BlockCase(length=24, generate=True),
            "generated",
        ),
        Fault(
            "block: bfloat16 output off by 5 percent",
            "blocks",
            {"mamba": _ScaledOutput},
            BlockCase(dtype="bf16"),
            "out",
        ),
        Fault(
            "inner: a gradient goes past a norm",
            "inner",
            partial(inner.emulated, norm_of_b=_past_the_norm),
            InnerCase(),
            "dx_proj_weight",
        ),
        Fault("siso: without the trapezoidal rule", "siso", _no_trapezoid, one_head, "out"),
        Fault("siso: a phase that grows too slowly", "siso", _slow_phase, one_head, "dAngles"),
        Fault(
            "scan: step gradient zero at the end",
            "scan",
            _on_gradient(scan, "delta", lambda g: _put(g, 0.0)),
            ScanCase(),
            "ddelta",
        ),
    ]
