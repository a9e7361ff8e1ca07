"""The eight hex digits that pixi 0.77 puts into a lock to tell source packages of one place apart.

They are XXH3 (64 bits, no seed) over the values as Rust's standard library feeds them to a hasher. pixi reads them
back as they are and never checks those of a path, so only a lock that is to be pixi's to the byte needs them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence

_WORD = 2**64 - 1
_PRIMES = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_PRIMES_32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_STRIPE = 64
_BLOCK = 1024

# What comes before the address of a package from a channel; pixi has another number for packages from source.
_FROM_CHANNEL = 0x7C48A5E391D60BF2
# Which of url, git and path a source is, which of a version's components is a number, and so on: their order in pixi.
_PATH = 2
_UNIX = 0
_NUMBER, _POST, _DEV, _WORD_IN_VERSION = range(4)
_NOTHING, _SOMETHING = range(2)
_TEXT = 0


def identity(
    path: str,
    *,
    variants: Mapping[str, str],
    build_packages: Iterable[str],
    host_packages: Iterable[str],
    version: str,
    build: str,
    build_number: int,
    subdir: str,
    depends: Sequence[str],
    constrains: Sequence[str] = (),
) -> str:
    """The eight hex digits of one source package.

    Args:
        path: of the recipe's folder, relative to the workspace.
        build_packages, host_packages: URLs, in any order.
    """
    parts = [
        *(_number(_PATH), _number(_UNIX), _path(path)),
        # Built from where its manifest is.
        _number(_NOTHING),
        _number(len(variants)),
        *(_text(key) + _number(_TEXT) + _text(value) for key, value in sorted(variants.items())),
        *(_packages(build_packages), _packages(host_packages)),
        *(_version(version), _text(build), _number(build_number), _text(subdir)),
        # Not noarch.
        _number(_NOTHING),
        *(_number(len(depends)), *map(_text, depends)),
        *(_number(len(constrains)), *map(_text, constrains)),
        # No extras, flags, purls; no sources of its own; not defined in the manifest that names it.
        *(_number(0), _number(0), _number(_NOTHING), _number(0), _number(_NOTHING)),
    ]
    return f"{xxh3(b''.join(parts)):016x}"[:8]


def _packages(urls: Iterable[str]) -> bytes:
    digests = sorted(xxh3(_number(_FROM_CHANNEL) + _text(url)) for url in urls)
    return _number(len(digests)) + b"".join(map(_number, digests))


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _text(value: str) -> bytes:
    return value.encode() + b"\xff"


def _path(path: str) -> bytes:
    """Its names without what is between them, and how many bytes that was."""
    names = "".join(part for part in path.split("/") if part not in ("", "."))
    return names.encode() + _number(len(names.encode()))


def _version(version: str) -> bytes:
    """Epoch, and each dotted part from its end, without the zeros that make no difference; then the text itself."""
    parts = [_number(0)]
    for segment in version.split("."):
        components = [_component(part) for part in re.findall(r"\d+|[a-z]+", segment.lower())]
        if not segment[0].isdigit():
            components.insert(0, _component("0"))
        while components and components[-1] == _component("0"):
            components.pop()
        parts += reversed(components)
    return b"".join([*parts, _number(_SOMETHING), _text(version)])


def _component(part: str) -> bytes:
    if part.isdigit():
        return _number(_NUMBER) + _number(int(part))
    special = {"post": _POST, "dev": _DEV}.get(part)
    return _number(_WORD_IN_VERSION) + _text(part) if special is None else _number(special)


def xxh3(data: bytes) -> int:
    """XXH3 (64 bits) of ``data``, which has more than 16 bytes.

    Raises:
        ValueError: when it has fewer.
    """
    if len(data) <= 16:
        raise ValueError(f"{len(data)} bytes")
    if len(data) <= 128:
        return _up_to_128(data)
    return _up_to_240(data) if len(data) <= 240 else _long(data)


def _up_to_128(data: bytes) -> int:
    size = len(data)
    total = size * _PRIMES[0]
    for number in range((size - 1) // 32 + 1):
        total += _mix(data, 16 * number, 32 * number) + _mix(data, size - 16 * (number + 1), 32 * number + 16)
    return _avalanche(total)


def _up_to_240(data: bytes) -> int:
    size = len(data)
    total = _avalanche(size * _PRIMES[0] + sum(_mix(data, 16 * n, 16 * n) for n in range(8)))
    total += sum(_mix(data, 16 * n, 16 * (n - 8) + 3) for n in range(8, size // 16))
    return _avalanche(total + _mix(data, size - 16, 136 - 17))


def _long(data: bytes) -> int:
    size = len(data)
    a, b, c = _PRIMES_32
    lanes = [c, *_PRIMES[:4], b, _PRIMES[4], a]
    stripes = (size - 1) // _STRIPE
    for number in range(stripes):
        _accumulate(lanes, data, _STRIPE * number, 8 * (number % (_BLOCK // _STRIPE)))
        if (number + 1) % (_BLOCK // _STRIPE) == 0:
            _scramble(lanes)
    _accumulate(lanes, data, size - _STRIPE, len(_SECRET) - _STRIPE - 7)
    total = size * _PRIMES[0]
    for number in range(4):
        first, second = _words(_SECRET, 11 + 16 * number, 2)
        total += _fold((lanes[2 * number] ^ first) * (lanes[2 * number + 1] ^ second))
    return _avalanche(total)


def _accumulate(lanes: list[int], data: bytes, at: int, secret_at: int) -> None:
    for lane, (word, secret) in enumerate(zip(_words(data, at, 8), _words(_SECRET, secret_at, 8), strict=True)):
        key = word ^ secret
        lanes[lane ^ 1] = (lanes[lane ^ 1] + word) & _WORD
        lanes[lane] = (lanes[lane] + (key & 0xFFFFFFFF) * (key >> 32)) & _WORD


def _scramble(lanes: list[int]) -> None:
    for lane, secret in enumerate(_words(_SECRET, len(_SECRET) - _STRIPE, 8)):
        lanes[lane] = (lanes[lane] ^ (lanes[lane] >> 47) ^ secret) * _PRIMES_32[0] & _WORD


def _mix(data: bytes, at: int, secret_at: int) -> int:
    (low, high), (first, second) = _words(data, at, 2), _words(_SECRET, secret_at, 2)
    return _fold((low ^ first) * (high ^ second))


def _words(data: bytes, at: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}Q", data, at)


def _fold(product: int) -> int:
    return (product & _WORD) ^ (product >> 64)


def _avalanche(value: int) -> int:
    value &= _WORD
    value = (value ^ (value >> 37)) * 0x165667919E3779F9 & _WORD
    return value ^ (value >> 32)
