"""A channel with every kind of damage at once: `channel check` names each, repair mends what can be mended."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgpack
import pytest
import zstandard
from lab import check_folder, make_package

pytest.importorskip("cryptography", reason="cryptography is not in this environment; the tools of ./run have it")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ssm_forge.base.foreign import from_zstd
from ssm_forge.channel import check as channel_check
from ssm_forge.channel import folder as channels
from ssm_forge.channel import statement as trust
from ssm_forge.channel.index import run_exports
from ssm_forge.channel.source import open_source
from ssm_forge.package.read import SUBDIRS, inspect
from ssm_forge.package.write import dump_json, json_of, rewrite_info

Found = set[tuple[str, str]]
MAIN = "linux-64"


@dataclass(frozen=True)
class Site:
    """Where a damage is done.

    Attributes:
        folder: the platform's folder of the channel.
        package: one that no other damage touches; its statement is beside it.
        spare: another one, without a statement.
    """

    folder: Path
    package: str
    spare: str

    @property
    def path(self) -> Path:
        return self.folder / self.package

    @property
    def statement(self) -> Path:
        (found,) = self.folder.glob(f"{self.package}.sigs.*")
        return found

    @property
    def index(self) -> Path:
        return self.folder / "repodata.json"

    def replace(self, data: bytes) -> None:
        """Other bytes for the package, in a file of its own: the others may be links to one."""
        self.path.unlink()
        self.path.write_bytes(data)

    def rewrite_index(self, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
        """Change the records, in both JSON forms, which then agree."""
        content = json.loads(self.index.read_text())
        change(content["packages.conda"])
        self.write_index(content)

    def write_index(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.index.write_bytes(data)
        (self.folder / "repodata.json.zst").write_bytes(zstandard.compress(data))

    def shard(self) -> Path:
        """The shard of the package's own name."""
        table = msgpack.unpackb(from_zstd((self.folder / "repodata_shards.msgpack.zst").read_bytes()))
        name = self.package.rsplit("-", 2)[0]
        return self.folder / "shards" / f"{table['shards'][name].hex()}.msgpack.zst"


@dataclass(frozen=True)
class Damage:
    """One kind.

    Attributes:
        where: the platform whose folder is damaged; what makes ``repodata.json`` unreadable needs one of its own.
        do: does it.
        found: what check says: kind and file, where ``{package}`` and ``{spare}`` are the site's.
        lost: whether the package (``package``), its statement (``statement``) or nothing can't be had back.
    """

    where: str
    do: Callable[[Site], object]
    found: tuple[tuple[str, str], ...]
    lost: str = ""


def turn_a_byte(site: Site) -> None:
    data = bytearray(site.path.read_bytes())
    data[len(data) // 2] ^= 1
    site.replace(bytes(data))


def in_place_of(site: Site, make: Callable[[Path], object]) -> None:
    site.path.unlink()
    make(site.path)


def unlisted(name: str, make: Callable[[Path], object]) -> Callable[[Site], object]:
    return lambda site: make(site.folder / name)


def hostile(site: Site) -> None:
    """A package whose bytes are as listed, and which would write outside of the environment."""
    rewrite_info(site.path, site.path, lambda files: {**files, "../evil.txt": b"x"})
    digest, size = hashlib.sha256(site.path.read_bytes()).hexdigest(), site.path.stat().st_size
    site.rewrite_index(lambda told: told[site.package].update(sha256=digest, size=size))


def state_something_else(site: Site) -> None:
    """A statement that the index names, about another package."""
    data = json.dumps([trust.sign({"_type": trust.STATEMENT_TYPE, "subject": []}, _KEY)]).encode()
    site.statement.unlink()
    digest = hashlib.sha256(data).hexdigest()
    for name in (f"{site.package}.sigs", f"{site.package}.sigs.{digest}"):
        (site.folder / name).write_bytes(data)
    site.rewrite_index(lambda told: told[site.package].update(attestations_sha256=digest))


def lose_the_statement(site: Site) -> None:
    site.statement.unlink()
    site.path.with_name(f"{site.package}.sigs").unlink()


def older_index(site: Site) -> None:
    content = json.loads(site.index.read_text())
    content["packages.conda"].pop(site.package)
    (site.folder / "repodata.json.zst").write_bytes(zstandard.compress(json.dumps(content).encode()))


def lying_shard(site: Site) -> None:
    """A shard with another hash for the package, itself named by its true hash."""
    old = site.shard()
    content = msgpack.unpackb(from_zstd(old.read_bytes()))
    content["packages.conda"][site.package]["sha256"] = bytes(32)
    data = zstandard.compress(msgpack.packb(content))
    (site.folder / "shards" / f"{hashlib.sha256(data).hexdigest()}.msgpack.zst").write_bytes(data)
    table = site.folder / "repodata_shards.msgpack.zst"
    plain = from_zstd(table.read_bytes())
    digest = bytes.fromhex(old.name.partition(".")[0])
    table.write_bytes(zstandard.compress(plain.replace(digest, hashlib.sha256(data).digest())))


def other_exports(site: Site) -> None:
    content = json.loads((site.folder / "run_exports.json").read_text())
    content["packages.conda"][site.package] = {"run_exports": {"weak": ["evil"]}}
    (site.folder / "run_exports.json").write_text(json.dumps(content))


def write(name: str, data: bytes) -> Callable[[Site], object]:
    return lambda site: (site.folder / name).write_bytes(data)


def remove(name: str) -> Callable[[Site], object]:
    return lambda site: (site.folder / name).unlink()


REPODATA, PACKED = "repodata.json", "repodata.json.zst"
SHARDS, EXPORTS = "repodata_shards.msgpack.zst", "run_exports.json"
_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
_MISSING = (("missing", "{package}"),)

KINDS = {
    # Packages.
    "a package is missing": Damage(MAIN, lambda s: s.path.unlink(), _MISSING, "package"),
    "a byte of it is another": Damage(MAIN, turn_a_byte, (("changed", "{package}"),), "package"),
    "it is cut": Damage(MAIN, lambda s: s.replace(s.path.read_bytes()[:-100]), (("changed", "{package}"),), "package"),
    "it is empty": Damage(MAIN, lambda s: s.replace(b""), (("changed", "{package}"),), "package"),
    "something follows it": Damage(
        MAIN, lambda s: s.replace(s.path.read_bytes() + b"x"), (("changed", "{package}"),), "package"
    ),
    "another package has its name": Damage(
        MAIN, lambda s: s.replace((s.folder / s.spare).read_bytes()), (("changed", "{package}"),), "package"
    ),
    "a folder has its name": Damage(MAIN, lambda s: in_place_of(s, Path.mkdir), _MISSING, "package"),
    "a link has its name": Damage(
        MAIN, lambda s: in_place_of(s, lambda path: path.symlink_to("/etc/passwd")), _MISSING, "package"
    ),
    "a pipe has its name": Damage(MAIN, lambda s: in_place_of(s, os.mkfifo), _MISSING, "package"),
    "it leads out of the environment": Damage(
        MAIN, hostile, (("package", "{package}"), ("statement", "{package}"), ("index", SHARDS)), "package"
    ),
    "a package is not listed": Damage(
        MAIN, lambda s: make_package(s.folder, "unlisted"), (("orphan", "unlisted-1.0-h1_0.conda"),)
    ),
    "what is no package is called one": Damage(
        MAIN, unlisted("junk-1-0.conda", lambda path: path.write_bytes(b"junk")), (("orphan", "junk-1-0.conda"),)
    ),
    "a package has a name that none may have": Damage(
        MAIN, unlisted("Bad Name.conda", lambda path: path.write_bytes(b"")), (("orphan", "Bad Name.conda"),)
    ),
    "a package is for another platform": Damage(
        MAIN, lambda s: make_package(s.folder, "mac", subdir="osx-64"), (("orphan", "mac-1.0-h1_0.conda"),)
    ),
    "an old package is none": Damage(
        MAIN, unlisted("junk-1-0.tar.bz2", lambda path: path.write_bytes(b"junk")), (("orphan", "junk-1-0.tar.bz2"),)
    ),
    "a link is called a package": Damage(
        MAIN, unlisted("link-1-0.conda", lambda path: path.symlink_to("/etc/passwd")), (("orphan", "link-1-0.conda"),)
    ),
    # Statements.
    "the statement is missing": Damage(MAIN, lambda s: s.statement.unlink(), (("statement", "{package}"),)),
    "the statement is another": Damage(MAIN, lambda s: s.statement.write_text("[]"), (("statement", "{package}"),)),
    "the newest statement is missing": Damage(
        MAIN, lambda s: remove(f"{s.package}.sigs")(s), (("statement", "{package}.sigs"),)
    ),
    "the newest statement is another": Damage(
        MAIN, lambda s: write(f"{s.package}.sigs", b"[{}]")(s), (("statement", "{package}.sigs"),)
    ),
    "all of the statement is missing": Damage(
        MAIN, lose_the_statement, (("statement", "{package}"), ("statement", "{package}.sigs")), "statement"
    ),
    "the statement is about something else": Damage(
        MAIN, state_something_else, (("statement", "{package}"),), "statement"
    ),
    "a statement is about no package": Damage(
        MAIN, write("gone-1-0.conda.sigs", b"[]"), (("orphan", "gone-1-0.conda.sigs"),)
    ),
    "a statement is not listed": Damage(
        MAIN, lambda s: write(f"{s.spare}.sigs", b"[]")(s), (("statement", "{spare}.sigs"),)
    ),
    # An index that can't be read: nothing else can be told of its folder.
    "the index is missing": Damage("osx-64", remove(REPODATA), (("index", REPODATA),)),
    "the index is cut": Damage(
        "win-64", lambda s: s.index.write_text(s.index.read_text()[:-40]), (("index", REPODATA),)
    ),
    "the index is no object": Damage("win-32", write(REPODATA, b"[]"), (("index", REPODATA),)),
    "the index is a link": Damage(
        "linux-32",
        lambda s: (s.index.rename(s.folder / "real.json"), s.index.symlink_to("real.json")),
        (("index", REPODATA),),
    ),
    "the index is a folder": Damage(
        "linux-armv6l", lambda s: (s.index.unlink(), s.index.mkdir()), (("index", REPODATA),)
    ),
    # An index that lies.
    "a record is dropped": Damage(
        "linux-armv7l",
        lambda s: s.rewrite_index(lambda told: told.pop(s.spare)),
        (("orphan", "{spare}"), ("index", SHARDS), ("index", EXPORTS)),
    ),
    "a record is made up": Damage(
        "linux-aarch64",
        lambda s: s.rewrite_index(lambda told: told.update({"no-1-0.conda": {**told[s.spare], "name": "no"}})),
        (("missing", "no-1-0.conda"), ("index", SHARDS), ("index", EXPORTS)),
    ),
    "a record has another hash": Damage(
        "linux-ppc64le",
        lambda s: s.rewrite_index(lambda told: told[s.spare].update(sha256="ab" * 32)),
        (("changed", "{spare}"), ("index", SHARDS)),
    ),
    "a record has other dependencies": Damage(
        "linux-riscv64",
        lambda s: s.rewrite_index(lambda told: told[s.spare].update(depends=["evil"])),
        (("index", "{spare}"), ("index", SHARDS)),
    ),
    "a record has another md5": Damage(
        "linux-s390x",
        lambda s: s.rewrite_index(lambda told: told[s.spare].update(md5="ab" * 16)),
        (("index", SHARDS),),
    ),
    "the index is for another platform": Damage(
        "osx-arm64",
        lambda s: s.write_index({**json.loads(s.index.read_text()), "info": {"subdir": "win-64"}}),
        (("index", REPODATA),),
    ),
    # Its other forms.
    "the packed index is missing": Damage("noarch", remove(PACKED), (("index", PACKED),)),
    "the packed index is none": Damage("win-arm64", write(PACKED, b"broken"), (("index", PACKED),)),
    "the packed index is older": Damage("osx-arm64", older_index, (("index", PACKED),)),
    "the packed index is empty": Damage("linux-s390x", write(PACKED, b""), (("index", PACKED),)),
    "the table of shards is missing": Damage("noarch", remove(SHARDS), (("index", SHARDS),)),
    "the table of shards is none": Damage("win-arm64", write(SHARDS, b"broken"), (("index", SHARDS),)),
    "a shard is missing": Damage("osx-arm64", lambda s: s.shard().unlink(), (("index", SHARDS),)),
    "a shard is another": Damage("linux-riscv64", lambda s: s.shard().write_bytes(b"x"), (("index", SHARDS),)),
    "a shard has another hash": Damage("linux-ppc64le", lying_shard, (("index", SHARDS),)),
    "the run exports are missing": Damage("noarch", remove(EXPORTS), (("index", EXPORTS),)),
    "the run exports are no object": Damage("win-arm64", write(EXPORTS, b"[]"), (("index", EXPORTS),)),
    "the run exports are of others": Damage(
        "linux-s390x", write(EXPORTS, run_exports({"packages.conda": {}})), (("index", EXPORTS),)
    ),
    "the run exports are others": Damage("osx-arm64", other_exports, (("index", EXPORTS),)),
    # What was not finished.
    "a file was not finished": Damage(MAIN, write(".x.conda.part", b"half"), (("leftover", ".x.conda.part"),)),
    "an upload was not finished": Damage(
        MAIN, write(f"../.uploads/{'0' * 64}.part", b"half"), (("leftover", f"../.uploads/{'0' * 64}.part"),)
    ),
    "an upload's lock was left": Damage(
        MAIN, write(f"../.uploads/{'0' * 64}.lock", b""), (("leftover", f"../.uploads/{'0' * 64}.lock"),)
    ),
    "a prune was not finished": Damage(
        MAIN, lambda s: (s.folder.parent / ".prune-1").mkdir(), (("leftover", "../.prune-1"),)
    ),
    "a package was being replaced": Damage(
        MAIN,
        lambda s: (s.folder.parent / channels.PENDING).write_text(s.spare),
        (("leftover", f"../{channels.PENDING}"),),
    ),
}


def state(folder: Path, package: str) -> None:
    """A signed statement beside a package."""
    path = folder / package
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    content = {"_type": trust.STATEMENT_TYPE, "subject": [{"name": package, "digest": {"sha256": sha256}}]}
    data = json.dumps([trust.sign(content, _KEY)]).encode()
    for end in ("", f".{hashlib.sha256(data).hexdigest()}"):
        (folder / f"{package}.sigs{end}").write_bytes(data)


def filled(channel: Path, count: int) -> dict[str, Site]:
    """A channel of ``count`` packages, with two for each kind of damage where it is to be; returns the sites."""
    sites = {}
    first = {subdir: make_package(channel / subdir, "first", subdir=subdir) for subdir in SUBDIRS}

    def more(subdir: str, name: str) -> str:
        """A package made from the first one: a name is all that is new."""
        path = channel / subdir / f"{name}-1.0-h1_0.conda"
        index = {**json_of(_info(first[subdir]), "index.json", first[subdir]), "name": name}
        rewrite_info(first[subdir], path, lambda files: {**files, "info/index.json": dump_json(index)})
        return path.name

    for number, (kind, damage) in enumerate(KINDS.items()):
        package, spare = (more(damage.where, f"{word}{number}") for word in ("signed", "spare"))
        state(channel / damage.where, package)
        sites[kind] = Site(channel / damage.where, package, spare)
    for number in range(count - len(first) - 2 * len(sites)):
        more(MAIN, f"p{number}")
    channels.index(channel)
    (channel / channels.UPLOADS).mkdir()
    return sites


def _info(path: Path) -> dict[str, bytes]:
    from ssm_forge.package.write import read_info

    return read_info(path)


def problems(channel: Path) -> tuple[Found, int]:
    found, count = channel_check.check(open_source(str(channel)))
    return {(problem.kind, problem.file) for problem in found}, count


def expected(damage: Damage, site: Site) -> Found:
    named = {
        (kind, f"{damage.where}/{file.format(package=site.package, spare=site.spare)}") for kind, file in damage.found
    }
    return {(kind, file.replace(f"{damage.where}/../", "")) for kind, file in named}


def test_there_are_at_least_forty_kinds() -> None:
    assert len(KINDS) >= 40


@pytest.mark.parametrize(
    "count", [pytest.param(170, id="small"), pytest.param(5_000, id="full", marks=pytest.mark.nightly)]
)
def test_every_kind_of_damage_is_found_and_what_can_be_is_repaired(tmp_path: Path, count: int) -> None:
    channel = tmp_path / "channel"
    sites = filled(channel, count)
    started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert problems(channel) == (set(), count)
    checked = time.monotonic()
    sound = {subdir: check_listed(channel / subdir) for subdir in SUBDIRS}
    for kind, damage in KINDS.items():
        damage.do(sites[kind])
    found, _ = problems(channel)
    wanted = set().union(*(expected(damage, sites[kind]) for kind, damage in KINDS.items()))
    assert found == wanted

    repairing = time.monotonic()
    done = channel_check.repair(channel)
    repaired = time.monotonic()
    assert problems(channel)[0] == set()
    lost = {(damage.where, sites[kind].package) for kind, damage in KINDS.items() if damage.lost == "package"}
    for subdir in SUBDIRS:
        left = {name: sha256 for name, sha256 in sound[subdir].items() if (subdir, name) not in lost}
        extra = {"unlisted-1.0-h1_0.conda"} if subdir == MAIN else set()
        listed = check_listed(channel / subdir)
        assert set(listed) == set(left) | extra
        assert {name: listed[name] for name in left} == left
    # Each package that is lost but for its place is kept aside, and said.
    for kind, damage in KINDS.items():
        aside = channel / channel_check.ASIDE / damage.where / sites[kind].package
        assert os.path.lexists(aside) == (damage.lost == "package" and kind != "a package is missing"), kind
        assert any(sites[kind].package in line for line in done) or damage.lost != "package" or "missing" in kind
        signed = channels.record(channel, damage.where, sites[kind].package)
        assert bool(signed and signed.attestations_sha256) == (not damage.lost), kind
    print(
        f"{count} packages, {len(KINDS)} kinds: checked in {checked - started:.1f} s, repaired in "
        f"{repaired - repairing:.1f} s, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB "
        f"({memory >> 10} MB before)"
    )
    assert channel_check.repair(channel) == []


def check_listed(folder: Path) -> dict[str, str]:
    """File name -> sha256, of a folder whose index is as it should be."""
    if folder.name == MAIN:
        check_folder(folder.parent)
    return {name: inspect(folder / name).sha256 for name in channels.records(folder.parent, folder.name)}


def test_a_package_that_was_being_replaced_is_listed_as_it_is(tmp_path: Path) -> None:
    """What a killed build leaves: the new file has its place, the index is of the one before."""
    make_package(tmp_path / MAIN)
    channels.index(tmp_path)
    fresh = make_package(tmp_path / "made", text="newer\n")
    (tmp_path / channels.PENDING).write_text(f"{fresh.name}\n")
    shutil.copy(fresh, tmp_path / MAIN / fresh.name)
    assert channel_check.repair(tmp_path) == []
    assert check_listed(tmp_path / MAIN) == {fresh.name: hashlib.sha256(fresh.read_bytes()).hexdigest()}


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    make_package(tmp_path / MAIN)
    for text in ("one", "two"):
        (tmp_path / MAIN / "junk-1-0.conda").write_text(text)
        channel_check.repair(tmp_path)
    kept = sorted((tmp_path / channel_check.ASIDE / MAIN).iterdir())
    assert [path.read_text() for path in kept] == ["one", "two"]
    assert problems(tmp_path) == (set(), 1)


def test_what_the_engine_left_of_a_killed_run_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp").mkdir()
    (tmp_path / ".tmp" / "repodata.json.abc").write_text("half")
    channels.index(tmp_path)
    assert not list((tmp_path / ".tmp").iterdir())
