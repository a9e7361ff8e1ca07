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
        """The rule's command with the environment's own paths.

        Args:
            name: of the package that the rule is about, where it is about one.
            evidence: what was found; the library that it names may be of another project.
        """
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
        """The rule with this code."""
        return load()[self.code]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
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
    """A finding of the rule with this code, with its command for ``target``.

    Args:
        severity: where it is not the rule's.
        module: as in :class:`Finding`.
        name: of the package that the command is about.
    """
    rule = load()[code]
    # A log's library may be anyone's; what a probe looks at is ours.
    about = "" if module else " ".join(evidence)
    return Finding(code, evidence, severity or rule.severity, target.command(rule, name, about), module)


def ordered(entries: Iterable[Finding]) -> list[Finding]:
    """Findings merged by code, the most probable cause first.

    What another one explains is left out, and so are hints where there is no error.
    """
    merged: dict[str, Finding] = {}
    for entry in entries:
        earlier = merged.get(entry.code)
        if earlier is None:
            merged[entry.code] = entry
        else:
            severity = min(earlier.severity, entry.severity, key=_SEVERITIES.index)
            evidence = tuple(dict.fromkeys(earlier.evidence + entry.evidence))
            merged[entry.code] = Finding(entry.code, evidence, severity, earlier.command, earlier.module)
    kept = [entry for entry in merged.values() if not any(code in merged for code in entry.rule.yields_to)]
    if not any(entry.severity == "error" for entry in kept):
        kept = [entry for entry in kept if entry.severity != "hint"]
    return sorted(kept, key=lambda entry: (_SEVERITIES.index(entry.severity), entry.rule.rank))


_SEVERITIES = ("error", "warning", "hint")
