"""Unpacking a tar: what is made of an honest one, and that a hostile one writes nothing elsewhere, on every Python."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from ssm_forge.base.errors import IntegrityError
from ssm_forge.base.unpacking import unpack_tar

_TIME = 1_000_000_000


def member(name: str, content: str | None = "x", *, kind: bytes = b"", link: str = "", mode: int = 0o644) -> bytes:
    """One member, as the bytes of an archive that goes on."""
    info = tarfile.TarInfo(name)
    info.mode, info.mtime, info.uid, info.uname = mode, _TIME, 12345, "daemon"
    if kind:
        info.type, info.linkname, content = kind, link, None
    info.size = len(content or "")
    return info.tobuf(tarfile.GNU_FORMAT) + (content or "").encode().ljust(-(-info.size // 512) * 512, b"\0")


def folder(name: str, mode: int = 0o755) -> bytes:
    return member(name, kind=tarfile.DIRTYPE, mode=mode)


def symlink(name: str, target: str) -> bytes:
    return member(name, kind=tarfile.SYMTYPE, link=target)


def hard_link(name: str, target: str) -> bytes:
    return member(name, kind=tarfile.LNKTYPE, link=target)


def unpacked(target: Path, *members: bytes, absolute_links: bool = False) -> Path:
    stream = io.BytesIO(b"".join(members) + bytes(1024))
    unpack_tar(stream, target, named="x.tar", absolute_links=absolute_links)
    return target


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def around(tmp_path: Path) -> Path:
    """A folder with something to steal and to destroy beside what is unpacked."""
    around = tmp_path / "around"
    (around / "elsewhere").mkdir(parents=True)
    (around / "victim").write_text("whole")
    return around


def everything(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text() if path.is_file() and not path.is_symlink() else ""
        for path in root.rglob("*")
        if path.relative_to(root).parts[0] != "target"
    }


def hostile(around: Path) -> dict[str, tuple[bytes, ...]]:
    """Members that ask for what no archive may have, by what it is."""
    return {
        "absolute": (member(f"{around}/out"),),
        "absolute folder": (folder(f"{around}/out"),),
        "up": (member("../out"),),
        "up from inside": (member("a/../../out"),),
        "folder up": (folder("../out"),),
        "link up": (symlink("a", "../victim"),),
        "link up from inside": (symlink("a/b", "../../victim"),),
        "link up and down again": (symlink("a", "b/../../victim"),),
        "absolute link": (symlink("a", f"{around}/victim"),),
        "link to nothing": (symlink("a", ""),),
        "through a link up": (symlink("a", "../elsewhere"), member("a/out")),
        "over a link up": (symlink("a", "../victim"), member("a")),
        "through a chain of links": (
            folder("d/e"),
            symlink("d/e/here", "."),
            symlink("up", "d/e/here/../../.."),
            member("up/out"),
        ),
        "through a link that turns later": (
            folder("s/t"),
            symlink("a", "s/t/q/../../../elsewhere"),
            symlink("s/t/q", "../.."),
            member("a/out"),
        ),
        "through a link with no end": (symlink("a", "a"), member("a/out")),
        "through a link to nowhere": (symlink("a", "b"), member("a/out")),
        "through a file": (member("a"), member("a/out")),
        "hard link up": (hard_link("a", "../victim"),),
        "absolute hard link": (hard_link("a", f"{around}/victim"),),
        "hard link through a link": (symlink("a", "../elsewhere"), hard_link("b", "a/victim")),
        "hard link to a link": (symlink("a", "b"), hard_link("c", "a"), member("c")),
        "hard link to a folder": (folder("a"), hard_link("b", "a")),
        "hard link to what is not there": (hard_link("a", "b"),),
        "character device": (member("a", kind=tarfile.CHRTYPE),),
        "block device": (member("a", kind=tarfile.BLKTYPE),),
        "pipe": (member("a", kind=tarfile.FIFOTYPE),),
        "a file for the folder itself": (member("./."),),
        "a link for the folder itself": (symlink(".", "elsewhere"),),
        "a file for a folder": (folder("a"), member("a")),
    }


@pytest.mark.parametrize("kind", hostile(Path("/around")))
def test_a_hostile_archive_is_refused_and_writes_nothing_elsewhere(around: Path, kind: str) -> None:
    before = everything(around)
    target = around / "target"
    with pytest.raises(IntegrityError, match=r"^x\.tar can't be unpacked: '"):
        unpacked(target, member("honest"), *hostile(around)[kind])
    assert everything(around) == before
    assert (target / "honest").read_text() == "x"
    for path in target.rglob("*"):
        assert Path(os.path.realpath(path)).is_relative_to(target)
        assert path.is_symlink() or path.is_file() or path.is_dir()


def test_an_honest_archive_gives_its_tree(tmp_path: Path) -> None:
    target = unpacked(
        tmp_path / "new/target",
        folder("./"),
        folder("./usr/lib", mode=0o700),
        member("./usr/lib/libm.so.6", "libm"),
        symlink("./usr/lib/libm.so", "libm.so.6"),
        symlink("./lib", "usr/lib"),
        member("./lib/through", "a folder's link"),
        symlink("./usr/lib/up", "../../usr/./lib//libm.so.6"),
        symlink("./usr/lib/later", "../share/later"),
        hard_link("./usr/lib/same", "./lib/libm.so.6"),
        member("usr/share/a folder that no member names/file", ""),
    )
    assert everything(target) == {
        "usr": "",
        "usr/lib": "",
        "usr/lib/libm.so.6": "libm",
        "usr/lib/libm.so": "",
        "usr/lib/up": "",
        "usr/lib/later": "",
        "usr/lib/same": "libm",
        "usr/lib/through": "a folder's link",
        "usr/share": "",
        "usr/share/a folder that no member names": "",
        "usr/share/a folder that no member names/file": "",
        "lib": "",
    }
    # As it is written, which Path would tidy.
    assert os.readlink(target / "usr/lib/up") == "../../usr/./lib//libm.so.6"  # noqa: PTH115
    assert [str((target / name).readlink()) for name in ("lib", "usr/lib/later")] == ["usr/lib", "../share/later"]
    assert (target / "usr/lib/same").samefile(target / "usr/lib/libm.so.6")
    for name in ("usr/lib", "usr/lib/libm.so.6", "usr/lib/through"):
        assert (target / name).stat().st_mtime == _TIME
        assert ((target / name).stat().st_uid, (target / name).stat().st_gid) == (os.getuid(), os.getgid())


@pytest.mark.parametrize(
    ("given", "made"),
    [(0o644, 0o644), (0o777, 0o755), (0o6755, 0o755), (0o1644, 0o644), (0o444, 0o644), (0o055, 0o644), (0, 0o600)],
    ids=oct,
)
def test_a_file_keeps_who_may_read_and_run_it_and_nothing_else(tmp_path: Path, given: int, made: int) -> None:
    assert mode(unpacked(tmp_path / "target", member("a", mode=given)) / "a") == made


def test_a_folder_gets_the_users_own_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    target = unpacked(tmp_path / "target", folder("open", 0o7777), folder("closed", 0))
    assert mode(target / "open") == mode(target / "closed") == mode(tmp_path / "plain")


def test_a_later_member_replaces_a_file_and_not_what_it_is_a_link_to(tmp_path: Path) -> None:
    target = unpacked(
        tmp_path / "target", member("a", "first"), symlink("b", "a"), hard_link("c", "a"), member("b"), member("c", "y")
    )
    assert everything(target) == {"a": "first", "b": "x", "c": "y"}
    assert not (target / "b").is_symlink()


def test_absolute_links_start_from_the_folder_when_asked(tmp_path: Path) -> None:
    links = [
        folder("usr/lib"),
        symlink("usr/lib/libm.so", "/lib/libm.so.6"),
        symlink("root", "/../usr"),
        symlink("l", "/"),
    ]
    target = unpacked(tmp_path / "target", *links, absolute_links=True)
    found = [str((target / name).readlink()) for name in ("usr/lib/libm.so", "root", "l")]
    assert found == ["../../lib/libm.so.6", "usr", "."]


@pytest.mark.parametrize("damage", ["cut", "changed", "no archive", "empty"])
def test_a_damaged_archive_is_an_integrity_error_of_one_line(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress(member("a", os.urandom(5000).hex()) + bytes(1024))
    data = {
        "cut": whole[: len(whole) // 2],
        "changed": whole[:-8] + bytes(8),
        "no archive": b"<html>" * 1000,
        "empty": b"",
    }[damage]
    (tmp_path / "x.tar.gz").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"x\.tar\.gz can't be unpacked: [^\n]+\.$"):
        unpack_tar(tmp_path / "x.tar.gz", tmp_path / "target")
