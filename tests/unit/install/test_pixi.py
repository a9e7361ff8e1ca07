"""pixi making its environment: what it is told, what the user sees of it, and what its failures are called."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_forge.base.errors import ForgeError, InstallError, NetworkError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import open_log
from ssm_forge.install import pixi
from ssm_forge.manifest.virtual import virtual_packages

REFUSED = """\
 WARN something
Error:   × Cannot install environment 'cu130'
  ╰─▶ the environment 'cu130' does not support 'linux-64' on this machine.

        - gpu (subdir linux-64): missing virtual packages: __cuda >= 13.0
  help: Mock the missing virtual packages
"""
OFFLINE = """\
Error:   × failed to install pytorch
  ├─▶ failed to download
  ╰─▶ error sending request for url (https://conda.invalid/x.conda)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(pixi, "machine_virtual_packages", virtual_packages)
    return Workspace(tmp_path, tmp_path / "cache")


def make(place: Workspace) -> None:
    with open_log(place.logs, "test") as log:
        pixi.install_environment("cu130", "13.0", place.manifest, log)


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "pixi"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PIXI_EXE", str(program))


def test_it_is_told_the_cuda_of_the_variant_where_no_driver_is(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake(tmp_path, monkeypatch, 'echo "$@ for $CONDA_OVERRIDE_CUDA" >&2')
    make(place)
    said = capfd.readouterr()
    assert said.err == f"install --locked -e cu130 --manifest-path {place.manifest} for 13.0\n"
    assert said.out == ""
    # A driver that is there is told as it is, so that pixi refuses one that is too old.
    monkeypatch.setattr(pixi, "machine_virtual_packages", lambda: virtual_packages(cuda="12.2"))
    make(place)
    assert "for 12.2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("told", "kind", "reason"),
    [
        (
            REFUSED,
            InstallError,
            "Cannot install environment 'cu130'; the environment 'cu130' does not support 'linux-64' on this machine.; "
            "- gpu (subdir linux-64): missing virtual packages: __cuda >= 13.0; "
            "help: Mock the missing virtual packages.",
        ),
        (
            OFFLINE,
            NetworkError,
            "failed to install pytorch; failed to download; "
            "error sending request for url (https://conda.invalid/x.conda).",
        ),
        ("it broke\n", InstallError, "it broke."),
        ("", InstallError, "exit code 3."),
    ],
)
def test_its_failure_is_one_line_with_its_whole_reason(
    told: str, kind: type[ForgeError], reason: str, place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "told").write_text(told)
    fake(tmp_path, monkeypatch, f"cat {tmp_path}/told >&2; exit 3")
    with pytest.raises(pixi.PixiError) as failed:
        make(place)
    error = failed.value.error
    assert type(error) is kind
    assert error.what.endswith(f"{place.manifest}' failed: {reason}")
    assert error.log is not None


def test_in_a_terminal_it_has_a_terminal(place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its progress bars are seen, and the log is free of what moves them."""
    fake(tmp_path, monkeypatch, '[ -t 2 ] && printf "\\e[32mbar\\e[0m\\rdone\\n" >&2')
    code = (
        "from pathlib import Path; from ssm_forge.install import pixi; from ssm_forge.base.paths import Workspace\n"
        "from ssm_forge.base.ui import open_log\n"
        f"place = Workspace(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))\n"
        "with open_log(place.logs, 'test') as log: pixi.install_environment('cu130', '13.0', place.manifest, log)\n"
    )
    terminal, inside = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stderr=inside, check=False)
    os.close(inside)
    assert done.returncode == 0
    assert b"\x1b[32mbar\x1b[0m\rdone" in os.read(terminal, 1 << 16)
    (log,) = place.logs.iterdir()
    assert "] bar\n" in log.read_text()
    assert "\x1b" not in log.read_text()
