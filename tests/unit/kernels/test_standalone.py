"""The subpackage must start on a machine that has Python and nothing of the tools environment."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[3] / "scripts" / "ssm_forge" / "kernels"
ALLOWED = {
    "torch",
    "triton",
    "matplotlib",
    "pytest",
    "ssm_forge",
    "causal_conv1d",
    "causal_conv1d_cuda",
    "mamba_ssm",
    "selective_scan_cuda",
}


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_imports_only_torch_the_standard_library_and_the_packages_under_test(path: Path) -> None:
    for name in _imported(path):
        top = name.partition(".")[0]
        assert top in ALLOWED or top in sys.stdlib_module_names, f"{path.name} imports {name}"
        if top == "ssm_forge":
            assert name.startswith("ssm_forge.kernels"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_parses_as_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
