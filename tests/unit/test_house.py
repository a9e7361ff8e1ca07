"""The folders are the flow: each imports only those below it, at the top of a file, in no circle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = {
    ".".join(path.relative_to(SCRIPTS).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((SCRIPTS / "ssm_forge").rglob("*.py"))
}
KERNELS = "ssm_forge.kernels"
_DESIGN = SCRIPTS.parent / "docs/design.md"
# The list that people read is the one that holds.
ORDER = re.findall(r"^\d+\. `([a-z]+)/`", _DESIGN.read_text(encoding="utf-8"), re.MULTILINE)
# They travel without the rest: nothing of ours but what lies in them, and the version.
APART = ("doctor", "kernels")


def imported(tree: ast.AST) -> Iterator[str]:
    """Our own modules that some code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssm_forge"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ssm_forge"))


SOURCES = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
ARROWS = {name: {target for target in imported(tree) if target != name} for name, tree in TREES.items()}


def folder_of(module: str) -> str:
    """The folder below ssm_forge that a module lies in; empty for the command line itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (SCRIPTS / "ssm_forge" / parts[1]).is_dir() else ""


def test_the_list_of_folders_names_each_of_them_once() -> None:
    assert sorted(ORDER) == sorted(path.parent.name for path in (SCRIPTS / "ssm_forge").glob("*/__init__.py"))


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_folders_below_it(folder: str) -> None:
    allowed = {folder} if folder in APART else {folder, *ORDER[ORDER.index(folder) :]}
    upward = {
        f"{name} imports {target}"
        for name, targets in ARROWS.items()
        if folder_of(name) == folder
        for target in targets
        if target != "ssm_forge" and folder_of(target) not in allowed
    }
    assert upward == set()


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_says_what_comes_in_and_what_goes_out(folder: str) -> None:
    assert len((ast.get_docstring(TREES[f"ssm_forge.{folder}"]) or "").split()) >= 20


def test_our_own_modules_are_imported_at_the_top_of_a_file() -> None:
    hidden = {
        f"{name}, line {node.lineno}, imports {target}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for target in imported(node)
    }
    assert hidden == set()


def test_no_module_imports_one_that_imports_it() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for target in sorted(ARROWS.get(name, ())):
            visit(target, (*path, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())
    assert done >= set(MODULES)


def test_the_kernels_checks_import_nothing_else_of_ours() -> None:
    """They are copied into bundles, and run in environments that have torch alone."""
    outside = {
        target
        for name, targets in ARROWS.items()
        if name.startswith(KERNELS)
        for target in targets
        if not target.startswith(KERNELS)
    }
    assert outside == set()


MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 50
# Why a function is longer, said inside it.
REASON = re.compile(r"^ +# Long: \w+", re.MULTILINE)


def test_a_file_can_be_read_in_one_sitting() -> None:
    lines = {name: len(text.splitlines()) for name, text in SOURCES.items()}
    assert {name for name, count in lines.items() if count > MOST_LINES_OF_A_FILE} == set()


def test_a_function_fits_a_screen_or_says_why_not() -> None:
    without_reason = {
        f"{name}.{node.name}, line {node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or node.lineno) - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
        and not REASON.search("\n".join(SOURCES[name].splitlines()[node.lineno - 1 : node.end_lineno]))
    }
    assert without_reason == set()


SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:")


def test_a_docstring_begins_with_what_the_thing_is_or_does() -> None:
    without = {
        f"{name}, line {node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and (ast.get_docstring(node) or "").startswith(SECTIONS)
    }
    assert without == set()


def test_a_module_says_what_it_is_for() -> None:
    assert {name for name, tree in TREES.items() if not ast.get_docstring(tree)} == set()


# What a pixi environment may lack: commands say so, and go on with the tools of ./run.
LACKING = ("starlette", "uvicorn", "cyclonedx", "boto3", "cryptography", "msgpack", "matplotlib", "torch")
WITHOUT = """
import importlib, sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking!r}:
            raise ImportError(f"this environment has no {{name}}")

sys.meta_path.insert(0, Lacking())
for name in {commands!r}:
    importlib.import_module(name)
"""


def test_commands_can_be_imported_without_what_only_some_tasks_need() -> None:
    commands = [name for name in MODULES if name.startswith("ssm_forge.commands.")]
    # Its libraries are looked for before it is imported (cli.py).
    commands.remove("ssm_forge.commands.serve")
    script = WITHOUT.format(lacking=LACKING, commands=commands)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """pytest's own list has ``build`` and ``dist``: tests in folders of such names would never run, in silence."""
    folders = {path.name for path in (pytestconfig.rootpath / "tests").rglob("*") if path.is_dir()} - {"__pycache__"}
    passed_over = pytestconfig.getini("norecursedirs")
    assert [name for name in sorted(folders) if any(fnmatch(name, pattern) for pattern in passed_over)] == []
