"""Two GPUs: calls on the one that is not current, and training that is spread over both.

What is on the second GPU is computed there while the first is the current one, as in a program that moves a model to
``cuda:1`` and says no more, and is compared with the same on the first.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_forge.kernels import blocks, machine, siso
from ssm_forge.kernels.backends import Backend
from ssm_forge.kernels.draws import Case, Draw
from ssm_forge.kernels.plans import Plan
from ssm_forge.kernels.sequences import zipped
from ssm_forge.kernels.tolerance import UNIT, Comparison, compare_to_scale, identical
from ssm_forge.kernels.usage import REORDERED

PAIR = ("cuda:0", "cuda:1")
# d_model and the options of each block. Sums of the same products in another order; Mamba-2 and Mamba-3 round what
# comes of them to TF32 and bfloat16 before it is multiplied again.
BLOCKS: dict[str, tuple[int, dict[str, Any], float]] = {
    "mamba": (64, {"d_state": 16}, REORDERED),
    "mamba2": (256, {"d_state": 64}, blocks.TF32),
    "mamba3": (256, {"d_state": 64}, UNIT[torch.bfloat16]),
}
SPREAD = ("mamba", "mamba2")
BATCH, LENGTH = 4, 256


def _block(kind: str, backend: Backend) -> Any:
    """A block on the CPU, with the same weights each time."""
    d_model, options, _ = BLOCKS[kind]
    made = importlib.import_module("mamba_ssm").Mamba3 if kind == "mamba3" else backend.blocks[kind]
    torch.manual_seed(1)
    return made(d_model, layer_idx=0, device="cpu", **options)


Leaves = dict[str, Tensor]


def _with_gradients(call: Callable[[Leaves], Tensor], leaves: Leaves, device: str) -> tuple[Tensor, Leaves]:
    """What a call gives on a device, and the gradient of each leaf where ones arrive; both on the CPU."""
    there = {name: tensor.detach().to(device).requires_grad_() for name, tensor in leaves.items()}
    out = call(there)
    gradients = torch.autograd.grad(out, list(there.values()), torch.ones_like(out))
    return out.detach().cpu(), {name: g.cpu() for name, g in zipped(there, gradients)}


@dataclass(frozen=True)
class OtherGpuCase(Case):
    """One kind of call on the second GPU against the first; ``what`` names a method here or a block."""

    what: str = "scan"

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        draw = Draw(seed, self, torch.device("cpu"))
        if self.what in BLOCKS:
            return self._block(backend, draw)
        comparisons: list[Comparison] = getattr(self, self.what)(backend, draw)
        return comparisons

    def scan(self, backend: Backend, draw: Draw) -> list[Comparison]:
        """selective_scan_fn: the same to the bit, and gradients but for the order of sums."""
        shape = (2, 128, 600)
        leaves = {
            "u": draw.normal(*shape, dtype=self.torch_dtype),
            "delta": draw.uniform(-4.0, 0.0, *shape, dtype=self.torch_dtype),
            "A": -torch.exp(draw.uniform(-2.3, 1.4, 128, 16)),
            "B": draw.normal(2, 16, 600, dtype=self.torch_dtype),
            "C": draw.normal(2, 16, 600, dtype=self.torch_dtype),
            "z": draw.normal(*shape, dtype=self.torch_dtype),
        }
        return self._same_bits(lambda there: backend.scan(**there, delta_softplus=True), leaves)

    def conv(self, backend: Backend, draw: Draw) -> list[Comparison]:
        """causal_conv1d_fn: as the scan."""
        leaves = {
            "x": draw.normal(2, 64, 600, dtype=self.torch_dtype),
            "weight": draw.normal(64, 4, dtype=self.torch_dtype),
            "bias": draw.normal(64, dtype=self.torch_dtype),
        }
        return self._same_bits(lambda there: backend.conv(**there, activation="silu"), leaves)

    def _same_bits(self, call: Callable[[Leaves], Tensor], leaves: Leaves) -> list[Comparison]:
        (out, gradients), (other, other_gradients) = (_with_gradients(call, leaves, device) for device in PAIR)
        # Sums that differ in the last digit may round to the next number of 16 bits.
        relative = REORDERED + 2 * (UNIT[self.torch_dtype] if self.dtype != "fp32" else 0.0)
        return [identical("out", other, out)] + [
            compare_to_scale(f"d{name}", other_gradients[name], g.double(), relative) for name, g in gradients.items()
        ]

    def _block(self, backend: Backend, draw: Draw) -> list[Comparison]:
        """A block and its gradients."""
        d_model, _, relative = BLOCKS[self.what]
        x = draw.normal(BATCH, LENGTH, d_model)
        results = []
        with siso.first_configurations():
            for device in PAIR:
                block = _block(self.what, backend).to(device)
                leaf = x.to(device).requires_grad_()
                out = block(leaf)
                out.backward(torch.ones_like(out))
                found = {"out": out.detach(), "dx": leaf.grad}
                results.append(found | {f"d{n}": p.grad for n, p in block.named_parameters()})
        first, second = results
        return [compare_to_scale(n, second[n].cpu(), first[n].cpu().double(), relative) for n in first]

    def generation(self, backend: Backend, draw: Draw) -> list[Comparison]:
        """Tokens of a small language model, whose steps are replayed from a CUDA graph."""
        mamba_ssm = importlib.import_module("mamba_ssm")
        config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig(
            d_model=64, n_layer=2, vocab_size=128
        )
        prompt = torch.tensor([draw.integers(0, 128, 20) for _ in range(2)])
        results = []
        for device in PAIR:
            torch.manual_seed(1)
            model = mamba_ssm.MambaLMHeadModel(config, device="cpu").to(device)
            asked = {"max_length": 60, "cg": True, "output_scores": True, "return_dict_in_generate": True}
            got = model.generate(prompt.to(device), **asked)
            results.append((got.sequences.cpu(), torch.stack(list(got.scores)).cpu()))
        (tokens, scores), (other_tokens, other_scores) = results
        return [
            compare_to_scale("scores", other_scores, scores.double(), REORDERED),
            identical("tokens", other_tokens, tokens),
        ]


def _spread(rank: int, folder: str) -> None:
    """One of two processes: gradients of each block by DDP and by FSDP; the first saves them."""
    machine.missing_packages()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    distributed = importlib.import_module("torch.distributed")
    sharded = importlib.import_module("torch.distributed.fsdp").FullyShardedDataParallel
    replicated = torch.nn.parallel.DistributedDataParallel
    distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    backend, saved = importlib.import_module("ssm_forge.kernels.backends").installed(), {}
    for kind in SPREAD:
        x = torch.load(f"{folder}/{kind}.pt", weights_only=True).chunk(2)[rank].to(device)
        plain = _block(kind, backend).to(device)
        spread = replicated(plain, device_ids=[rank])
        spread(x).sum().backward()
        saved[f"{kind} DDP"] = {n: p.grad.cpu() for n, p in plain.named_parameters()}
        whole = sharded(_block(kind, backend).to(device), device_id=rank, use_orig_params=True)
        whole(x).sum().backward()
        with sharded.summon_full_params(whole, with_grads=True):
            named = whole.module.named_parameters()
            saved[f"{kind} FSDP"] = {n: p.grad.cpu().clone() for n, p in named}
    if rank == 0:
        torch.save(saved, f"{folder}/gradients.pt")
    distributed.destroy_process_group()


@dataclass(frozen=True)
class SpreadCase(Case):
    """DDP and FSDP: half of the batch on each GPU, in two processes, against all of it on one."""

    def run(self, backend: Backend, device: torch.device, seed: int) -> list[Comparison]:
        draw = Draw(seed, self, torch.device("cpu"))
        comparisons = []
        with tempfile.TemporaryDirectory(prefix="ssm-forge-") as folder:
            inputs = {kind: draw.normal(BATCH, LENGTH, BLOCKS[kind][0]) for kind in SPREAD}
            for kind, x in inputs.items():
                torch.save(x, Path(folder) / f"{kind}.pt")
            try:
                importlib.import_module("torch.multiprocessing").spawn(_spread, (folder,), nprocs=2)
            except Exception as error:
                # Its last line says what the process raised; the first only that one did.
                raise RuntimeError(str(error).strip().splitlines()[-1]) from error
            got = torch.load(Path(folder) / "gradients.pt", weights_only=True)
        for kind, x in inputs.items():
            block = _block(kind, backend).to(device)
            # Both take the mean over the processes, of sums over their halves.
            (block(x.to(device)).sum() / 2).backward()
            for way in ("DDP", "FSDP"):
                for name, parameter in block.named_parameters():
                    own, there = parameter.grad.cpu().double(), got[f"{kind} {way}"][name]
                    # Halves of a batch are other sums, of another order, in all that a block does.
                    relative = 10 * REORDERED if kind == "mamba" else 4 * blocks.TF32
                    comparisons.append(compare_to_scale(f"{kind} {way} d{name}", there, own, relative))
        return comparisons


def plans(gpus: int) -> list[Plan]:
    """The plans for a machine with so many GPUs; on one with fewer than two, each says what it lacks."""
    elsewhere = "on the GPU that is not current"
    named: dict[str, tuple[Case, ...]] = {
        f"selective_scan {elsewhere}": tuple(OtherGpuCase(what="scan", dtype=d) for d in ("fp32", "bf16")),
        f"causal_conv1d {elsewhere}": tuple(OtherGpuCase(what="conv", dtype=d) for d in ("fp32", "bf16")),
        **{f"{kind} block {elsewhere}": (OtherGpuCase(what=kind),) for kind in BLOCKS},
        f"generation with a CUDA graph {elsewhere}": (OtherGpuCase(what="generation"),),
        "DDP and FSDP over two GPUs": (SpreadCase(),),
    }
    found = []
    for name, cases in named.items():
        lacks = f"it takes two GPUs, and torch finds {gpus} here" if gpus < len(PAIR) else ""
        if not lacks and name.startswith("mamba3 ") and not siso.available():
            lacks = siso.NO_MAMBA3
        found.append(Plan(name, () if lacks else cases, lacks))
    return found
