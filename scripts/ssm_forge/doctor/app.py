"""One run of doctor: examine, print, and say by the exit code what was found."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ssm_forge.doctor import diagnosis, network
from ssm_forge.doctor.diagnosis import Diagnosis
from ssm_forge.doctor.findings import Target, finding, ordered
from ssm_forge.doctor.report import as_dict, as_text, to_send, without_secrets

# All of it: what the imports have not done by then is said to be open.
WAIT_SECONDS = 4.5

HEALTHY, UNKNOWN, USAGE, BROKEN = 0, 1, 2, 9


def run(
    *,
    location: Path | None,
    log: str | None,
    variables: Mapping[str, str],
    folder: Path,
    as_json: bool = False,
    report: Path | None = None,
    seconds: float = WAIT_SECONDS,
    language: str | None = None,
    network: bool = False,
) -> int:
    """Examine an environment or a log, print what was found, and return the exit code.

    Args:
        location: folder or interpreter of the environment; with a log, the one that its commands are for.
        log: a log to read instead, ``-`` for standard input.
        variables: the user's environment variables.
        folder: the user's working folder.
        as_json: print JSON, not text.
        report: file to write what can be sent into.
        seconds: time for everything.
        language: of the explanations; None for that of ``variables``.
        network: also ask which channels and registries answer.

    Returns:
        0 where nothing is broken, 9 where something is, 1 for a log with an unknown failure, 2 for what does not exist.
    """
    try:
        diagnosed = _examine(location, log, variables, folder, seconds)
    except OSError as error:
        return _refused(
            f"{log or location} can't be read ({error.strerror or error}). Name a file, or - for standard input."
        )
    if network:
        _ask_network(diagnosed)
    _print(
        json.dumps(as_dict(diagnosed), indent=1, ensure_ascii=False)
        if as_json
        else as_text(diagnosed, language or language_of(variables))
    )
    if report is not None:
        try:
            report.write_text(to_send(diagnosed, variables), encoding="utf-8")
        except OSError as error:
            return _refused(f"{report} can't be written ({error.strerror or error}).")
        print(f"Report: {without_secrets(str(report))}", file=sys.stderr)
    if any(entry.code == "not-an-environment" for entry in diagnosed.findings):
        return USAGE
    return BROKEN if diagnosed.broken else UNKNOWN if diagnosed.unknown else HEALTHY


def _refused(message: str) -> int:
    """Say what can't be done; the exit code for that comes out."""
    print(f"error: {message}", file=sys.stderr)
    return USAGE


def _examine(
    location: Path | None, log: str | None, variables: Mapping[str, str], folder: Path, seconds: float
) -> Diagnosis:
    if log is None:
        return diagnosis.of_environment(
            (location or Path(sys.executable)).absolute(), variables, folder, seconds=seconds
        )
    if location is None:
        return diagnosis.of_log(log, Target())
    prefix = location.parent.parent if location.is_file() else location
    python = location if location.is_file() else prefix / "bin/python"
    return diagnosis.of_log(log, Target(prefix, python))


def _ask_network(diagnosed: Diagnosis) -> None:
    answers = network.ask()
    diagnosed.facts["network"] = answers
    silent = [f"{name}: {answer}" for name, answer in answers.items() if answer != network.ANSWERS]
    if len(silent) == len(answers):
        diagnosed.findings = ordered([*diagnosed.findings, finding("network-unreachable", *silent, target=Target())])
    else:
        diagnosed.notes += [f"does not answer: {text}" for text in silent]


def language_of(variables: Mapping[str, str]) -> str:
    """``zh`` for a Chinese locale, else ``en``."""
    locale = variables.get("LC_ALL") or variables.get("LC_MESSAGES") or variables.get("LANG") or ""
    return "zh" if locale.lower().startswith("zh") else "en"


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
