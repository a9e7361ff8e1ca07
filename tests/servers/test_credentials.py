"""Credentials: found where they belong, never shown."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from lab import environment

from ssm_forge.base import credentials
from ssm_forge.base.credentials import find, for_engine, redact
from ssm_forge.base.errors import UsageError
from ssm_forge.base.ui import open_log


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@h/x", "https://********@h/x"),
        ("see https://secret@h/x.", "see https://********@h/x."),
        ("https://h/t/secret/linux-64/repodata.json", "https://h/t/********/linux-64/repodata.json"),
        ("https://h/conda/t/secret", "https://h/conda/t/********"),
        ("'https://h/t/secret' and quetz://h/t/other/x", "'https://h/t/********' and quetz://h/t/********/x"),
        ("GET /t/secret/linux-64/repodata.json", "GET /t/********/linux-64/repodata.json"),
        ("https://h/x?X-Amz-Signature=secret&a=b", "https://h/x?X-Amz-Signature=********&a=b"),
        ("https://h/x?access_token=secret", "https://h/x?access_token=********"),
        ("Authorization: Bearer secret-secret", "Authorization: Bearer ********"),
        ("authorization: Basic c2VjcmV0OnNlY3JldA==", "authorization: Basic ********"),
        ("{'Authorization': 'Bearer secret-secret'}", "{'Authorization': 'Bearer ********'}"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://h/x/linux-64/a-1.0-0.conda",
        "unexpected token 'something'",
        "user@host:/path",
        "key=value",
        "Installed into /data/t/venv",
        "/t/venv is not a conda environment",
        "file:///data/t/channel/linux-64/a-1.0-0.conda",
        "/data/t/channel/linux-64",
        "see https://h/x and /data/t/venv",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("channel", ["/data/t/channel", "/t/channel", "file:///data/t/channel", "https://h/x"])
def test_a_folder_t_is_no_secret(channel: str) -> None:
    assert credentials.require_clean(channel) == channel


def test_places_are_asked_in_the_engines_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine lab.example login me password from-netrc\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    found = find("https://lab.example/x")
    assert found is not None
    assert (found.kind, found.username, found.secret) == ("basic", "me", "from-netrc")

    default = Path.home() / ".rattler" / "credentials.json"
    default.parent.mkdir()
    default.write_text(json.dumps({"*.example": {"CondaToken": "from-default"}}))
    found = find("https://lab.example/x")
    assert found is not None
    assert (found.kind, found.secret) == ("conda", "from-default")

    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"lab.example": {"BearerToken": "from-auth-file"}}))
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(auth))
    found = find("https://lab.example/x")
    assert found is not None
    assert found.header == "Bearer from-auth-file"

    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", "other.example=x lab.example=from-environment")
    found = find("https://lab.example/x")
    assert found is not None
    assert found.secret == "from-environment"


def test_the_keyring_is_asked_as_the_engine_stores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import keyring

    stored = {("rattler", "lab.example"): json.dumps({"BearerToken": "from-keyring"})}
    monkeypatch.setattr(keyring, "get_password", lambda service, user: stored.get((service, user)))
    found = find("https://lab.example/x")
    assert found is not None
    assert (found.secret, found.source) == ("from-keyring", "the keyring")


def test_a_token_is_shown_to_its_own_host_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", "lab.example=secret")
    assert find("https://lab.example.evil.org/x") is None
    assert find("file:///lab.example") is None


def test_a_token_without_a_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", "secret")
    with pytest.raises(UsageError, match="must be HOST=TOKEN") as caught:
        find("https://lab.example")
    assert "secret" not in str(caught.value)


def test_an_address_of_ipv6_is_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", "::1=secret")
    found = find("http://[::1]:8400/linux-64")
    assert found is not None and found.secret == "secret"


@pytest.mark.parametrize("address", ["[::1]:8400", "[::1"])
def test_an_address_with_brackets_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", f"{address}=secret")
    with pytest.raises(UsageError, match="belongs to a host"):
        find("http://[::1]:8400")


@pytest.mark.parametrize("host", ["lab.example:8400", "https://lab.example:8400", "https://lab.example/conda"])
def test_a_token_for_more_than_a_host_is_refused_instead_of_never_shown(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", f"{host}=secret")
    with pytest.raises(UsageError, match="belongs to a host") as caught:
        find("https://lab.example:8400")
    assert "SSM_FORGE_CHANNEL_TOKEN=lab.example=TOKEN" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_secret_is_not_part_of_a_representation() -> None:
    assert "hunter2" not in repr(credentials.Credential("me", "hunter2", "basic", "netrc"))


def test_broken_files_are_named_without_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine lab.example login me passw0rd hunter2\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with pytest.raises(UsageError) as caught:
        find("https://lab.example")
    assert "hunter2" not in str(caught.value)
    assert "passw0rd" not in str(caught.value)
    auth = tmp_path / "auth.json"
    auth.write_text("hunter2")
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(auth))
    with pytest.raises(UsageError, match="is not a JSON object") as caught:
        find("https://lab.example")
    assert "hunter2" not in str(caught.value)


def test_the_engine_gets_environment_tokens_in_a_private_file_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"a.example": {"BearerToken": "old"}}))
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(auth))
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", "b.example=new")
    with for_engine():
        given = Path(os.environ["RATTLER_AUTH_FILE"])
        assert stat.S_IMODE(given.stat().st_mode) == 0o600
        assert json.loads(given.read_text()) == {
            "a.example": {"BearerToken": "old"},
            "b.example": {"BearerToken": "new"},
        }
    assert not given.exists()
    assert os.environ["RATTLER_AUTH_FILE"] == str(auth)


RESTART = """
import importlib.util, os, signal, sys
from pathlib import Path
from ssm_forge.base import paths, own_tools as toolbox
from ssm_forge.base.credentials import for_engine
toolbox.workspace = lambda: paths.Workspace(Path(sys.argv[1]), Path(sys.argv[1]))
with for_engine(), for_engine():
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    toolbox.require("a_library_that_nobody_has")
"""


@pytest.mark.parametrize("end", ["replaced", "killed"])
def test_no_token_outlives_a_process_that_is_replaced_or_killed(tmp_path: Path, end: str) -> None:
    run = tmp_path / "run"
    run.write_text('#!/bin/sh\necho "$RATTLER_AUTH_FILE"\nls -l /proc/$$/fd\n')
    run.chmod(0o755)
    (tmp_path / "auth.json").write_text("{}")
    (tmp_path / "tmp").mkdir()
    kept = environment(
        tmp_path,
        TMPDIR=str(tmp_path / "tmp"),
        SSM_FORGE_CHANNEL_TOKEN="lab.example=hunter2",
        RATTLER_AUTH_FILE=str(tmp_path / "auth.json"),
    )
    kept.pop("SSM_FORGE_NO_PIXI", None)
    done = subprocess.run(
        [sys.executable, "-c", RESTART, str(tmp_path), end], capture_output=True, text=True, env=kept, check=False
    )
    assert done.returncode == (0 if end == "replaced" else -9), done.stderr
    if end == "replaced":
        assert done.stdout.splitlines()[0] == str(tmp_path / "auth.json")
        assert "ssm-forge-auth" not in done.stdout
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and "hunter2" in path.read_text(errors="replace")
    ]


def test_children_of_the_engine_know_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", "lab.example=hunter2")
    with for_engine():
        read = 'cat "$RATTLER_AUTH_FILE"'
        shown = subprocess.run(["sh", "-c", read], capture_output=True, text=True, check=True).stdout
    assert json.loads(shown) == {"lab.example": {"BearerToken": "hunter2"}}


def test_logs_take_no_secret(tmp_path: Path) -> None:
    with open_log(tmp_path, "x") as log:
        log("downloading https://me:hunter2@h/x and /t/hunter2/linux-64")
    assert "hunter2" not in log.path.read_text()


@pytest.mark.parametrize("task", [("publish", "x.conda", "--to"), ("channel", "check")])
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(tmp_path: Path, task: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "ssm_forge", *task, "https://me:hunter2@127.0.0.1:9/x"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), check=False)
    assert done.returncode == 2
    assert "holds a secret" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
