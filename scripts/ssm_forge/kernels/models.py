"""Models of transformers, tiny and with random weights: with the kernels against transformers' own PyTorch code.

Two processes build the same models from one seed; in one of them neither of the two packages can be imported, so that
transformers takes its own code there. Logits and the gradient of every parameter are compared, in float32.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_forge.kernels import blocks, machine
from ssm_forge.kernels.checks import FAIL, NOT_RUN, PASS, Check
from ssm_forge.kernels.tolerance import compare_to_scale

PACKAGES = ("mamba_ssm", "causal_conv1d")
BATCH, LENGTH, VOCABULARY = 2, 300, 128
# Sums of float32 in another order, through two or three layers and the output projection.
REORDERED = 1e-5
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_n_groups": 1, "mamba_chunk_size": 64}


@dataclass(frozen=True)
class Model:
    """One tiny model.

    Attributes:
        options: what its configuration says besides the sizes that all share.
        triton: whether it takes Mamba-2's Triton kernels, which multiply matrices as TF32.
        training: whether the model is in training mode, in which some call one function for all of a mixer.
    """

    options: dict[str, Any] = field(default_factory=dict)
    triton: bool = False
    training: bool = True

    @property
    def allowed(self) -> tuple[float, float]:
        """The largest difference of logits and of gradients, in units of the largest value."""
        if self.triton:
            return blocks.FORWARD * blocks.TF32, blocks.GRADIENT * blocks.TF32
        return REORDERED, REORDERED


# No experts: which of them takes a token changes with the last digit.
MODELS = {
    "mamba": Model({"state_size": 16}),
    "falcon_mamba": Model({"state_size": 16}, training=False),
    "mamba2": Model({"num_heads": 4, "head_dim": 64, "state_size": 32, "n_groups": 1, "chunk_size": 64}, triton=True),
    "jamba": Model(
        {**_ATTENTION, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}
    ),
    "bamba": Model({**_ATTENTION, **_HEADS, "attn_layer_indices": [1]}, triton=True),
    # transformers ties the weights of attention among the hybrid layers, and wants two of them at least.
    "zamba": Model({**_ATTENTION, "num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "zamba2": Model(
        {
            **_ATTENTION,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "mamba_d_state": 32,
            "n_mamba_heads": 4,
            "chunk_size": 64,
        },
        triton=True,
    ),
    "falcon_h1": Model({**_ATTENTION, **_HEADS, "mamba_d_ssm": 256}, triton=True),
    "nemotron_h": Model(
        {
            **_ATTENTION,
            "head_dim": 32,
            "layers_block_type": ["mamba", "attention"],
            "ssm_state_size": 32,
            "mamba_num_heads": 4,
            "n_groups": 1,
            "chunk_size": 64,
        },
        triton=True,
    ),
    "granitemoehybrid": Model(
        {
            **_ATTENTION,
            **_HEADS,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
        },
        triton=True,
    ),
}
FALCON_IN_TRAINING = Check(
    "transformers falcon_mamba in training",
    NOT_RUN,
    "not comparable: it calls mamba_inner_fn there, which normalizes the step size after its projection to all "
    "channels, while transformers' own code, and its inference, do so before; that function's own check is "
    "'mamba_inner_fn with norms'",
)


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Packages that can't be imported for as long as the context lasts, nor be found."""
    before = {name: sys.modules.pop(name, None) for name in names}
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _count_convolutions() -> list[int]:
    """A list that grows with every call of the compiled convolution, which every one of these models makes."""
    module: Any = import_module("causal_conv1d_cuda")
    forward, calls = module.causal_conv1d_fwd, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(*args, **kwargs)

    module.causal_conv1d_fwd = counted
    return calls


def _build(name: str, model: Model, device: torch.device) -> Any:
    """The model by transformers' name for its kind, with the same random weights everywhere."""
    transformers = import_module("transformers")
    torch.manual_seed(20260101)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": True}
    config = transformers.AutoConfig.for_model(name, **{**sizes, **model.options})
    built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return built.float().train(model.training).to(device)


def compute(name: str, model: Model, device: torch.device) -> dict[str, Tensor]:
    """Logits (B, L, vocabulary) and the gradients of all parameters by name, on the CPU.

    Raises:
        Exception: whatever the model raises.
    """
    built = _build(name, model, device)
    generator = torch.Generator().manual_seed(20260102)
    tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    grad = torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator)
    logits = built(input_ids=tokens.to(device), use_cache=False).logits
    logits.backward(grad.to(device))
    found = {"logits": logits.detach()}
    found.update({f"d{n}": p.grad for n, p in built.named_parameters() if p.grad is not None})
    return {key: tensor.cpu() for key, tensor in found.items()}


def worker(file: Path, *, kernels: bool) -> None:
    """Compute all models and save what came out, or what was raised, in ``file``."""
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {}
    with _hidden(() if kernels else PACKAGES):
        calls = [0]
        if kernels:
            broken = machine.missing_packages()
            if broken:
                raise RuntimeError(f"the packages don't load: {broken}")
            calls = _count_convolutions()
        for name, model in MODELS.items():
            try:
                _build(name, model, torch.device("cpu"))
            except Exception as error:
                results[name] = f"not built: {_first_line(error)}"
                continue
            before = calls[0]
            try:
                results[name] = compute(name, model, device)
            except Exception as error:
                results[name] = f"raised {_first_line(error)}"
                continue
            if kernels and calls[0] == before:
                results[name] = "raised nothing, and called no kernel"
        torch.save(results, file)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def judge(name: str, model: Model, got: Any, own: Any) -> Check:
    """The check that two results of a worker mean."""
    title = f"transformers {name}"
    for whose, result in (("with the kernels", got), ("its own code", own)):
        if isinstance(result, str):
            absent = result.startswith("not built")
            return Check(title, NOT_RUN if absent else FAIL, f"{whose}: {result}")
    if got.keys() != own.keys():
        return Check(title, FAIL, f"gradients of other parameters: {sorted(got.keys() ^ own.keys())[:4]}")
    limits = dict.fromkeys(got, model.allowed[1]) | {"logits": model.allowed[0]}
    comparisons = [compare_to_scale(key, got[key], own[key].double(), limits[key]) for key in got]
    worst = max(comparisons, key=lambda c: math.inf if math.isnan(c.ratio) else c.ratio)
    bad = [c for c in comparisons if not c.ok]
    if bad:
        detail = "; ".join(f"{c.name}: {c.problem}" for c in bad[:3])
        return Check(title, FAIL, f"{len(bad)} of {len(got)} tensors differ: {detail}", len(got), worst.ratio)
    detail = f"logits and {len(got) - 1} gradients; worst error {worst.ratio:.2f} of what is allowed ({worst.name})"
    return Check(title, PASS, detail, len(got), worst.ratio)


def run_all(*, limit: float = 300.0) -> list[Check]:
    """A check for each model; both processes together get ``limit`` seconds."""
    started, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="ssm-forge-") as folder:
        processes = []
        for option in ("--kernels", "--own"):
            command = [sys.executable, "-m", "ssm_forge.kernels", "models-worker", str(Path(folder) / option), option]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            processes.append(
                subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            )
        for process, option in zip(processes, ("--kernels", "--own")):  # noqa: B905 - what Python 3.9 lacks
            try:
                _, said = process.communicate(timeout=max(1.0, limit - (time.monotonic() - started)))
            except subprocess.TimeoutExpired:
                for other in processes:
                    other.kill()
                    other.communicate()
                detail = f"not done after {limit:.0f} s"
                return [Check(f"transformers {name}", NOT_RUN, detail) for name in MODELS]
            if process.returncode:
                lines = said.strip().splitlines()
                detail = f"status {process.returncode}: {lines[-1] if lines else 'nothing said'}"
                results.append(dict.fromkeys(MODELS, f"raised nothing it could save; {detail}"))
            else:
                results.append(torch.load(Path(folder) / option, weights_only=True))
    checks = [judge(name, model, results[0][name], results[1][name]) for name, model in MODELS.items()]
    return [*checks, FALCON_IN_TRAINING]
