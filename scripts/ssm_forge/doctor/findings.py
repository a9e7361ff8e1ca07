"""A finding: which failure, what shows it, and the command that mends it here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_forge.doctor.rules import Rule, load

_OURS = re.compile(r"causal_conv1d|selective_scan|mamba")
_LIBRARY = re.compile(r"([\w.-]+?)(?:\.(?:cpython|abi3|cp)[\w-]*)?\.so\b")


@dataclass(frozen=True)
class Target:
    """The environment that commands are for.

    Attributes:
        prefix: its folder; None where there is only a log.
        python: its interpreter.
    """

    prefix: Path | None = None
    python: Path | None = None

    def command(self, rule: Rule, name: str = "", evidence: str = "") -> str:
        """The rule's command with the environment's own paths."""
        python = shlex.quote(str(self.python)) if self.python else "python"
        prefix = shlex.quote(str(self.prefix)) if self.prefix else "ENV"
        rebuild = f"./run install-mamba --prefix {prefix}"
        library = _LIBRARY.search(evidence)
        if library is not None and not _OURS.search(evidence):
            # Another project's extension: its own package is what has to be built again.
            rebuild = f"{python} -m pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps PACKAGE"
        return (
            rule.command.replace("{rebuild}", rebuild)
            .replace("{python}", python)
            .replace("{env}", prefix)
            .replace("{name}", shlex.quote(name) if name else "PACKAGE")
        )


@dataclass(frozen=True)
class Finding:
    """A rule that holds here, with what shows it.

    Attributes:
        code: the rule's.
        evidence: what shows it: paths, symbols, versions.
        severity: ``error``, ``warning`` or ``hint``.
        command: the command that mends it; may be empty.
        module: what it is about where several modules may have the same failure; for merging with what an import says.
    """

    code: str
    evidence: tuple[str, ...]
    severity: str
    command: str
    module: str = ""

    @property
    def rule(self) -> Rule:
        return load()[self.code]

    def as_dict(self) -> dict[str, Any]:
        rule = self.rule
        return {
            "code": self.code,
            "severity": self.severity,
            "evidence": list(self.evidence),
            "explanation": rule.cause,
            "fix": rule.fix,
            "command": self.command,
            "sources": list(rule.sources),
        }


def finding(code: str, *evidence: str, target: Target, severity: str = "", module: str = "", name: str = "") -> Finding:
    """A finding of a rule, with its command for ``target``; ``severity`` where it is not the rule's."""
    rule = load()[code]
    # A log's library may be anyone's; what a probe looks at is ours.
    about = "" if module else " ".join(evidence)
    return Finding(code, evidence, severity or rule.severity, target.command(rule, name, about), module)


def ordered(found: Iterable[Finding]) -> list[Finding]:
    """Merged by code, the most probable cause first; what another one explains and hints without an error left out."""
    merged: dict[str, Finding] = {}
    for one in found:
        known = merged.get(one.code)
        if known is None:
            merged[one.code] = one
        else:
            severity = min(known.severity, one.severity, key=_SEVERITIES.index)
            evidence = tuple(dict.fromkeys(known.evidence + one.evidence))
            merged[one.code] = Finding(one.code, evidence, severity, known.command, known.module)
    kept = [one for one in merged.values() if not any(code in merged for code in one.rule.yields_to)]
    if not any(one.severity == "error" for one in kept):
        kept = [one for one in kept if one.severity != "hint"]
    return sorted(kept, key=lambda one: (_SEVERITIES.index(one.severity), one.rule.rank))


_SEVERITIES = ("error", "warning", "hint")
