"""One gate for every installation: what the trust policy does not let in is linked by no task."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from lab import make_package
from rattler import RepoDataRecord

from ssm_forge.install import marker

pytest.importorskip("cryptography", reason="cryptography is not in this environment; the tools of ./run have it")

from ssm_forge.base.errors import IntegrityError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.ui import open_log
from ssm_forge.channel import policy
from ssm_forge.channel import statement as trust
from ssm_forge.install import from_lock, pack
from ssm_forge.install import prefix as install
from ssm_forge.install.downloads import Mirror
from ssm_forge.manifest.environments import Platform
from ssm_forge.manifest.virtual import virtual_packages
from ssm_forge.publish.send import publish
from ssm_forge.solve.lock import LockedEnvironment
from ssm_forge.solve.solver import Request, solve

ROOT = Path(__file__).resolve().parents[2]
CHANNEL = "https://conda.lab.example/"
NAME = "tool-1.0-h1_0.conda"
REFUSED = "comes without a signed statement"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace where a policy is in force for the lab's channel, and for another one that nobody uses."""
    trust.make_key(tmp_path / "keys", "lab")
    tables = [f'[[channel]]\nurl = "{url}"\nkeys = ["lab.pub"]\n' for url in (CHANNEL, "https://other.example")]
    (tmp_path / "keys" / "trust.toml").write_text("".join(tables))
    monkeypatch.setenv(policy.VARIABLE, str(tmp_path / "keys" / "trust.toml"))
    return Workspace(root=tmp_path / "workspace", cache=tmp_path / "cache")


@pytest.fixture
def mirror(place: Workspace, tmp_path: Path) -> Path:
    """A copy of the lab's channel, with nothing signed."""
    publish([make_package(tmp_path / "made", provenance=True)], str(tmp_path / "mirror"))
    return tmp_path / "mirror"


def sign(mirror: Path, tmp_path: Path) -> None:
    key = tmp_path / "keys" / "lab.key"
    assert publish([tmp_path / "made" / NAME], str(mirror), statements=trust.writer(key, ()))[0].statement


def locked(mirror: Path) -> LockedEnvironment:
    found = solve(Request(specs=("tool",), channels=(mirror.as_uri(),)))[0]
    record = RepoDataRecord(found, NAME, f"{CHANNEL}linux-64/{NAME}", CHANNEL)
    return LockedEnvironment("demo", (CHANNEL,), Platform("linux-64", "linux-64", virtual_packages()), (record,))


def test_an_environment_from_a_lock_needs_the_statements_too(place: Workspace, mirror: Path, tmp_path: Path) -> None:
    mirrors = [Mirror(CHANNEL, mirror)]
    with pytest.raises(IntegrityError, match=REFUSED):
        from_lock.create(locked(mirror), tmp_path / "env", mirrors=mirrors, workspace=place)
    assert not (tmp_path / "env").exists()
    sign(mirror, tmp_path)
    from_lock.create(locked(mirror), tmp_path / "env", mirrors=mirrors, workspace=place)
    assert (tmp_path / "env" / "share" / "tool.txt").read_text() == "data\n"


def test_an_archive_brings_the_statements_along(
    place: Workspace, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "demo.tar"
    for signed in (False, True):
        if signed:
            sign(mirror, tmp_path)
        pack.pack(locked(mirror), target, mirrors=[Mirror(CHANNEL, mirror)], workspace=place)
        if not signed:
            with pytest.raises(IntegrityError, match=REFUSED):
                pack.unpack(target, tmp_path / "env", workspace=place)
    pack.unpack(target, tmp_path / "env", workspace=place)
    # What is in the archive is what counts: a statement about another file is none.
    opened = tmp_path / "opened"
    shutil.unpack_archive(target, opened, "tar")
    channel = opened / "ssm-forge-demo" / "channel" / "linux-64"
    for statement in channel.glob("*.sigs*"):
        statement.write_text(statement.read_text().replace("payload", "pay"))
    with pytest.raises(IntegrityError, match=r"no statement signed by lab|is not the one that the index names"):
        pack.unpack(opened / "ssm-forge-demo", tmp_path / "other", workspace=place)
    monkeypatch.delenv(policy.VARIABLE)
    pack.unpack(opened / "ssm-forge-demo", tmp_path / "other", workspace=place)


def test_a_policy_that_is_named_must_be_about_the_lock(place: Workspace, mirror: Path, tmp_path: Path) -> None:
    """The one in force here also holds for other installations, so some of its rules may have nothing to do."""
    sign(mirror, tmp_path)
    assert len(policy.for_channels(None, (CHANNEL,), place)) == 2
    with pytest.raises(UsageError, match=r"other\.example.*no channel in use"):
        policy.for_channels(tmp_path / "keys" / "trust.toml", (CHANNEL,), place)


def test_what_is_solved_and_linked_passes_the_same_gate(place: Workspace, mirror: Path, tmp_path: Path) -> None:
    (tmp_path / "keys" / "trust.toml").write_text(f'[[channel]]\nurl = "{mirror}"\nkeys = ["lab.pub"]\n')
    made = marker.Installed(variant="x", python="3.12", source="conda", packages=(), created=True)

    def link() -> None:
        records = solve(Request(specs=("tool",), channels=(mirror.as_uri(),)))
        with open_log(tmp_path / "logs", "install") as log:
            install.install(records, tmp_path / "env", made, place, log)

    with pytest.raises(IntegrityError, match=REFUSED):
        link()
    assert not (tmp_path / "env").exists()
    sign(mirror, tmp_path)
    link()
    assert (tmp_path / "env" / "share" / "tool.txt").exists()


def test_the_engine_links_nothing_that_was_not_admitted() -> None:
    """Read from the source: who calls the engine's installer takes what the gate let in, and only the gate makes it."""
    code = ROOT / "scripts/ssm_forge"
    texts = {path.relative_to(code).as_posix(): path.read_text() for path in code.rglob("*.py")}
    callers = {
        name: text for name, text in texts.items() if re.search(r"rattler\.install\(|import install\b.*rattler", text)
    }
    assert set(callers) == {"install/from_lock.py", "install/prefix.py"}
    for text in callers.values():
        (start,) = (match.start() for match in re.finditer(r"^def _link\(", text, re.MULTILINE))
        (call,) = (match.start() for match in re.finditer(r"rattler\.install\(\s", text) if match.start() > start)
        assert "admitted: policy.Admitted" in text[start:call].partition(")")[0]
    assert [name for name, text in texts.items() if re.search(r"\bAdmitted\((?!\s*\))", text)] == ["channel/policy.py"]
