"""C++ symbols of torch: readable names, and the releases of torch that have them."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterable

from ssm_forge.doctor.rules import data

# Symbols of torch's namespaces; what an extension asks of it.
OF_TORCH = re.compile(r"_Z(?:T[IVS])?(?:N[KVr]*)?(?:3c10|2at|5torch|6caffe2)|_Z\w*?N[KVr]*(?:3c10|2at)\d")
_STRING = "std::__cxx11::basic_string<char, std::char_traits<char>, std::allocator<char> >"
_NEW_ABI, _OLD_ABI = re.compile(r"NSt7__cxx1112basic_string|B5cxx11"), re.compile(r"Ss(?=[A-Z\d]|b\b|b$|$)")


def demangle(symbol: str) -> str:
    """The readable name of a symbol; the symbol itself where it can't be told."""
    library = _libstdcxx()
    if library is not None:
        status = ctypes.c_int()
        answer = library.__cxa_demangle(symbol.encode("ascii", "replace"), None, None, ctypes.byref(status))
        if answer and status.value == 0:
            text: str = ctypes.string_at(answer).decode("utf-8", "replace")
            return text.replace(_STRING, "std::string")
    return _nested_name(symbol)


@functools.lru_cache(maxsize=None)
def _libstdcxx() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        library.__cxa_demangle.restype = ctypes.c_void_p
        return library
    except (OSError, AttributeError):
        return None


def _nested_name(symbol: str) -> str:
    """``c10::cuda::SetDevice`` for ``_ZN3c104cuda9SetDeviceEi``, without the arguments."""
    match = re.match(r"_ZN[KVr]*", symbol)
    names, rest = [], symbol[match.end() :] if match else ""
    while True:
        length = re.match(r"\d+", rest)
        if length is None:
            break
        end = length.end() + int(length.group())
        names.append(rest[length.end() : end])
        rest = rest[end:]
    return "::".join(names) or symbol


def minors() -> tuple[str, ...]:
    """The minor releases of torch that the table knows, oldest first."""
    return tuple(data("torch_symbols.json")["minors"])


def built_for(symbols: Iterable[str]) -> tuple[str, ...]:
    """The minor releases of torch that have all those of ``symbols`` that differ; empty when nothing can be told."""
    table, releases, names = _table(), minors(), list(symbols)
    having_each = [table[symbol] for symbol in names if symbol in table]
    if abi(names) == "old":
        # No torch has the old ABI any more.
        having_each.append(frozenset(releases[: releases.index("2.7")]))
    fitting = tuple(minor for minor in releases if all(minor in minors_with for minors_with in having_each))
    return () if fitting == releases else fitting


@functools.lru_cache(maxsize=None)
def _table() -> dict[str, frozenset[str]]:
    releases = minors()
    table = {}
    for symbol, spans in data("torch_symbols.json")["symbols"].items():
        with_symbol: list[str] = []
        for span in spans.split(","):
            first, _, last = span.partition("-")
            with_symbol += releases[releases.index(first) : releases.index(last or first) + 1]
        table[symbol] = frozenset(with_symbol)
    return table


def abi(symbols: Iterable[str]) -> str:
    """``new`` or ``old``: the C++11 ABI, as the strings in torch's symbols tell; empty where none does."""
    of_torch = [symbol for symbol in symbols if OF_TORCH.match(symbol)]
    if any(_NEW_ABI.search(symbol) for symbol in of_torch):
        return "new"
    return "old" if any(_OLD_ABI.search(symbol) for symbol in of_torch) else ""


def says_abi(symbol: str) -> bool:
    """Whether a symbol differs between the two ABIs."""
    return bool(_NEW_ABI.search(symbol) or _OLD_ABI.search(symbol))
