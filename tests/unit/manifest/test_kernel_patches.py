"""What the patches of the kernels promise, read in their text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TRITON = sorted((ROOT / "patches" / "mamba-ssm").glob("*/*-64-bit-states-and-triton.patch"))


def _added(patch: Path) -> str:
    """The lines that a patch adds."""
    return "".join(line[1:] for line in patch.read_text(encoding="utf-8").splitlines(True) if line.startswith("+"))


def test_both_releases_have_the_patch() -> None:
    assert [patch.parent.name for patch in TRITON] == ["2.3.1", "2.3.2.post1"]


@pytest.mark.parametrize("patch", TRITON, ids=lambda patch: patch.parent.name)
def test_a_triton_kernel_that_is_told_of_wide_offsets_uses_them(patch: Path) -> None:
    added = _added(patch)
    told = added.count('@triton.heuristics({"WIDE": needs_64_bits})')
    assert told == added.count("    WIDE: tl.constexpr,")
    heads = added.count("        wide = tl.program_id(0).to(tl.int64) * 0 + 1\n")
    # One kernel has its strides in tuples, and widens its indices.
    assert told - heads == added.count("The strides come in tuples")
    assert told >= 28


@pytest.mark.parametrize("patch", TRITON, ids=lambda patch: patch.parent.name)
def test_every_stride_is_widened_as_itself(patch: Path) -> None:
    lines = re.findall(r"^        (stride_.*?) = (stride_.*)$", _added(patch), re.MULTILINE)
    assert lines
    for names, values in lines:
        assert values == ", ".join(f"{name} * wide" for name in names.split(", "))
