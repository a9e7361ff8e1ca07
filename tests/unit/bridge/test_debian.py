from __future__ import annotations

import hashlib
import http.server
import io
import lzma
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge import deb_file, debian
from ssm_forge.bridge.debian import Deb

_HELLO = "usr/share/hello/hello.txt"


def make_deb(text: str, *, members: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    """A .deb with one file, and ``members`` besides."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        member = tarfile.TarInfo(f"./{_HELLO}")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text.encode()))
        for extra in members:
            tar.addfile(extra)
    package = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", data.getvalue()),
    ):
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        package += content + b"\n" * (len(content) % 2)
    return package


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@dataclass
class Archive:
    """A Debian archive of one package, served on this machine."""

    root: Path
    url: str

    def locked(self, place: Workspace) -> Deb:
        """The package as the index has it now."""
        return self.index(place).find("hello")

    def index(self, place: Workspace) -> debian.Index:
        return debian.load_index(f"{self.url}/debian", "tin", "main", place)

    def publish(self, version: str, content: bytes) -> None:
        """Make ``version`` the only one that the pool and the index have."""
        pool = self.root / "debian/pool/main/h/hello"
        pool.mkdir(parents=True, exist_ok=True)
        for old in pool.iterdir():
            old.unlink()
        name = f"hello_{version}_amd64.deb"
        (pool / name).write_bytes(content)
        packages = lzma.compress(
            f"Package: hello\nVersion: {version}\nDescription: greets\n and more\n"
            f"Filename: pool/main/h/hello/{name}\nSize: {len(content)}\n"
            f"SHA256: {hashlib.sha256(content).hexdigest()}\n".encode()
        )
        digest = hashlib.sha256(packages).hexdigest()
        folder = self.root / "debian/dists/tin/main/binary-amd64/by-hash/SHA256"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / digest).write_bytes(packages)
        (self.root / "debian/dists/tin/InRelease").write_text(
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nSuite: stable\nVersion: 1.2\n"
            "Date: Sat, 21 Nov 2026 09:15:44 UTC\nSHA256:\n"
            f" {digest} {len(packages)} main/binary-amd64/Packages.xz\n"
            "-----BEGIN PGP SIGNATURE-----\n\nnone\n-----END PGP SIGNATURE-----\n"
        )
        debian.load_index.cache_clear()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    """An archive whose signature can't be checked, as on a machine without Debian's keyring."""
    monkeypatch.setattr(debian, "KEYRING", tmp_path / "missing.gpg")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    root = tmp_path / "www"
    root.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    debian.load_index.cache_clear()
    yield Archive(root, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path / "root", cache=tmp_path / "cache")


def test_a_package_is_found_downloaded_and_unpacked(archive: Archive, place: Workspace, tmp_path: Path) -> None:
    archive.publish("1.0", make_deb("hello"))
    deb = archive.locked(place)
    assert (deb.version, deb.suite, deb.component) == ("1.0", "tin", "main")
    deb_file.unpack(debian.fetch_debs([deb], place)[deb], tmp_path / "out")
    assert (tmp_path / "out" / _HELLO).read_text() == "hello"


def test_a_signature_that_cannot_be_checked_is_reported_as_not_checked(archive: Archive, place: Workspace) -> None:
    archive.publish("1.0", make_deb("hello"))
    assert archive.index(place).signature.startswith("not checked: ")


@dataclass
class Signer:
    """gpg with a key of its own, and an archive that it signs."""

    archive: Archive
    home: Path
    folder: Path

    def gpg(self, *command: str) -> None:
        base = ["gpg", "--homedir", str(self.home), "--batch", "--yes", "--pinentry-mode", "loopback"]
        subprocess.run([*base, "--passphrase", "", *command], check=True, capture_output=True)

    def make_key(self, *options: str, expires: str = "never") -> None:
        self.gpg(*options, "--quick-generate-key", "tin@example.org", "ed25519", "sign", expires)

    def sign(self, *options: str) -> None:
        release = self.archive.root / "debian/dists/tin/InRelease"
        text = release.read_text().split("\n\n", 1)[1].split("-----BEGIN PGP SIGNATURE")[0]
        (self.folder / "Release").write_text(text)
        self.gpg(*options, "--clearsign", "--output", str(release), str(self.folder / "Release"))
        self.gpg("--output", str(debian.KEYRING), "--export")

    def revoke(self) -> None:
        (certificate,) = (self.home / "openpgp-revocs.d").iterdir()
        certificate.write_text(certificate.read_text().replace(":-----BEGIN", "-----BEGIN"))
        self.gpg("--import", str(certificate))


@pytest.fixture
def signer(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Signer]:
    home = Path(tempfile.mkdtemp(prefix="gpg", dir="/tmp"))  # gpg's socket paths must be short
    archive.publish("1.0", make_deb("hello"))
    monkeypatch.setattr(debian, "KEYRING", tmp_path / "keyring.gpg")
    yield Signer(archive, home, tmp_path)
    # The agent takes its sockets away by itself when its home goes.
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def signed(signer: Signer) -> Archive:
    """The archive, signed with a key that is in the keyring."""
    signer.make_key()
    signer.sign()
    return signer.archive


_NEEDS_GPG = pytest.mark.skipif(
    not (shutil.which("gpg") and shutil.which("gpgv")), reason="gpg and gpgv are not on this machine"
)


@_NEEDS_GPG
def test_a_good_signature_is_reported_as_checked(signed: Archive, place: Workspace) -> None:
    assert signed.index(place).signature == "checked"
    assert signed.locked(place).version == "1.0"


@_NEEDS_GPG
def test_a_bad_signature_is_refused(signed: Archive, place: Workspace) -> None:
    release = signed.root / "debian/dists/tin/InRelease"
    release.write_text(release.read_text().replace("Version: 1.2", "Version: 1.3"))
    with pytest.raises(IntegrityError, match="bad signature"):
        signed.index(place)


@_NEEDS_GPG
def test_a_signature_that_was_taken_off_is_refused(signed: Archive, place: Workspace) -> None:
    release = signed.root / "debian/dists/tin/InRelease"
    text, _, rest = release.read_text().partition("-----BEGIN PGP SIGNATURE-----")
    assert rest
    for stripped in (text, text.partition("\n\n")[2], f"{text}-----BEGIN PGP SIGNATURE-----\n\nnone\n", ""):
        release.write_text(stripped)
        with pytest.raises(IntegrityError, match="has no signature"):
            signed.index(place)


@_NEEDS_GPG
@pytest.mark.parametrize("kind", ["signature", "key"])
def test_an_expired_signature_is_refused(signer: Signer, place: Workspace, kind: str) -> None:
    then = ("--faked-system-time", "20200101T000000")
    signer.make_key(*then, expires="1y" if kind == "key" else "never")
    signer.sign(*then, *(("--default-sig-expire", "1d") if kind == "signature" else ()))
    with pytest.raises(IntegrityError, match=r"(signature|key) that has expired"):
        signer.archive.index(place)


@_NEEDS_GPG
def test_a_revoked_key_is_refused(signer: Signer, place: Workspace) -> None:
    signer.make_key()
    signer.sign()
    signer.revoke()
    signer.gpg("--output", str(debian.KEYRING), "--export")
    with pytest.raises(IntegrityError, match="a key that was revoked"):
        signer.archive.index(place)


@_NEEDS_GPG
def test_what_stands_outside_the_signed_text_is_not_read(signed: Archive, place: Workspace) -> None:
    release = signed.root / "debian/dists/tin/InRelease"
    release.write_text("Version: 6.6\n\n" + release.read_text())
    assert signed.index(place).release == "1.2"


@_NEEDS_GPG
def test_a_key_that_the_keyring_lacks_is_reported_as_not_checked(
    signed: Archive, place: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty.gpg").touch()
    monkeypatch.setattr(debian, "KEYRING", tmp_path / "empty.gpg")
    assert signed.index(place).signature.startswith("not checked: ")


def test_an_index_other_than_inrelease_names_is_refused(archive: Archive, place: Workspace) -> None:
    archive.publish("1.0", make_deb("hello"))
    for listing in archive.root.glob("debian/dists/tin/main/binary-amd64/by-hash/SHA256/*"):
        listing.write_bytes(lzma.compress(b"Package: evil\n"))
    with pytest.raises(IntegrityError, match="sha256"):
        archive.index(place)


def test_a_deb_with_other_bytes_than_the_lock_is_refused(archive: Archive, place: Workspace) -> None:
    archive.publish("1.0", make_deb("hello"))
    deb = archive.locked(place)
    next(archive.root.glob("debian/pool/**/*.deb")).write_bytes(make_deb("jello"))
    with pytest.raises(IntegrityError, match=deb.sha256):
        debian.fetch_debs([deb], place)


def test_a_superseded_deb_comes_from_the_recorded_place(archive: Archive, place: Workspace) -> None:
    archive.publish("1.0", make_deb("hello"))
    deb = replace(archive.locked(place), also=(f"{archive.url}/kept.deb",))
    (archive.root / "kept.deb").write_bytes(make_deb("hello"))
    archive.publish("1.1", make_deb("newer"))
    assert debian.fetch_debs([deb], place)[deb].read_bytes() == make_deb("hello")


def test_a_moved_deb_is_found_through_the_index(archive: Archive, place: Workspace) -> None:
    archive.publish("1.0", make_deb("hello"))
    deb = replace(archive.locked(place), url=f"{archive.url}/debian/pool/main/h/old/hello_1.0_amd64.deb")
    assert debian.fetch_debs([deb], place)[deb].read_bytes() == make_deb("hello")


def test_a_superseded_deb_that_is_nowhere_names_the_refresh_and_takes_nothing_else(
    archive: Archive, place: Workspace
) -> None:
    archive.publish("1.0", make_deb("hello"))
    deb = archive.locked(place)
    archive.publish("1.1", make_deb("newer"))
    with pytest.raises(NetworkError, match=r"hello 1\.0 is gone .* now has 1\.1 .*bump bridge"):
        debian.fetch_debs([deb], place)
    assert not list(place.downloads.glob("*/hello*.deb"))


def test_refreshing_follows_the_release_and_keeps_what_did_not_move(archive: Archive, place: Workspace) -> None:
    archive.publish("1.0", make_deb("hello"))
    also = "https://elsewhere/archive/20200101T000000Z/pool/main/h/hello/hello_1.0_amd64.deb"
    deb = replace(archive.locked(place), part="sysroot", also=(also,))
    assert debian.refreshed([deb], place) == (deb,)
    archive.publish("1.1", make_deb("newer"))
    (now,) = debian.refreshed([deb], place)
    assert (now.version, now.part) == ("1.1", "sysroot")
    assert now.also == ("https://elsewhere/archive/20261121T091544Z/pool/main/h/hello/hello_1.1_amd64.deb",)


def test_a_package_the_release_lacks_is_named(archive: Archive, place: Workspace) -> None:
    archive.publish("1.0", make_deb("hello"))
    with pytest.raises(UsageError, match="no package 'goodbye'"):
        archive.index(place).find("goodbye")


def test_the_lock_reads_back_as_written(archive: Archive, place: Workspace, tmp_path: Path) -> None:
    archive.publish("1.0", make_deb("hello"))
    deb = archive.locked(place)
    (tmp_path / "debs.x.toml").write_text(debian.lock_text("debs.x.toml", [deb], note="Why."), encoding="utf-8")
    assert debian.read_lock(tmp_path / "debs.x.toml") == (deb,)


def test_a_damaged_lock_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "debs.x.toml").write_text("[[deb]]\npackage = 'only'\n")
    with pytest.raises(UsageError, match=r"debs\.x\.toml"):
        debian.read_lock(tmp_path / "debs.x.toml")


def test_absolute_links_are_turned_inside(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(make_deb("hi", members=(link("./usr/lib/libm.so", "/lib/libm.so.6"),)))
    deb_file.unpack(tmp_path / "x.deb", tmp_path / "out")
    assert (tmp_path / "out/usr/lib/libm.so").readlink() == Path("../../lib/libm.so.6")


@pytest.mark.parametrize("member", [tarfile.TarInfo("../outside"), link("./a", "../../outside")])
def test_a_package_that_reaches_outside_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    (tmp_path / "x.deb").write_bytes(make_deb("hi", members=(member,)))
    with pytest.raises(IntegrityError, match="outside"):
        deb_file.unpack(tmp_path / "x.deb", tmp_path / "out")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"!<arch>\nshort"])
def test_what_is_no_deb_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(IntegrityError, match="not a Debian package"):
        deb_file.unpack(tmp_path / "x.deb", tmp_path / "out")


def test_every_lock_of_the_project_can_be_read() -> None:
    locks = {path.name: debian.read_lock(path) for path in Path(__file__).parents[3].glob("recipes/bridge/debs.*.toml")}
    assert locks
    assert all(locks.values()), locks.keys()
    debs = [deb for lock in locks.values() for deb in lock]
    assert all(len(deb.sha256) == 64 and deb.size and deb.url.endswith(".deb") for deb in debs)
