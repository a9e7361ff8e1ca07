"""Starting the kernel checks inside an environment: results, crashes, exit codes, what people see."""

from __future__ import annotations

import io
import os
import tarfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

from ssm_forge.base.errors import InstallError, UsageError, VerifyError
from ssm_forge.base.paths import Workspace, workspace
from ssm_forge.verify import gpu


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "activated_environment", lambda prefix: dict(os.environ))
    monkeypatch.setattr(gpu, "workspace", lambda: Workspace(tmp_path / "checkout", tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def _python(prefix: Path, body: str) -> None:
    script = prefix / "bin/python"
    script.write_text("#!/bin/bash\n" + textwrap.dedent(body))
    script.chmod(0o755)


def test_the_document_comes_back_and_messages_go_to_the_log(prefix: Path) -> None:
    _python(
        prefix,
        """
        echo "line for people" >&2
        while [ "$1" != --output ]; do shift; done
        echo '{"checks": [{"name": "a", "status": "pass", "detail": ""}], "device": null}' > "$2"
        """,
    )
    document = gpu.kernels(gpu.of_conda(prefix), "check", ["--full"])
    assert document["checks"][0]["name"] == "a"
    (log,) = gpu.workspace().logs.glob("kernels-check-*.log")
    assert "line for people" in log.read_text()


@pytest.mark.parametrize("body", ["echo boom >&2; exit 1", "echo boom >&2; kill -SEGV $$", "echo boom >&2; exit 0"])
def test_a_crash_is_one_error_with_the_last_line_and_the_log(prefix: Path, body: str) -> None:
    _python(prefix, body)
    with pytest.raises(VerifyError, match=r"no result: boom\..*full log"):
        gpu.kernels(gpu.of_conda(prefix), "check")


def test_an_environment_without_python_is_named(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match="has no Python"):
        gpu.of_conda(tmp_path)


def _document(*statuses: str, device: Any = None) -> dict[str, Any]:
    checks = [{"name": s, "status": s, "detail": ""} for s in statuses]
    return {"checks": checks, "device": device}


@pytest.mark.parametrize(
    ("document", "allow", "code"),
    [
        (_document("pass", "not-run"), False, 0),
        (_document("pass", "fail"), True, 9),
        (_document("not-run"), False, 3),
        (_document("not-run"), True, 0),
        (_document("not-run", device={"name": "a GPU"}), True, 3),
    ],
)
def test_exit_codes(document: dict[str, Any], allow: bool, code: int) -> None:
    assert gpu.exit_code(document, allow_missing_gpu=allow) == code


def test_only_plain_files_under_tests_are_taken_from_an_sdist(tmp_path: Path) -> None:
    archive = tmp_path / "p-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("p-1.0/setup.py", "p-1.0/tests/ops/test_a.py", "p-1.0/tests/../../evil.py"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"pass"))
    found = gpu._unpack_tests(archive, tmp_path / "out")
    assert [p.relative_to(found).as_posix() for p in found.rglob("*") if p.is_file()] == ["ops/test_a.py"]
    assert not list(tmp_path.rglob("evil.py"))


def test_an_unknown_version_has_no_upstream_tests() -> None:
    with pytest.raises(UsageError, match=r"no recipe here builds causal-conv1d 0\.1"):
        gpu.upstream_tests({"causal-conv1d": "0.1"}, workspace())


def test_figures_are_shown_with_their_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.out, "width", 200)
    row = {"kernel": "causal_conv1d", "direction": "forward", "dtype": "bf16", "batch": 8, "dim": 64}
    row |= {"length": 128, "size": 4, "channel_last": False, "seconds": 1e-5, "bandwidth": 2.5e12}
    row |= {"fraction": 0.93, "speedup": {"nn.Conv1d + SiLU": 4.2}}
    versus = {**row, "other": "upstream", "ratio": 1.004, "same_bits": True}
    waits = {"build": "installed", "seconds": {"conv forward": 13.2}, "problem": ""}
    document = _document("pass", device={"name": "a GPU", "capability": "9.0"})
    document |= {"rows": [row], "copy_bandwidth": 3e12, "builds": [versus], "first_use": [waits]}
    gpu.show_bench(document)
    said = " ".join(capsys.readouterr().out.split())
    for text in ("a GPU, copy 3.0 TB/s", "93%", "+0.40% time, same bits", "conv forward 13.2 s"):
        assert text in said
