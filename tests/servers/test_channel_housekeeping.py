"""check, prune, mirror, coverage."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from lab import Lab, check_folder, make_package

from ssm_forge.channel import prune

pytest.importorskip("cryptography", reason="cryptography is not in this environment; the tools of ./run have it")

from ssm_forge.base.errors import IntegrityError, UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.channel import check as channel_check
from ssm_forge.channel import coverage, mirror
from ssm_forge.channel import folder as channels
from ssm_forge.channel import statement as trust
from ssm_forge.channel.index import DamagedIndexError
from ssm_forge.channel.source import open_source
from ssm_forge.manifest import variants
from ssm_forge.publish.send import publish

NAME = "tool-1.0-h1_0.conda"


@pytest.fixture
def channel(tmp_path: Path) -> Path:
    """Two packages, one of them signed."""
    key, _ = trust.make_key(tmp_path / "keys", "lab")
    folder = tmp_path / "channel"
    publish([make_package(tmp_path / "made", "base")], str(folder))
    publish([make_package(tmp_path / "made", provenance=True)], str(folder), statements=trust.writer(key, ()))
    return folder


def problems(url: str | Path) -> dict[str, str]:
    found, _ = channel_check.check(open_source(str(url)))
    return {problem.file: problem.kind for problem in found}


def ignore(line: str) -> None:
    """A log that nobody reads."""


def test_a_whole_channel_has_no_problems(channel: Path) -> None:
    found, count = channel_check.check(open_source(str(channel)))
    assert (found, count) == ([], 2)


def test_check_over_http(lab: Lab, tmp_path: Path) -> None:
    publish([make_package(tmp_path / "made")], lab.url)
    assert problems(lab.url) == {}
    (lab.channel / "linux-64" / NAME).write_bytes(b"changed")
    assert problems(lab.url) == {f"linux-64/{NAME}": "changed"}
    (lab.channel / "linux-64" / NAME).unlink()
    assert problems(lab.url) == {f"linux-64/{NAME}": "missing"}


def test_each_kind_of_damage_is_found(channel: Path, tmp_path: Path) -> None:
    folder = channel / "linux-64"
    (folder / "base-1.0-h1_0.conda").unlink()
    data = bytearray((folder / NAME).read_bytes())
    data[-1] ^= 1
    (folder / NAME).write_bytes(bytes(data))
    make_package(folder, "unlisted")
    (folder / "gone-1.0-0.conda.sigs").write_text("[]")
    (folder / "link-1.0-0.conda").symlink_to("/etc/passwd")
    (channel / ".uploads" / ("0" * 64 + ".part")).write_bytes(b"half")
    (folder / "repodata.json.zst").write_bytes(b"broken")
    next(iter(folder.glob("shards/*"))).write_bytes(b"broken")
    for sidecar in folder.glob(f"{NAME}.sigs.*"):
        sidecar.write_text("[]")
    found, _ = channel_check.check(open_source(str(channel)))
    assert {(p.kind, p.file) for p in found} == {
        ("missing", "linux-64/base-1.0-h1_0.conda"),
        ("changed", f"linux-64/{NAME}"),
        ("statement", f"linux-64/{NAME}"),
        ("orphan", "linux-64/unlisted-1.0-h1_0.conda"),
        ("orphan", "linux-64/gone-1.0-0.conda.sigs"),
        ("orphan", "linux-64/link-1.0-0.conda"),
        ("leftover", f".uploads/{'0' * 64}.part"),
        ("index", "linux-64/repodata.json.zst"),
        ("index", "linux-64/repodata_shards.msgpack.zst"),
    }


def test_repair_lists_what_is_there(channel: Path) -> None:
    (channel / "linux-64" / "base-1.0-h1_0.conda").unlink()
    make_package(channel / "linux-64", "unlisted")
    assert problems(channel)
    channel_check.repair(channel)
    assert problems(channel) == {}
    assert check_folder(channel) == {NAME, "unlisted-1.0-h1_0.conda"}


def fill(folder: Path) -> None:
    """Three builds of a tool for one variant, one for another, and a package that needs the oldest."""
    for version, build in (("1.0", "py312_h0123abc_0"), ("1.0", "py312_h0123abd_1"), ("2.0", "py312_h0123abe_0")):
        make_package(folder / "linux-64", version=version, build=build)
    make_package(folder / "linux-64", build="py313_h0123abc_0")
    channels.index(folder)


def test_prune_keeps_the_newest_of_each_variant(tmp_path: Path) -> None:
    fill(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    planned = prune.prune(tmp_path, keep=1, dry_run=True)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} - before <= {tmp_path / ".lock"}
    done = prune.prune(tmp_path, keep=1, dry_run=False)
    assert done.packages == planned.packages
    assert set(done.packages) == {
        "linux-64/tool-1.0-py312_h0123abc_0.conda",
        "linux-64/tool-1.0-py312_h0123abd_1.conda",
    }
    assert check_folder(tmp_path) == {"tool-2.0-py312_h0123abe_0.conda", "tool-1.0-py313_h0123abc_0.conda"}
    assert problems(tmp_path) == {}
    assert prune.prune(tmp_path, keep=1, dry_run=False).packages == ()


def test_prune_keeps_more_when_asked_and_what_others_need(tmp_path: Path) -> None:
    fill(tmp_path)
    kept = prune.prune(tmp_path, keep=2, dry_run=True)
    assert kept.packages == ("linux-64/tool-1.0-py312_h0123abc_0.conda",)
    make_package(tmp_path / "linux-64", "user", depends=("tool ==1.0",))
    fill_without_py313 = tmp_path / "linux-64" / "tool-1.0-py313_h0123abc_0.conda"
    fill_without_py313.unlink()
    channels.index(tmp_path)
    prune.prune(tmp_path, keep=1, dry_run=False)
    assert any(name.startswith("tool-1.0-") for name in check_folder(tmp_path))


@pytest.mark.parametrize("who", ["a server", "a mirror"])
def test_what_is_still_being_received_is_left_alone(request: pytest.FixtureRequest, tmp_path: Path, who: str) -> None:
    if who == "a server":
        lab: Lab = request.getfixturevalue("lab")
        channel, running = lab.channel, None
    else:
        channel = tmp_path / "copy"
        running = channels.receiving(channel)
    channels.ensure_indexed(channel)
    fresh, forgotten = (channel / ".uploads" / f"{digit * 64}.part" for digit in "01")
    for part in (fresh, forgotten):
        part.write_bytes(b"half")
    os.utime(forgotten, (time.time() - 8 * 86_400,) * 2)
    assert problems(channel) == {f".uploads/{forgotten.name}": "leftover"}
    assert prune.prune(channel, keep=1, dry_run=True).other == (f".uploads/{forgotten.name}",)
    channel_check.repair(channel)
    prune.prune(channel, keep=1, dry_run=False)
    assert fresh.exists()
    assert not forgotten.exists()
    if running is not None:
        running.close()
        channel_check.repair(channel)
        assert not fresh.exists()


def test_prune_takes_away_what_no_index_names(channel: Path) -> None:
    (channel / ".uploads" / ("0" * 64 + ".part")).write_bytes(b"half")
    (channel / "linux-64" / "gone-1.0-0.conda.sigs").write_text("[]")
    (channel / "linux-64" / "shards" / ("0" * 64 + ".msgpack.zst")).write_bytes(b"old")
    done = prune.prune(channel, keep=1, dry_run=False)
    assert done.packages == ()
    assert len(done.other) >= 3
    assert problems(channel) == {}


@pytest.mark.parametrize("kind", ["folder", "server"])
def test_a_mirror_is_a_whole_channel(request: pytest.FixtureRequest, channel: Path, tmp_path: Path, kind: str) -> None:
    source = str(channel)
    if kind == "server":
        lab: Lab = request.getfixturevalue("lab")
        source = lab.url
        key = tmp_path / "keys" / "lab.key"
        publish([make_package(tmp_path / "made", "base")], source)
        publish([channel / "linux-64" / NAME], source, statements=trust.writer(key, ()))
    target = tmp_path / "copy"
    assert mirror.mirror(open_source(source), target, log=ignore) == (2, 0)
    assert mirror.mirror(open_source(source), target, log=ignore) == (0, 2)
    assert problems(target) == {}
    assert channels.records(target)[NAME].attestations_sha256
    only = tmp_path / "some"
    assert mirror.mirror(open_source(source), only, only=("tool-*",), log=ignore) == (1, 0)
    assert check_folder(only) == {NAME}


def test_a_mirror_goes_on_where_it_was(lab: Lab, tmp_path: Path) -> None:
    package = make_package(tmp_path / "made", size=500_000)
    sha256 = publish([package], lab.url)[0].sha256
    part = tmp_path / "copy" / ".uploads" / f"{sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(package.read_bytes()[:300_000])
    assert mirror.mirror(open_source(lab.url), tmp_path / "copy", log=ignore) == (1, 0)
    assert problems(tmp_path / "copy") == {}


def test_a_mirror_takes_no_changed_package_and_replaces_none(channel: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    make_package(target / "linux-64", text="mine\n")
    with pytest.raises(IntegrityError, match="different file under the name tool"):
        mirror.mirror(open_source(str(channel)), target, only=("tool-*",), log=ignore)
    stored = channel / "linux-64" / "base-1.0-h1_0.conda"
    stored.write_bytes(stored.read_bytes() + b"x")
    with pytest.raises(IntegrityError, match="but is listed with"):
        mirror.mirror(open_source(str(channel)), tmp_path / "other", log=ignore)
    assert not list((tmp_path / "other").rglob("base*"))


def test_what_is_no_channel_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a conda channel"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match="neither a folder nor"):
        open_source("gopher://x")


BUILD = "cuda130_py312_sm80_sm90ptx_h1234abc_0"


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    matrix = variants.load(workspace().variants)
    version = next(v for v in matrix.variants if v.name == "cu130").projects["mamba-ssm"]
    for name, number in (("mamba-ssm", version), ("mamba-ssm", "1.0"), ("unrelated", "1.0")):
        make_package(tmp_path / "linux-64", name, version=number, build=BUILD, depends=("pytorch 2.11.* *cuda*",))
    channels.index(tmp_path)
    return tmp_path


def test_coverage_shows_what_exists_and_what_is_missing(ours: Path) -> None:
    table = coverage.rows(coverage.items(open_source(str(ours))), variants.load(workspace().variants))
    mine = [row for row in table if row.project == "mamba-ssm" and (row.cuda, row.torch) == ("13.0", "2.11")]
    assert [row.variant for row in mine] == ["cu130", "(earlier)"]
    (item,) = mine[0].cells["3.12"]
    assert (item.archs, item.signed) == ("8.0;9.0+PTX", False)
    told = coverage.as_dicts(table)
    row = next(r for r in told if r["variant"] == "cu130" and r["torch"] == "2.11" and r["project"] == "mamba-ssm")
    assert "3.12" not in row["missing"]
    assert "3.13" in row["missing"]
    assert not any("unrelated" in json.dumps(r) for r in told)


def test_coverage_tells_upstreams_kernels_from_ours(ours: Path) -> None:
    matrix = variants.load(workspace().variants)
    version = next(v for v in matrix.variants if v.name == "cu130").projects["mamba-ssm"]
    build, depends = f"upstream_{BUILD}", ("pytorch 2.11.* *cuda*",)
    make_package(ours / "linux-64", "mamba-ssm", version=version, build=build, depends=depends)
    channels.index(ours)
    found = coverage.items(open_source(str(ours)))
    assert sorted(item.label for item in found if item.version == version) == ["8.0;9.0+PTX", "8.0;9.0+PTX upstream"]


class Page(HTMLParser):
    """Reads a page, and fails on a tag that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_escaped_and_needs_nothing_else(ours: Path) -> None:
    table = coverage.rows(coverage.items(open_source(str(ours))), variants.load(workspace().variants))
    target = ours / "page" / "coverage.html"
    coverage.write_page(table, "https://h.example/<script>", target)
    page = Page()
    page.feed(target.read_text())
    assert page.open == []
    assert page.links == []
    text = " ".join(" ".join(page.text).split())
    assert "8.0 9.0+PTX" in text
    assert "not built" in text
    assert "<script>" not in target.read_text()


@pytest.mark.parametrize("channel", ["https://conda.lab.example:8400", "/data/my lab's channel", "/data/a&b <c>"])
def test_the_commands_on_the_page_can_be_pasted_into_a_shell(channel: str) -> None:
    page = html.unescape(coverage.page([], channel))
    commands = [shlex.split(text) for text in re.findall(r"<code>((?:pixi|conda) .*?)</code>", page, re.S)]
    assert ["pixi", "workspace", "channel", "add", "--prepend", channel] in commands
    assert ["conda", "install", "-c", channel, "mamba-ssm"] in commands
    # It was called "project" until pixi 0.41, and says so each time.
    assert not any("project" in command for command in commands)


def test_the_advice_for_a_damaged_index_can_be_pasted_too(tmp_path: Path) -> None:
    folder = tmp_path / "my lab's"
    (folder / "linux-64").mkdir(parents=True)
    (folder / "linux-64" / "repodata.json").write_text("{")
    with pytest.raises(DamagedIndexError) as caught:
        channels.records(folder)
    (command,) = re.findall(r"'(\S+ channel check --repair .*)' makes the index anew", caught.value.fix)
    assert shlex.split(command)[-1] == str(folder)
