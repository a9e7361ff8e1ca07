"""What newer Pythons have and the kernels' checks do without: they run in environments with Python 3.9."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ssm_forge import kernels
from ssm_forge.kernels.sequences import pairwise, zipped

MODULES = sorted(Path(kernels.__file__).parent.glob("*.py"))


def test_sequences_of_unequal_length_do_not_go_together() -> None:
    assert list(zipped("ab", iter([1, 2]))) == [("a", 1), ("b", 2)]
    with pytest.raises(ValueError, match="sequences of 2, 1 items"):
        zipped("ab", [1])


def test_pairs_are_neighbours() -> None:
    assert list(pairwise([0, 3, 7])) == [(0, 3), (3, 7)]
    assert list(pairwise([0])) == []


@pytest.mark.parametrize("module", MODULES, ids=[path.stem for path in MODULES])
def test_no_module_that_runs_in_an_environment_needs_python_310(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"), feature_version=(3, 9))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "itertools"]
    assert not [call.lineno for call in calls if any(word.arg == "strict" for word in call.keywords)]
    assert "pairwise" not in {alias.name for node in imports for alias in node.names}
