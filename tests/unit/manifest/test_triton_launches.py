"""Every kernel that the patched Python sources start from a grid starts on the GPU that holds its tensors."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from patched_sources import RELEASES, fits, listed_patches, unpacked

ROOT = Path(__file__).resolve().parents[3]
GUARDS = sorted((ROOT / "patches" / "mamba-ssm").glob("*/*-start-on-the-tensors-gpu.patch"))
DECORATOR = "on_the_tensors_gpu"
# with torch.cuda.device(x.device.index): where x is a tensor that the kernel gets.
CONTEXT = re.compile(r"torch\.cuda\.device\(\w+\.device\.index\)")

# Calls of what lies in a list or dict that start no Triton kernel: file and what is called -> what it is.
NO_KERNELS = {
    ("mamba_ssm/utils/generation.py", "cache.callables[batch_size, decoding_seqlen]"): "replays a CUDA graph",
}


class Launches(ast.NodeVisitor):
    """Finds ``kernel[grid](...)``, and whether each stands below a guard."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, bool]] = []
        self._guarded = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        # What a `with` around a definition holds ends before the function is called.
        inside, self._guarded = self._guarded, any(ast.unparse(d) == DECORATOR for d in node.decorator_list)
        self.generic_visit(node)
        self._guarded = inside

    def visit_With(self, node: ast.With) -> None:
        inside = self._guarded
        self._guarded |= any(CONTEXT.fullmatch(ast.unparse(item.context_expr)) is not None for item in node.items)
        self.generic_visit(node)
        self._guarded = inside

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Subscript):
            self.found.append((ast.unparse(node.func), node.lineno, self._guarded))
        self.generic_visit(node)


def launches(text: str) -> list[tuple[str, int, bool]]:
    """What is called, in which line, and whether below a guard."""
    visitor = Launches()
    visitor.visit(ast.parse(text))
    return visitor.found


@pytest.mark.slow
@pytest.mark.parametrize(("project", "release"), RELEASES)
def test_every_launch_is_on_the_gpu_of_the_tensors(project: str, release: str, tmp_path: Path) -> None:
    tree = unpacked(project, release, tmp_path)
    assert [patch.name for patch in listed_patches(project, release) if not fits(patch, tree)] == []
    found, stray = 0, []
    for path in sorted((tree / project.replace("-", "_")).rglob("*.py")):
        name = path.relative_to(tree).as_posix()
        for called, line, guarded in launches(path.read_text(encoding="utf-8")):
            found += 1
            if not guarded and (name, called) not in NO_KERNELS:
                stray.append(f"{name}:{line}: {called}")
    assert stray == []
    assert found >= {"causal-conv1d": 1, "mamba-ssm": 29}[project]


def test_a_launch_without_a_guard_is_found() -> None:
    text = """
def bare(x):
    kernel[grid](x)

def held(x):
    with torch.cuda.device(x.device.index):
        kernel[grid](x)
    kernel[(1,)](x)

@on_the_tensors_gpu
def decorated(x):
    wrap_triton(kernel)[grid](x)

with torch.cuda.device(y.device.index):
    def called_later(x):
        kernel[grid](x)

def of_another(x):
    with torch.cuda.device(0):
        kernel[grid](x)
"""
    assert [guarded for _, _, guarded in launches(text)] == [False, True, False, True, False, False]


@pytest.mark.parametrize("patch", GUARDS, ids=lambda patch: patch.parent.name)
def test_the_decorator_holds_the_gpu_of_the_first_tensor_on_one(patch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    class Tensor:
        def __init__(self, index: int | None) -> None:
            self.device = SimpleNamespace(index=index)
            self.is_cuda = index is not None

    @contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    torch = ModuleType("torch")
    torch.__dict__.update(Tensor=Tensor, cuda=SimpleNamespace(device=device))
    monkeypatch.setitem(sys.modules, "torch", torch)
    _, _, added = patch.read_text(encoding="utf-8").partition("+++ b/mamba_ssm/utils/gpus.py\n")
    lines = re.findall(r"^\+(.*)$", added, re.MULTILINE)
    module: dict[str, object] = {}
    exec("\n".join(lines), module)

    def started_on(*tensors: object, **named: object) -> int:
        """What a kernel would be started on."""
        return current[-1]

    guarded = module[DECORATOR](started_on)  # type: ignore[operator]
    assert guarded(None, 3, Tensor(1), Tensor(2)) == 1
    assert guarded(chunk=64, q=Tensor(2)) == 2
    assert guarded(Tensor(None), Tensor(1)) == 1
    assert guarded(Tensor(None)) == guarded(7) == 0
    assert guarded.__name__ == "started_on"
    assert current == [0]


def test_both_lines_of_releases_have_the_same_decorator() -> None:
    assert [patch.parent.name for patch in GUARDS] == ["2.3.1", "2.3.2.post1"]
    added = {patch.read_text(encoding="utf-8").partition("+++ b/mamba_ssm/utils/gpus.py\n")[2] for patch in GUARDS}
    assert len(added) == 1
    assert "" not in added
