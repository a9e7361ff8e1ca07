"""Starts the kernel checks and benchmarks inside an installed environment, and shows what they say.

The work itself is done by :mod:`ssm_forge.kernels`, in the environment's own Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.text import Text

from ssm_forge.base.activation import activated_environment
from ssm_forge.base.errors import InstallError, UsageError, VerifyError
from ssm_forge.base.fetch import checked, fetch_all
from ssm_forge.base.folders import give_place
from ssm_forge.base.paths import Workspace, launcher, workspace
from ssm_forge.base.tables import FoldingTable
from ssm_forge.base.ui import human_bytes, open_log, out, say
from ssm_forge.manifest import recipe, sdists
from ssm_forge.package import installed as package_installed

Document = dict[str, Any]

COLOURS = {"pass": "green", "fail": "red", "not-run": "yellow"}
PYTEST = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
_ENDED_WELL = (0, 3, 9)


@dataclass(frozen=True)
class Place:
    """An environment that the checks run in.

    Attributes:
        variables: of a shell in which it is activated.
        versions: our projects in it -> version.
        has_pytest: whether upstream's tests can be run with what is there.
    """

    prefix: Path
    python: Path
    variables: Mapping[str, str]
    versions: Mapping[str, str]
    has_pytest: bool


def of_conda(prefix: Path) -> Place:
    """The place of a conda environment: its Python, variables and packages.

    Raises:
        InstallError: when the environment has no Python, or can't be activated.
    """
    python = prefix / "bin/python"
    if not python.exists():
        raise InstallError(f"{prefix} has no Python.", fix=f"Run '{launcher()} install-mamba' first.")
    records = package_installed.records(prefix)
    versions = {project: records[project].version for project in recipe.PROJECTS if project in records}
    has_pytest = any(prefix.glob("lib/python*/site-packages/pytest"))
    return Place(prefix, python, activated_environment(prefix), versions, has_pytest)


def kernels(place: Place, command: str, arguments: Sequence[str] = (), *, python_path: Sequence[Path] = ()) -> Document:
    """Run ``python -m ssm_forge.kernels COMMAND`` in an environment.

    Its messages are shown as they come, and kept in a log.

    Args:
        python_path: more folders to import from.

    Returns:
        Its JSON document; ``checks`` holds name, status and detail of each check.

    Raises:
        VerifyError: when it ended without a document (a crash), with the log.
    """
    own = [path for path in (place.variables.get("PYTHONPATH"),) if path]
    folders = os.pathsep.join(map(str, [workspace().root / "scripts", *python_path, *own]))
    environment = {**place.variables, "PYTHONPATH": folders}
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_log(workspace().logs, f"kernels-{command}") as log,
    ):
        answer = Path(scratch) / "answer.json"
        line = [str(place.python), "-m", "ssm_forge.kernels", command, *arguments, "--output", str(answer)]
        log(" ".join(line))
        process = subprocess.Popen(
            line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=scratch
        )
        last = ""
        assert process.stderr is not None
        for message in process.stderr:
            last = message.rstrip() or last
            log(message)
            say(Text(last, "dim"))
        code = process.wait()
        if code not in _ENDED_WELL or not answer.is_file():
            msg = f"'kernels {command}' ended with status {code} and no result: {last or 'no message'}."
            raise VerifyError(msg, log=log.path)
        document: Document = json.loads(answer.read_text(encoding="utf-8"))
        say(f"Everything it said is in {log.path}.")
    return document


def full(place: Place) -> Document:
    """Every mode of both kernels, the blocks, and generation, against the references."""
    return kernels(place, "check", ["--full"])


def sanitize(place: Place) -> Document:
    """compute-sanitizer over the kernels."""
    return kernels(place, "sanitize")


def lend_pytest(workspace: Workspace) -> Path:
    """A folder with the tools' own pytest, for an environment that has none; all of it is plain Python."""
    versions = "-".join(f"{name}-{metadata.version(name)}" for name in PYTEST)
    target = workspace.state / "upstream" / f"pytest-{hashlib.sha256(versions.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        staged = Path(scratch) / "pytest"
        for name in PYTEST:
            for file in metadata.files(name) or ():
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    path = staged / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(Path(str(file.locate())).read_bytes())
        give_place(staged, target)
    return target


def upstream(place: Place) -> Document:
    """Upstream's own tests, of the very versions that are installed.

    Raises:
        InstallError: when one of the packages is not in the environment.
    """
    missing = [project for project in recipe.PROJECTS if project not in place.versions]
    if missing:
        msg = f"{', '.join(missing)} not installed in {place.prefix}."
        raise InstallError(msg, fix=f"Run '{launcher()} install-mamba' first.")
    arguments = []
    for project, folder in upstream_tests(place.versions, workspace()).items():
        arguments += ["--tests", f"{project}={folder}"]
    lent = () if place.has_pytest else (lend_pytest(workspace()),)
    return kernels(place, "upstream", arguments, python_path=lent)


def upstream_tests(versions: Mapping[str, str], workspace: Workspace) -> dict[str, Path]:
    """The ``tests`` folders of the sdists that the recipes name, unpacked.

    Args:
        versions: project -> version.

    Raises:
        UsageError: when no recipe of this checkout has that version.
        NetworkError, IntegrityError: from the download.
    """
    artifacts = {project: sdists.find(project, version, workspace) for project, version in versions.items()}
    fetch_all(list(artifacts.values()), workspace)
    return {
        project: _unpack_tests(checked(artifact, workspace), workspace.state / "upstream" / artifact.sha256[:16])
        for project, artifact in artifacts.items()
    }


def _unpack_tests(archive: Path, folder: Path) -> Path:
    """The regular files under ``NAME-VERSION/tests/`` of an sdist, at ``folder/tests``."""
    target = folder / "tests"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) > 2 and parts[1] == "tests" and ".." not in parts:
                path = Path(scratch, *parts[1:])
                path.parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                assert stream is not None
                path.write_bytes(stream.read())
        if not (Path(scratch) / "tests").is_dir():
            raise UsageError(f"{archive.name} has no tests folder.")
        give_place(Path(scratch) / "tests", target)
    return target


EXTRAS = {"full": full, "upstream": upstream, "sanitize": sanitize}


def extras(place: Place, names: Sequence[str]) -> Document:
    """What ``verify`` does when asked for more: one document for all of it.

    Args:
        names: some of ``full``, ``upstream``, ``sanitize``.

    Returns:
        ``checks`` of all; under ``documents`` each one's own, seed, tolerances and single tests included.
    """
    documents = {name: EXTRAS[name](place) for name in names}
    device = next((d["device"] for d in documents.values() if d["device"]), None)
    checks = [check for d in documents.values() for check in d["checks"]]
    return {"device": device, "checks": checks, "documents": documents}


def exit_code(document: Document, *, allow_missing_gpu: bool) -> int:
    """0 when something passed and nothing failed; 9 on a failure; 3 when nothing could run."""
    statuses = {check["status"] for check in document["checks"]}
    if "fail" in statuses:
        return VerifyError.exit_code
    if "pass" in statuses:
        return 0
    return 0 if allow_missing_gpu and document["device"] is None else 3


def show(document: Document, title: str) -> None:
    """Print a document's checks for people."""
    device = document["device"]
    name = f"{device['name']} ({device['capability']})" if device else "no GPU"
    table = FoldingTable("check", "result", "detail", title=f"{title}: {name}", wraps=["check", "detail"])
    for check in document["checks"]:
        status = check["status"]
        table.add_row(check["name"], Text(status, COLOURS[status]), check["detail"])
    out.print(table)
    if "seed" in document:
        out.print(f"seed {document['seed']}; tolerance: {document['tolerance']}", markup=False)


def show_bench(document: Document) -> None:
    """Print a benchmark's figures for people."""
    if document.get("rows"):
        copy = human_bytes(document["copy_bandwidth"])
        title = f"{document['device']['name']}, copy {copy}/s"
        columns = ("kernel", "direction", "dtype", "size", "time", "bandwidth", "of copy", "speed-up over")
        table = FoldingTable(*columns, title=title)
        for row in document["rows"]:
            shape = f"{row['batch']}x{row['dim']}x{row['length']}, {row['size']}"
            layout = " channel-last" if row["channel_last"] else ""
            faster = ", ".join(f"{way} {times:.1f}" for way, times in row["speedup"].items())
            table.add_row(
                row["kernel"],
                row["direction"],
                row["dtype"],
                f"{shape}{layout}",
                f"{row['seconds'] * 1e6:.1f} us",
                f"{human_bytes(row['bandwidth'])}/s",
                f"{row['fraction']:.0%}",
                faster,
            )
        out.print(table)
    for row in document.get("builds", []):
        bits = {True: ", same bits", False: ", other bits", None: ""}[row["same_bits"]]
        out.print(
            f"against {row['other']}: {row['kernel']} {row['direction']} {row['dtype']} "
            f"{row['ratio'] - 1:+.2%} time{bits}",
            markup=False,
        )
    for row in document.get("first_use", []):
        waits = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in row["seconds"].items())
        out.print(f"first use of {row['build']}: {waits} {row['problem']}", markup=False)
    show(document, "bench kernels")
