"""Publishing to a folder and to our own server: the same rules in both places."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from lab import Lab, check_folder, make_package, read_channel

from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.publish import send as publishing
from ssm_forge.publish import target
from ssm_forge.publish.send import publish


@pytest.fixture(params=["folder", "server"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """An URL to publish to, and the folder that the packages end up in."""
    if request.param == "folder":
        return str(tmp_path / "lab"), tmp_path / "lab"
    lab: Lab = request.getfixturevalue("lab")
    return lab.url, lab.channel


def test_published_packages_are_listed_and_intact(place: tuple[str, Path], tmp_path: Path) -> None:
    url, channel = place
    files = [make_package(tmp_path / "made", name) for name in ("one", "two")]
    assert [item.outcome for item in publish(files, url)] == ["added", "added"]
    assert check_folder(channel) == {path.name for path in files}


def test_publishing_again_changes_nothing(place: tuple[str, Path], tmp_path: Path) -> None:
    url, channel = place
    file = make_package(tmp_path / "made")
    publish([file], url)
    before = {path: path.stat().st_mtime_ns for path in channel.rglob("*") if path.is_file()}
    assert publish([file], url)[0].outcome == "was there"
    after = {path: path.stat().st_mtime_ns for path in channel.rglob("*") if path.is_file()}
    assert {p for p in before if before[p] != after.get(p)} <= {channel / ".lock"}


def test_a_different_file_under_the_same_name_is_refused(place: tuple[str, Path], tmp_path: Path) -> None:
    url, channel = place
    first = make_package(tmp_path / "a")
    publish([first], url)
    other = make_package(tmp_path / "b", text="forged\n")
    new = make_package(tmp_path / "b", "unrelated")
    with pytest.raises(IntegrityError, match=r"different file under the name tool-1.0-h1_0.conda.*not replaced"):
        publish([new, other], url)
    assert check_folder(channel) == {first.name}
    assert (channel / "linux-64" / first.name).read_bytes() == first.read_bytes()


def test_every_form_of_the_index_is_written(place: tuple[str, Path], tmp_path: Path) -> None:
    url, channel = place
    publish([make_package(tmp_path / "made")], url)
    names = {path.name for path in (channel / "linux-64").iterdir()}
    assert {
        "repodata.json",
        "repodata.json.zst",
        "repodata_shards.msgpack.zst",
        "run_exports.json",
        "shards",
    } <= names
    exports = json.loads((channel / "linux-64" / "run_exports.json").read_text())
    assert exports["packages.conda"] == {"tool-1.0-h1_0.conda": {"run_exports": {}}}


def test_a_file_left_unindexed_by_a_killed_run_is_listed_by_the_next(place: tuple[str, Path], tmp_path: Path) -> None:
    url, channel = place
    file = make_package(tmp_path / "made")
    (channel / "linux-64").mkdir(parents=True, exist_ok=True)
    (channel / "linux-64" / file.name).write_bytes(file.read_bytes())
    assert publish([file], url)[0].outcome == "was there"
    assert check_folder(channel) == {file.name}


def test_an_upload_that_was_cut_goes_on_where_it_was(lab: Lab, tmp_path: Path) -> None:
    file = make_package(tmp_path / "made", size=3_000_000)
    sha256 = publishing.inspect(file).sha256
    part = lab.channel / ".uploads" / f"{sha256}.part"
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(file.read_bytes()[:2_000_000])
    sent: list[int] = []
    original = publishing.target(lab.url)
    parcel = target.Parcel(publishing.inspect(file))
    assert original.upload(parcel, sent.append) == "added"
    assert sent[0] == 2_000_000  # Counted as done at once; the rest is what was sent.
    assert sum(sent) == file.stat().st_size
    assert read_channel(lab.url, lab.read) == {file.name: sha256}
    assert not part.exists()


def test_an_upload_that_arrived_whole_but_unchecked_is_taken(lab: Lab, tmp_path: Path) -> None:
    file = make_package(tmp_path / "made", size=100_000)
    sha256 = publishing.inspect(file).sha256
    part = lab.channel / ".uploads" / f"{sha256}.part"
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(file.read_bytes())
    publish([file], lab.url)
    assert check_folder(lab.channel) == {file.name}


def test_a_server_that_is_away_for_a_moment_is_waited_for(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_package(tmp_path / "made")
    stream, failures = httpx.Client.stream, [httpx.ConnectError("refused"), httpx.ReadError("reset")]

    def flaky(self: httpx.Client, method: str, *args: object, **options: object) -> object:
        if method == "PUT" and failures:
            raise failures.pop()
        return stream(self, method, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(httpx.Client, "stream", flaky)
    monkeypatch.setattr("ssm_forge.base.web.time.sleep", lambda seconds: None)
    lines: list[str] = []
    assert publish([file], lab.url, log=lines.append)[0].outcome == "added"
    assert [line[:14] for line in lines[:2]] == ["attempt 1 of 5", "attempt 2 of 5"]


def test_a_server_that_stays_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_forge.base.web.time.sleep", lambda seconds: None)
    with pytest.raises(NetworkError, match=r"127.0.0.1:9/ could not be reached.*goes on where it was"):
        publish([make_package(tmp_path)], "http://127.0.0.1:9")


@pytest.mark.parametrize("url", ["http://user:secret@127.0.0.1/x", "https://h/t/secret/x", "https://h/x?token=secret"])
def test_a_secret_in_an_url_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        publish([make_package(tmp_path)], url)
    assert "secret@" not in str(caught.value)
    assert "/secret" not in str(caught.value)
    assert "=secret" not in str(caught.value)


def test_something_that_is_no_channel_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no channel that can be published to"):
        publish([make_package(tmp_path)], "ftp://example.org/x")


def test_packages_are_chosen_by_file_and_by_name(tmp_path: Path) -> None:
    channel = tmp_path / "channel"
    one, two = (make_package(channel / "linux-64", name) for name in ("one", "two"))
    assert publishing.select((), channel) == [one, two]
    assert publishing.select(("two", str(one)), channel) == [two, one]
    with pytest.raises(UsageError, match="'three' is neither"):
        publishing.select(("three",), channel)
