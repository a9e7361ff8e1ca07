"""Do two extensions hold the same GPU code? Compares their machine code (SASS) function by function.

cuobjdump's text is read as it comes: half a gigabyte for one extension. Of each function only two digests are kept:
of its instructions, and of their encodings, which also hold how instructions are scheduled.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_forge.base.errors import IntegrityError
from ssm_forge.package.libraries import cuobjdump

# nvcc names what is local to a file after the file: _GLOBAL__N__HASH_LENGTH_FILE_HASH_NUMBER.
_LOCAL = re.compile(r"(?P<prefix>_GLOBAL__N_|_INTERNAL)_(?:[0-9a-f]{8}_)?(?P<length>\d+)_")
_LOCAL_END = re.compile(r"_[0-9a-f]{8}(?P<number>_\d+)?")
_STATIC = re.compile(r"__nv_static_\d+_.*?_(?=_Z)")
_TEMPORARY = re.compile(r"tmpxft_[0-9a-f]+_[0-9a-f]+_\d+_")

_FUNCTION = b"Function :"
_ENCODING = b"/* 0x"
_ARCH = b"arch = "


@dataclass(frozen=True)
class Code:
    """Digest of one function's machine code.

    Attributes:
        instructions: of the instructions' text, without addresses.
        encodings: of their bits.
        count: number of instructions.
    """

    instructions: str
    encodings: str
    count: int


# (architecture, name) -> how often the library holds each code under that name.
Functions = dict[tuple[str, str], Counter[Code]]


@dataclass(frozen=True)
class Comparison:
    """Two libraries, function by function; names are normalised and have the architecture in front.

    Attributes:
        ours: number of functions in the first library.
        theirs: number of functions in the second.
        identical: names with the same instructions in both.
        same_encodings: how many of ``identical`` are the same bit by bit.
        instructions: number of instructions in ours and in theirs.
    """

    ours: int
    theirs: int
    identical: tuple[str, ...]
    same_encodings: int
    different: tuple[str, ...]
    only_ours: tuple[str, ...]
    only_theirs: tuple[str, ...]
    instructions: tuple[int, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json; identical functions only as a number."""
        return {
            "functions": [self.ours, self.theirs],
            "instructions": list(self.instructions),
            "identical": len(self.identical),
            "identical_bit_by_bit": self.same_encodings,
            "different": list(self.different),
            "only_ours": list(self.only_ours),
            "only_theirs": list(self.only_theirs),
        }


def normalised(name: str) -> str:
    """A mangled name without what depends on the name, the folder or the run that compiled its file."""
    name = _STATIC.sub("__nv_static_", name)
    position = 0
    while match := _LOCAL.search(name, position):
        end = _local_end(name, match)
        digits = re.search(r"\d*$", name[: match.start()])
        start = match.start()
        # In a nested name its length stands before it, perhaps right after the digit that another name ends with.
        for first in range(digits.start() if digits else start, start):
            length = int(name[first:start])
            if end[0] <= start + length <= end[1]:
                start, end = first, (start + length, start + length)
                break
        name = f"{name[:start]}{match['prefix']}{name[end[1] :]}"
        position = start + len(match["prefix"])
    return _TEMPORARY.sub("", name)


def _local_end(name: str, match: re.Match[str]) -> tuple[int, int]:
    """Where a file's own part of a name may end: a length that follows its number runs into it."""
    after = match.end() + int(match["length"])
    rest = _LOCAL_END.match(name, after)
    if rest is None:
        return (match.end(), match.end())
    if rest["number"] is None:
        return (rest.end(), rest.end())
    return (rest.start("number") + 2, rest.end())


def parse(lines: Iterable[bytes]) -> Functions:
    """Read what ``cuobjdump --dump-sass`` prints."""
    functions_of: Functions = {}
    arch, name = "", ""
    text, bits, count = hashlib.blake2b(), hashlib.blake2b(), 0

    def finish() -> None:
        if name:
            code = Code(text.hexdigest(), bits.hexdigest(), count)
            functions_of.setdefault((arch, name), Counter())[code] += 1

    for line in lines:
        head, _, encoding = line.rpartition(_ENCODING)
        if head:
            # The second half of an instruction's bits has a line of its own.
            instruction = head.partition(b"*/")[2].strip()
            if instruction:
                text.update(b" ".join(instruction.split()) + b"\n")
                count += 1
            bits.update(encoding.strip())
        elif _FUNCTION in line:
            finish()
            name = normalised(line.partition(_FUNCTION)[2].strip().decode())
            text, bits, count = hashlib.blake2b(), hashlib.blake2b(), 0
        elif line.startswith(_ARCH):
            finish()
            arch, name = line[len(_ARCH) :].strip().decode(), ""
    finish()
    return functions_of


def functions(library: Path) -> Functions:
    """The GPU functions of a library.

    Raises:
        IntegrityError: when it holds no machine code, or can't be read.
    """
    with tempfile.TemporaryFile() as messages:
        command = [str(cuobjdump()), "--dump-sass", str(library)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process:
            assert process.stdout is not None
            codes = parse(process.stdout)
        messages.seek(0)
        complaint = messages.read().decode(errors="replace").strip()
    if process.returncode or not codes:
        raise IntegrityError(f"cuobjdump found no machine code in {library} ({complaint or process.returncode}).")
    return codes


def compare(ours: Functions, theirs: Functions) -> Comparison:
    """Compare function by function; one that a library holds several times must have the same codes in both."""
    common = sorted(ours.keys() & theirs.keys())
    identical = [key for key in common if _instructions(ours[key]) == _instructions(theirs[key])]
    different = sorted(set(common) - set(identical))
    return Comparison(
        ours=sum(map(_total, ours.values())),
        theirs=sum(map(_total, theirs.values())),
        identical=tuple(map(_label, identical)),
        same_encodings=sum(ours[key].keys() == theirs[key].keys() for key in identical),
        different=tuple(map(_label, different)),
        only_ours=tuple(map(_label, sorted(ours.keys() - theirs.keys()))),
        only_theirs=tuple(map(_label, sorted(theirs.keys() - ours.keys()))),
        instructions=(_count(ours), _count(theirs)),
    )


def _instructions(codes: Counter[Code]) -> set[str]:
    return {code.instructions for code in codes}


def _total(codes: Counter[Code]) -> int:
    return sum(codes.values())


def _count(functions_of: Functions) -> int:
    return sum(code.count * number for codes in functions_of.values() for code, number in codes.items())


def _label(key: tuple[str, str]) -> str:
    return f"{key[0]} {key[1]}"


def compare_libraries(ours: Path, theirs: Path) -> Comparison:
    """Compare two libraries.

    Raises:
        IntegrityError: when one holds no machine code, or can't be read.
    """
    return compare(functions(ours), functions(theirs))
