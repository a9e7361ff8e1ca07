"""Do two installed packages agree on each other's functions? Compared by their sources, not only by their versions."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ssm_forge.doctor.environment import text_of

_MOST_FILES = 200
_EXTENSION = "causal_conv1d_cuda"


@dataclass(frozen=True)
class Function:
    """A function's signature: ``names`` of its parameters; ``open`` where it takes any number of them."""

    names: tuple[str, ...]
    open: bool


@dataclass(frozen=True)
class Module:
    """A source file, ``None`` values being names without a signature.

    Attributes:
        path: the file.
        tree: what is in it.
        names: top-level names; functions with their signature.
        complete: whether those are all (no ``import *``, no ``__getattr__``).
    """

    path: Path
    tree: ast.Module
    names: dict[str, Function | None]
    complete: bool


def sources(package: Path) -> Iterator[Module]:
    """The modules of a package; files that can't be parsed are left out."""
    for path in sorted(package.rglob("*.py"))[:_MOST_FILES]:
        module = parse(path)
        if module is not None:
            yield module


@functools.lru_cache(maxsize=None)
def parse(path: Path) -> Module | None:
    """The module in a file; None where it can't be parsed."""
    text = text_of(path)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    names: dict[str, Function | None] = {}
    complete = bool(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names[node.name] = _signature(node.args)
            complete = complete and node.name != "__getattr__"
        elif isinstance(node, ast.ClassDef):
            names[node.name] = None
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                complete = complete and alias.name != "*"
                names.setdefault((alias.asname or alias.name).split(".")[0], None)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.setdefault(node.id, None)
    return Module(path, tree, names, complete)


def _signature(arguments: ast.arguments) -> Function:
    names = tuple(a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
    return Function(names, arguments.vararg is not None or arguments.kwarg is not None)


def disagreements(consumer: Path, provider: Path) -> Iterator[str]:
    """What the package ``consumer`` asks of ``provider`` (causal_conv1d) that is not there, one sentence each."""
    arity = {name: count for module in sources(provider) for name, count in _extension_calls(module)}
    for module in sources(consumer):
        yield from _imports(module, provider)
        for name, count in _extension_calls(module):
            if arity.get(name, count) != count:
                yield (
                    f"{module.path} calls {_EXTENSION}.{name} with {count} arguments, "
                    f"the installed causal_conv1d itself with {arity[name]}"
                )


def _extension_calls(module: Module) -> Iterator[tuple[str, int]]:
    """(function, number of arguments) of each call into the extension"""
    for node in ast.walk(module.tree):
        function = node.func if isinstance(node, ast.Call) else None
        if (
            isinstance(node, ast.Call)
            and isinstance(function, ast.Attribute)
            and isinstance(function.value, ast.Name)
            and function.value.id == _EXTENSION
            and not any(isinstance(argument, ast.Starred) for argument in node.args)
            and not node.keywords
        ):
            yield function.attr, len(node.args)


def _imports(module: Module, provider: Path) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == provider.name and not node.level:
            source = _module(provider, (node.module or "").split(".")[1:])
            if source is None:
                yield f"{module.path}:{node.lineno} imports {node.module}, which the installed {provider.name} lacks"
                continue
            for alias in node.names:
                if source.complete and alias.name not in source.names and _module(provider, [alias.name]) is None:
                    yield f"{module.path}:{node.lineno} imports {alias.name}, which {source.path} lacks"
                elif alias.name in source.names:
                    yield from _calls(module, alias.asname or alias.name, _resolved(source, alias.name, provider))


def _module(provider: Path, parts: list[str]) -> Module | None:
    base = provider.joinpath(*parts)
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return parse(path)
    return None


def _resolved(module: Module, name: str, provider: Path) -> Function | None:
    """The signature of a name, also where the module only hands it on from another one of the package."""
    if module.names[name] is not None:
        return module.names[name]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            parts = (node.module or "").split(".")
            inner = _module(provider, parts[1:] if parts[0] == provider.name and not node.level else parts)
            return inner.names.get(name) if inner is not None else None
    return None


def _calls(module: Module, name: str, function: Function | None) -> Iterator[str]:
    if function is None or function.open:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            unknown = [word.arg for word in node.keywords if word.arg and word.arg not in function.names]
            passed = len(node.args) + len(node.keywords)
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            if unknown:
                yield f"{module.path}:{node.lineno} calls {name} with {unknown[0]}=; the installed one takes none"
            elif passed > len(function.names) and not starred:
                takes = len(function.names)
                yield f"{module.path}:{node.lineno} calls {name} with {passed} arguments; installed takes {takes}"


class Import(NamedTuple):
    """One name that is imported: in which file and line, from which module."""

    path: Path
    line: int
    module: str
    name: str


def unguarded_imports(package: Path, provider: str) -> Iterator[Import]:
    """The imports in a package from the package called ``provider`` that no ``try`` guards."""
    for module in sources(package):
        guarded = {
            id(inner)
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Try)
            for child in node.body
            for inner in ast.walk(child)
        }
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").split(".")[0] == provider
                and id(node) not in guarded
                and not node.level
            ):
                for alias in node.names:
                    yield Import(module.path, node.lineno, node.module or "", alias.name)
