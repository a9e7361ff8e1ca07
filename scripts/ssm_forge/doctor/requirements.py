"""Do installed packages fit each other's requirements? Version numbers and requirement lines, as PEP 440 and 508 say.

Only what can be judged for certain is judged: a line with a marker of a rarer kind says nothing here.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

_VERSION = re.compile(
    r"\s*v?(?:(?P<epoch>\d+)!)?(?P<release>\d+(?:\.\d+)*)"
    r"(?:[-_.]?(?P<pre>alpha|beta|preview|pre|rc|a|b|c)[-_.]?(?P<pre_n>\d*))?"
    r"(?:[-_.]?(?P<post>post|rev|r)[-_.]?(?P<post_n>\d*)|-(?P<post_m>\d+))?"
    r"(?:[-_.]?(?P<dev>dev)[-_.]?(?P<dev_n>\d*))?(?:\+(?P<local>[\w.-]+))?\s*$",
    re.IGNORECASE,
)
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;()@]*)\)?\s*(?:;(.*))?$")
_CLAUSE = re.compile(r"\s*(\w+)\s*(==|!=|<=|>=|<|>)\s*[\"']([^\"']*)[\"']\s*$")
_SPECIFIER = re.compile(r"\s*(===|~=|==|!=|<=|>=|<|>)\s*([^\s,]+)\s*$")
_LATE = 1 << 30


def version_key(text: str) -> tuple[Any, ...] | None:
    """What a version is ordered by, without its local part; None for a text that is no version."""
    match = _VERSION.match(text)
    if match is None:
        return None
    release = [int(part) for part in match.group("release").split(".")]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    letter = {"alpha": "a", "beta": "b", "c": "rc", "pre": "rc", "preview": "rc"}
    pre: tuple[Any, ...] = (1, "", 0)
    if match.group("pre"):
        kind = match.group("pre").lower()
        pre = (0, letter.get(kind, kind), int(match.group("pre_n") or 0))
    elif match.group("dev") and not (match.group("post") or match.group("post_m")):
        pre = (-1, "", 0)
    post = (
        int(match.group("post_n") or match.group("post_m") or 0) if match.group("post") or match.group("post_m") else -1
    )
    dev = int(match.group("dev_n") or 0) if match.group("dev") else _LATE
    return (int(match.group("epoch") or 0), tuple(release), pre, post, dev)


def satisfies(version: str, specifiers: str) -> bool | None:
    """Whether a version fits ``>=1,<2``; None where that can't be judged."""
    key = version_key(version)
    for text in filter(None, (part.strip() for part in specifiers.split(","))):
        match = _SPECIFIER.match(text)
        if match is None or key is None:
            return None
        answer = _fits(version, key, match.group(1), match.group(2))
        if answer is not True:
            return answer
    return True


def _fits(version: str, key: tuple[Any, ...], operator: str, text: str) -> bool | None:
    if text.endswith(".*"):
        required = [int(part) for part in re.findall(r"\d+", text)]
        actual = ([int(part) for part in re.split(r"\.", re.sub(r"[^\d.].*", "", version)) if part] + [0] * 9)[
            : len(required)
        ]
        return {"==": actual == required, "!=": actual != required}.get(operator)
    if operator == "===":
        return version == text
    other = version_key(text)
    if other is None:
        return None
    if operator == "~=":
        up_to = text.split(".")[:-1]
        return key >= other and _fits(version, key, "==", ".".join(up_to) + ".*") is True
    if operator in ("==", "!=") and "+" in text:
        return (version == text) is (operator == "==")
    return {"==": key == other, "!=": key != other, "<=": key <= other, ">=": key >= other}.get(
        operator, key < other if operator == "<" else key > other
    )


class Requirement(NamedTuple):
    """A package's normalised name, and the specifiers of its versions, ``>=1,<2``; empty for any version."""

    name: str
    specifiers: str


def parse(line: str, python: str) -> Requirement | None:
    """The requirement of a ``Requires-Dist`` line that holds here with this minor of Python; None for any other."""
    match = _REQUIREMENT.match(line)
    if match is None or not _holds(match.group(3) or "", python):
        return None
    return Requirement(re.sub(r"[-_.]+", "-", match.group(1)).lower(), match.group(2).strip())


def _holds(marker: str, python: str) -> bool:
    if not marker.strip():
        return True
    values: Mapping[str, str] = {
        "python_version": python,
        "python_full_version": python,
        "sys_platform": sys.platform,
        "platform_system": platform.system(),
        "platform_machine": platform.machine(),
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for clause in marker.split(" and "):
        match = _CLAUSE.match(clause)
        if match is None or match.group(1) not in values:
            return False
        actual, required = values[match.group(1)], match.group(3)
        if match.group(1).startswith("python_"):
            if satisfies(actual, match.group(2) + required) is not True:
                return False
        elif (actual == required) is not (match.group(2) == "=="):
            return False
    return True
