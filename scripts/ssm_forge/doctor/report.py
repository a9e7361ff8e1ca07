"""What people and programs get to see of a diagnosis; secrets are hidden, in a report to send also names."""

from __future__ import annotations

import json
import platform
import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from ssm_forge import __version__
from ssm_forge.doctor.diagnosis import Diagnosis
from ssm_forge.doctor.findings import Finding

LANGUAGES = ("en", "zh")
_HIDDEN = "********"
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@'\"]+@"), f"{_HIDDEN}@"),
    (re.compile(r"/t/[^/\s'\"]+(?=/)"), f"/t/{_HIDDEN}"),
    (re.compile(r"(?i)(\bauthorization\W{1,4}(?:\w+\s+)?|\bbearer\s+)[\w.~+/=-]{6,}"), rf"\g<1>{_HIDDEN}"),
    (
        re.compile(
            r"(?i)([\w-]*(?:token|secret|passw(?:or)?d|passphrase|credential|api_?key|access_?key)[\w-]*"
            r"['\"]?\s*[=:]\s*['\"]?)(?!\*{8})[^\s'\"&,;]+"
        ),
        rf"\g<1>{_HIDDEN}",
    ),
    (re.compile(r"\b(?:hf|ghp|gho|ghs|glpat|pypi|sk)[-_][\w-]{12,}|\bAKIA[A-Z0-9]{12,}"), _HIDDEN),
)
_WORDS = {
    "en": {
        "fix": "Fix", "seen": "Seen in", "healthy": "Nothing wrong was found.",
        "unknown": "The failure in this log is not one that doctor knows. To report it, attach what "
        "'--report FILE' writes, and the log.",
        "fine": "The log shows no failure that doctor knows.", "last": "Its last error",
    },
    "zh": {
        "fix": "解决办法", "seen": "出处", "healthy": "没有发现问题。",
        "unknown": "日志里的错误不在已知之列。提交 issue 时，请附上 '--report FILE' 生成的文件和日志。",
        "fine": "日志里没有已知的错误。", "last": "最后一个错误",
    },
}  # fmt: skip


def without_secrets(text: str) -> str:
    """``text`` without passwords, tokens and keys."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def without_person(text: str, variables: Mapping[str, str]) -> str:
    """``text`` without secrets, and without the names of the user, the home folder and the machine."""
    text = without_secrets(text)
    home = variables.get("HOME", "").rstrip("/")
    if len(home) > 1:
        text = text.replace(home, "~")
    text = re.sub(r"/(home|Users|mnt/home|scratch|data/home)/[^/\s'\":]+", r"/\1/USER", text)
    for name in {variables.get("USER", ""), variables.get("LOGNAME", ""), platform.node()}:
        if len(name) > 2 and name != "root":
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "USER", text)
    return text


def as_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """A diagnosis as plain values without secrets, for programs."""
    document = {
        "doctor": __version__,
        "broken": diagnosis.broken,
        "unknown": diagnosis.unknown,
        "findings": [entry.as_dict() for entry in diagnosis.findings],
        "notes": diagnosis.notes,
        "facts": diagnosis.facts,
    }
    cleaned: dict[str, Any] = _each_text(document, without_secrets)
    return cleaned


def to_send(diagnosis: Diagnosis, variables: Mapping[str, str]) -> str:
    """The report to attach to an issue, as JSON."""
    document = {**as_dict(diagnosis), "python": platform.python_version(), "system": platform.platform()}
    cleaned = _each_text(document, lambda text: without_person(text, variables))
    return json.dumps(cleaned, indent=1, ensure_ascii=False) + "\n"


def _each_text(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        # A variable's name tells whether its value is a secret.
        return {key: _hidden(key, _each_text(inner, change)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(inner, change) for inner in value]
    return value


def _hidden(key: str, value: Any) -> Any:
    if isinstance(value, str) and re.search(r"(?i)token|secret|password|api_?key|credential", key):
        return _HIDDEN
    return value


def as_text(diagnosis: Diagnosis, language: str) -> str:
    """A diagnosis as text for people, at most as wide as the terminal; commands are never broken.

    Args:
        language: one of :data:`LANGUAGES`.
    """
    words = _WORDS[language]
    width = min(100, max(40, shutil.get_terminal_size((80, 24)).columns))
    lines = []
    if "kind" in diagnosis.facts:
        facts = diagnosis.facts
        lines.append(
            f"{facts['environment']} ({facts['kind']}, Python {facts['python'].split(' ')[0]}, torch {facts['torch']})"
        )
    shown_commands: set[str] = set()
    for number, entry in enumerate(diagnosis.findings, 1):
        lines += ["", *_finding(number, entry, language, width, shown_commands)]
    if not diagnosis.findings:
        log = "log" in diagnosis.facts
        text = words["unknown"] if diagnosis.unknown else words["fine"] if log else words["healthy"]
        lines += textwrap.wrap(text, width)
        if diagnosis.facts.get("last error") and diagnosis.unknown:
            lines.append(f"{words['last']}: {diagnosis.facts['last error']}")
    lines += [""] if diagnosis.notes and diagnosis.findings else []
    for text in diagnosis.notes:
        lines += textwrap.wrap(f"note: {text}", width)
    return without_secrets("\n".join(lines).strip("\n"))


def _finding(number: int, entry: Finding, language: str, width: int, shown_commands: set[str]) -> list[str]:
    words, rule = _WORDS[language], entry.rule
    wide = width // 2 if language == "zh" else width
    lines = textwrap.wrap(
        f"{number}. {entry.severity} {entry.code}: {rule.cause[language]}", wide, subsequent_indent="   "
    )
    for text in entry.evidence:
        lines += textwrap.wrap(
            f"- {text}",
            width,
            initial_indent="   ",
            subsequent_indent="     ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    lines += textwrap.wrap(f"{words['fix']}: {rule.fix[language]}", wide, initial_indent="   ", subsequent_indent="   ")
    if entry.command and entry.command not in shown_commands:
        shown_commands.add(entry.command)
        lines.append(f"     {entry.command}")
    if rule.sources:
        lines += textwrap.wrap(
            f"{words['seen']}: {', '.join(rule.sources)}", width, initial_indent="   ", subsequent_indent="   "
        )
    return lines


def first_line(diagnosis: Diagnosis) -> str:
    """The first error in two lines, for the end of another command's output; empty where there is none."""
    if not diagnosis.broken:
        return ""
    entry = diagnosis.findings[0]
    text = f"doctor: {entry.code}: {entry.rule.cause['en']} {entry.evidence[0] if entry.evidence else ''}".rstrip()
    return without_secrets(f"{text}\n{entry.rule.fix['en']}" + (f"\n  {entry.command}" if entry.command else ""))
