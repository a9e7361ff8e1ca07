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
    place: Path | None,
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
        place: folder or interpreter of the environment; with a log, the one that its commands are for.
        log: a log to read instead, ``-`` for standard input.
        variables: the user's environment variables.
        folder: the user's working folder.
        report: file to write what can be sent into.
        seconds: time for everything.

    Returns:
        0 where nothing is broken, 9 where something is, 1 for a log with an unknown failure, 2 for what does not exist.
    """
    try:
        told = _examine(place, log, variables, folder, seconds)
    except OSError as error:
        print(
            f"error: {log or place} can't be read ({error.strerror or error}). Name a file, or - for standard input.",
            file=sys.stderr,
        )
        return USAGE
    if network:
        _ask_network(told)
    _print(
        json.dumps(as_dict(told), indent=1, ensure_ascii=False)
        if as_json
        else as_text(told, language or language_of(variables))
    )
    if report is not None:
        try:
            report.write_text(to_send(told, variables), encoding="utf-8")
        except OSError as error:
            print(f"error: {report} can't be written ({error.strerror or error}).", file=sys.stderr)
            return USAGE
        print(f"Report: {without_secrets(str(report))}", file=sys.stderr)
    if any(one.code == "not-an-environment" for one in told.findings):
        return USAGE
    return BROKEN if told.broken else UNKNOWN if told.unknown else HEALTHY


def _examine(
    place: Path | None, log: str | None, variables: Mapping[str, str], folder: Path, seconds: float
) -> Diagnosis:
    if log is None:
        return diagnosis.of_environment((place or Path(sys.executable)).absolute(), variables, folder, seconds=seconds)
    if place is None:
        return diagnosis.of_log(log, Target())
    prefix = place.parent.parent if place.is_file() else place
    python = place if place.is_file() else prefix / "bin/python"
    return diagnosis.of_log(log, Target(prefix, python))


def _ask_network(told: Diagnosis) -> None:
    answers = network.ask()
    told.facts["network"] = answers
    silent = [f"{name}: {answer}" for name, answer in answers.items() if answer != network.ANSWERS]
    if len(silent) == len(answers):
        told.findings = ordered([*told.findings, finding("network-unreachable", *silent, target=Target())])
    else:
        told.notes += [f"does not answer: {text}" for text in silent]


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
