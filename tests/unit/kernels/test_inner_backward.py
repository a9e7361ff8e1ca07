"""The backward of mamba_inner_fn, which is Python around the kernels, with stand-ins for those, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here; ./run test runs this in an installed env")

from ssm_forge.kernels import backends, checks  # noqa: E402
from ssm_forge.kernels.inner import InnerCase  # noqa: E402


def gradients(call: Callable[..., Any], inputs: list[Any], grad: Any) -> list[Any]:
    """The gradients of a call's inputs where ``grad`` arrives at what it gives."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return list(torch.autograd.grad(call(*leaves), leaves, grad))


def scan(u: Any, delta: Any, a: Any, b: Any, c: Any, d: Any, z: Any, bias: Any) -> Any:
    return backends.parallel_scan(u, delta, a, b, c, d, z, bias, delta_softplus=True)


def scan_forward(u: Any, delta: Any, a: Any, b: Any, c: Any, d: Any, z: Any, bias: Any, softplus: bool) -> Any:
    inputs = (u, delta, a, b, c, d)
    return scan(*inputs, None, bias), torch.zeros(1), scan(*inputs, z, bias)


def scan_backward(*arguments: Any) -> Any:
    inputs, (grad, _, _, dz, _, _) = arguments[:8], arguments[8:]
    du, ddelta, da, db, dc, dd, d_z, dbias = gradients(scan, list(inputs), grad)
    dz.copy_(d_z)
    return du, ddelta, da, db, dc, dd, dbias, dz, scan(*inputs)


def conv(x: Any, weight: Any, bias: Any) -> Any:
    return backends.conv(x, weight, bias, activation="silu")


def conv_backward(x: Any, weight: Any, bias: Any, grad: Any, *others: Any) -> Any:
    dx = others[3]
    found = gradients(conv, [x, weight, bias], grad)
    dx.copy_(found[0])
    return dx, *found[1:]


def normed(x: Any, weight: Any, bias: Any = None, eps: float = 1e-6) -> Any:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def test_gradients_go_through_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba_ssm.ops import selective_scan_interface as interface

    monkeypatch.setattr(interface, "selective_scan_cuda", SimpleNamespace(fwd=scan_forward, bwd=scan_backward))
    monkeypatch.setattr(interface, "causal_conv1d_fwd_function", lambda x, w, b, *others: conv(x, w, b))
    monkeypatch.setattr(interface, "causal_conv1d_bwd_function", conv_backward)
    monkeypatch.setattr(interface, "rms_norm_forward", normed)
    backend = replace(backends.emulated(), inner=interface.mamba_inner_fn)
    for case in (InnerCase(), InnerCase(batch=1, dim=8, length=17, states=3)):
        assert [c for c in checks.attempt(case, backend, torch.device("cpu"), 5) if not c.ok] == []
