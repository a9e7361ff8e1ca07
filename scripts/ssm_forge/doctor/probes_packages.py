"""Looks at what is installed: one torch, with CUDA, and packages that fit each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ssm_forge.doctor import binary, requirements, signatures
from ssm_forge.doctor.binary import DamagedError, numbers
from ssm_forge.doctor.environment import Environment, text_of
from ssm_forge.doctor.findings import Finding, Target, finding

# Whose requirements matter here: other conflicts of an environment break something else.
_CONCERNED = ("mamba-ssm", "causal-conv1d", "torch", "triton", "transformers")
_ASKED_FOR = frozenset({*_CONCERNED, "einops", "huggingface-hub", "tokenizers"})
_MOST_SHOWN = 3


def probe(env: Environment, target: Target) -> Iterator[Finding]:
    """Findings about torch and the Python packages around the kernels."""
    if env.torch is None:
        evidence = f"{env.python} imports no torch"
        if env.origins.get("torch"):
            evidence = f"{env.origins['torch'].parent} is no whole torch: version.py is missing"
        yield finding("torch-missing", evidence, target=target, module="torch")
    else:
        yield from _torch(env, target)
    yield from _conflicts(env, target)
    yield from _signatures(env, target)


def _torch(env: Environment, target: Target) -> Iterator[Finding]:
    torch = env.torch
    assert torch is not None
    copies = [d for d in env.distributions if d.name == "torch"]
    copies_found = [f"torch {d.version} in {d.folder}" for d in copies]
    for name in ("pytorch", "libtorch"):
        record = env.conda.get(name)
        if record is None:
            continue
        # conda's own dist-info says conda, if anything; pip's over it says pip, or has another version.
        by_pip = any(d.installer == "pip" or _plain(d.version) != _plain(record.version) for d in copies)
        if by_pip or _plain(record.version) != _plain(torch.version):
            copies_found.append(f"{name} {record.version} ({record.build}) of conda in {env.prefix}")
            break
    if len(copies_found) > 1:
        yield finding(
            "torch-twice",
            *copies_found,
            f"imported is {torch.version} from {torch.folder}",
            target=target,
            module="torch",
        )
    for path in torch.libraries:
        try:
            binary.read(path)
        except DamagedError as error:
            yield finding("damaged-library", str(error), target=target, module="torch")
    if not torch.cuda:
        hip = re.search(r"^hip *(?::[^=]*)?= *['\"]", text_of(torch.folder / "version.py"), re.MULTILINE)
        if hip is None:
            yield finding("torch-cpu", f"torch {torch.version} in {torch.folder}", target=target, module="torch")
    numpy = env.distribution("numpy")
    # conda-forge built old releases against numpy 2 anew.
    if numpy is not None and not env.conda and numbers(numpy.version) >= (2,) and numbers(torch.version) < (2, 3):
        evidence = f"torch {torch.version} was built against numpy 1; installed is numpy {numpy.version}"
        yield finding("numpy-2", evidence, target=target, severity="warning", module="numpy")


def _plain(version: str) -> str:
    """Without who built it: ``2.5.1`` of ``2.5.1+cu124`` and of conda-forge's ``2.5.1.post3``."""
    return version.split("+")[0].split(".post")[0]


def _conflicts(env: Environment, target: Target) -> Iterator[Finding]:
    conflicts = []
    for name in _CONCERNED:
        distribution = env.distribution(name)
        for line in distribution.requires if distribution else ():
            asked = requirements.parse(line, env.version)
            if asked is None or distribution is None or asked.name not in _ASKED_FOR:
                continue
            other = env.distribution(asked.name)
            if other is None:
                # conda's packages bring the same under other names, or as no Python package at all.
                if not env.conda and env.origins.get(asked.name.replace("-", "_")) is None:
                    conflicts.append(f"{name} {distribution.version} requires {asked.name}, which is not installed")
            elif requirements.satisfies(other.version, asked.specifiers) is False:
                conflicts.append(
                    f"{name} {distribution.version} requires {asked.name}{asked.specifiers}, "
                    f"installed is {other.version}"
                )
    if conflicts:
        more = [f"and {len(conflicts) - _MOST_SHOWN} more"] if len(conflicts) > _MOST_SHOWN else []
        yield finding("requirement-conflict", *conflicts[:_MOST_SHOWN], *more, target=target, module="pip")


def _signatures(env: Environment, target: Target) -> Iterator[Finding]:
    mamba, conv, transformers = (_package(env, name) for name in ("mamba_ssm", "causal_conv1d", "transformers"))
    if mamba is None:
        return
    if conv is not None:
        sentences = list(dict.fromkeys(signatures.disagreements(mamba, conv)))[:_MOST_SHOWN]
        if sentences:
            yield finding("kernel-signature", *sentences, target=target, module="causal_conv1d")
    if transformers is not None:
        for path, line, module, name in signatures.unguarded_imports(mamba, "transformers"):
            if name.endswith("DecoderOnlyOutput"):
                text = text_of(transformers.parent.joinpath(*module.split("."), "__init__.py"))
                if text and name not in text:
                    evidence = f"{path}:{line} imports {name}, which the installed {module} lacks"
                    yield finding("transformers-too-new", evidence, target=target, module="transformers")
                    return


def _package(env: Environment, name: str) -> Path | None:
    origin = env.origins.get(name)
    return origin.parent if origin is not None and origin.name == "__init__.py" else None
