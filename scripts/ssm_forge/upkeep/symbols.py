"""Which C++ symbols each minor release of torch has: the table that doctor tells an extension's torch from."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import httpx
from packaging.version import Version

from ssm_forge.base.errors import NetworkError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import say
from ssm_forge.base.web import session
from ssm_forge.doctor import binary
from ssm_forge.upkeep.package_index import Release, releases
from ssm_forge.upkeep.projects import Update
from ssm_forge.upkeep.remote_zip import RemoteFile

_OLDEST = Version("2.0")
_LIBRARIES = ("libc10.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cpu.so")
_PYTHONS = ("cp312", "cp311", "cp310")

# What causal_conv1d_cuda, selective_scan_cuda and other extensions ask torch for, and what differs between releases.
# None with a std::string: those differ between the two C++11 ABIs, too, which is another question.
_OPERATORS = (
    "zeros_like|empty_like|ones_like|zeros|empty_memory_format|sum_dim_IntList|sum|to_dtype|to_dtype_layout|contiguous|"
    "transpose_int|view|reshape|full_like|copy_|zero_|slice_Tensor|select_int|clone|unsqueeze|permute"
)
_ELEMENTS = r"IN3c10(?:4Half|8BFloat16)E|IKN3c10(?:4Half|8BFloat16)E|IK?[fil]"
_WANTED = (
    r"_ZN3c104cuda(?:9SetDevice|9GetDevice|14ExchangeDevice|14MaybeSetDevice|29c10_cuda_check_impl)"
    r"|_ZN3c104cuda(?:20getCurrentCUDAStream|20getDefaultCUDAStream|20setCurrentCUDAStream|17getStreamFromPool)"
    r"|_ZN3c104cuda(?:21warn_or_error_on_sync|12device_count|20CUDACachingAllocator9allocator)"
    r"|_ZN3c10(?:4impl8GPUTrace|4impl23ExcludeDispatch|6detail\d+torch|6detail19maybe_wrap_dim|19UndefinedTensorImpl)"
    r"|_ZNK?3c107SymBool|_ZN6caffe28TypeMeta|_ZN2at13globalContext|_ZNK2at7Context|_ZTVN5torch8autograd12AutogradMetaE"
    r"|_ZN8pybind116detail11type_casterIN2at6TensorE"
    r"|_ZN3c10(?:7WarningC1|4warn|21throwNullDataPtr|13MessageLogger(?!D|C2)|15SmallVectorBase|6SymInt(?!D|C2))"
    rf"|_ZN2at4_ops\d+(?:{_OPERATORS})4callE|_ZNK3c106SymInt|_ZNK3c1010TensorImpl|_ZNK3c104cuda"
    rf"|_ZNK2at10TensorBase(?!\d+(?:const_|mutable_)?data_ptr)|_ZNK2at10TensorBase\d+(?:const_|mutable_)?data_ptr(?:{_ELEMENTS})"
)
_MOST_CHARACTERS = 160


def bump_symbols(workspace: Workspace) -> Update:
    """The table with the minor releases of torch that it lacks.

    Raises:
        NetworkError: when a wheel can't be read.
    """
    path = workspace.root / "scripts/ssm_forge/doctor/torch_symbols.json"
    table = read_table(path) if path.exists() else {}
    newest = _newest_of_each_minor(workspace)
    missing = [minor for minor in newest if minor not in table]
    if not missing:
        return Update((f"the symbols of torch {', '.join(newest)} are known.",), {})
    for minor in missing:
        say(f"Reading {newest[minor].artifact.name}")
        table[minor] = _symbols(newest[minor].artifact.url)
    return Update(tuple(f"torch {minor}: {len(table[minor])} symbols" for minor in missing), {path: table_text(table)})


def read_table(path: Path) -> dict[str, frozenset[str]]:
    """Minor release -> its symbols, of a table that :func:`table_text` wrote."""
    document = json.loads(path.read_text(encoding="utf-8"))
    minors: list[str] = document["minors"]
    symbols_of: dict[str, set[str]] = {minor: set() for minor in minors}
    for symbol, spans in document["symbols"].items():
        for span in spans.split(","):
            first, _, last = span.partition("-")
            for minor in minors[minors.index(first) : minors.index(last or first) + 1]:
                symbols_of[minor].add(symbol)
    return {minor: frozenset(symbols) for minor, symbols in symbols_of.items()}


def table_text(table: Mapping[str, frozenset[str]]) -> str:
    """The table as JSON: of each symbol the spans of minor releases that have it."""
    minors = sorted(table, key=Version)
    symbols = {}
    for symbol in sorted(frozenset().union(*table.values())):
        having = [symbol in table[minor] for minor in minors]
        begins = [i for i, has in enumerate(having) if has and not (i and having[i - 1])]
        ends = [i for i, has in enumerate(having) if has and not (i + 1 < len(minors) and having[i + 1])]
        spans = [(minors[first], minors[last]) for first, last in zip(begins, ends, strict=True)]
        symbols[symbol] = ",".join(first if first == last else f"{first}-{last}" for first, last in spans)
    document = {"from": "PyPI's wheels for x86_64; ./run bump symbols", "minors": minors, "symbols": symbols}
    return json.dumps(document, indent=0) + "\n"


def wanted(symbols: frozenset[str]) -> frozenset[str]:
    """Those that the table keeps."""
    return frozenset(s for s in symbols if "cxx11" not in s and "Ss" not in s and len(s) <= _MOST_CHARACTERS)


def _newest_of_each_minor(workspace: Workspace) -> dict[str, Release]:
    newest: dict[str, Release] = {}
    for release in releases("torch", workspace):
        name = release.artifact.name
        fits = "manylinux" in name and "x86_64" in name and any(f"-{python}-{python}-" in name for python in _PYTHONS)
        if fits and release.version >= _OLDEST:
            newest[f"{release.version.major}.{release.version.minor}"] = release
    return newest


def _symbols(url: str) -> frozenset[str]:
    symbols: set[str] = set()
    try:
        with session() as client, tempfile.TemporaryDirectory() as scratch:
            stream = io.BufferedReader(RemoteFile(url, client), buffer_size=1 << 20)
            with zipfile.ZipFile(stream) as archive:
                for name in _LIBRARIES:
                    target = Path(scratch) / name
                    with archive.open(f"torch/lib/{name}") as source, target.open("wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
                    symbols |= binary.exported(target, _WANTED)
                    target.unlink()
    except (httpx.HTTPError, zipfile.BadZipFile, KeyError) as error:
        raise NetworkError(
            f"{url} could not be read ({type(error).__name__}: {error}).",
            fix="Check the network and run the same command again.",
        ) from error
    return wanted(frozenset(symbols))
