"""Attacks on our own server and on its readers: each refused, with a clear reason, and nothing changed."""

from __future__ import annotations

import base64
import hashlib
import io
import socket
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import zstandard
from lab import Lab, auth_file, check_folder, make_package, serving

from ssm_forge.base.errors import IntegrityError, NetworkError
from ssm_forge.channel.folder import index
from ssm_forge.package.read import inspect
from ssm_forge.publish.send import publish
from ssm_forge.serve.tokens import TokenStore


@pytest.fixture(scope="module")
def fort(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A server with one package, that no attack may change."""
    folder = tmp_path_factory.mktemp("fort")
    (folder / "home").mkdir()
    (folder / "secret.txt").write_text("outside of the channel\n")
    store = TokenStore(folder / "tokens.json")
    read, write = store.add("reader", "read", 1), store.add("writer", "write", 1)
    store.add("former", "write", 0)
    channel = folder / "channel"
    make_package(channel / "linux-64")
    (channel / "linux-64" / "notes.txt").write_text("not part of the channel\n")
    (channel / "private").mkdir()
    (channel / "private" / "a-1-0.conda").write_text("no platform\n")
    outside = make_package(folder / "outside", "outsider")
    with serving(channel, store, folder / "home") as server:
        # After the start, so that they are in no index.
        (channel / "linux-64" / "link-1.0-0.conda").symlink_to(folder / "secret.txt")
        (channel / "osx-64").symlink_to(outside.parent)
        yield Lab(channel, server, store, read, write, folder / "home")


def raw(fort: Lab, path: str, token: str, method: str = "GET") -> tuple[int, str]:
    """Send a path exactly as it is: clients and libraries tidy them up."""
    host, port = fort.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=600) as connection:
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return int(answer.split()[1]), answer.decode(errors="replace")


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/linux-64/../../secret.txt",
        "/linux-64/..%2f..%2fsecret.txt",
        "/linux-64/%2e%2e/%2e%2e/secret.txt",
        "/linux-64/..%5c..%5csecret.txt",
        "//etc/passwd",
        "/linux-64//etc/passwd",
        "/linux-64/%2fetc%2fpasswd",
        "/linux-64/shards/../../../secret.txt",
        "/linux-64/shards/..%2f..%2f..%2fsecret.txt",
        "/linux-64/repodata.json%00.conda",
        "/linux-64/notes.txt",
        "/linux-64/",
        "/linux-64",
        "/",
        "/.lock",
        "/.uploads/x.part",
        "/private/a-1-0.conda",
        "/../tokens.json",
    ],
)
def test_nothing_outside_of_the_channel_is_served_or_listed(fort: Lab, path: str) -> None:
    status, text = raw(fort, path, fort.read)
    assert status in (400, 404, 405), text
    assert "outside of the channel" not in text
    assert "root:" not in text
    assert "tool-1.0" not in text


@pytest.mark.parametrize("path", ["/linux-64/link-1.0-0.conda", "/osx-64/outsider-1.0-h1_0.conda"])
def test_a_symbolic_link_out_of_the_channel_is_not_followed(fort: Lab, path: str) -> None:
    status, text = raw(fort, path, fort.read)
    assert status == 403
    assert "symbolic link" in text


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        ({}, "needs a token"),
        ({"Authorization": "Bearer guess"}, "not known"),
        ({"Authorization": "Basic " + base64.b64encode(b"reader:guess").decode()}, "not known"),
        ({"Authorization": "Basic !!"}, "not known"),
        ({"Authorization": "Digest x"}, "needs a token"),
    ],
)
def test_a_missing_or_wrong_token_is_refused(fort: Lab, shown: dict[str, str], reason: str) -> None:
    answer = httpx.get(f"{fort.url}/linux-64/repodata.json", headers=shown)
    assert answer.status_code == 401
    assert reason in answer.text
    assert "Basic" in answer.headers["www-authenticate"]


def test_an_expired_token_is_refused(tmp_path: Path, fort: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fort.store.add("late", "write", 0)
    answer = httpx.get(f"{fort.url}/linux-64/repodata.json", headers={"Authorization": f"Bearer {old}"})
    assert (answer.status_code, "'late' has expired" in answer.text) == (401, True)
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(auth_file(tmp_path, old)))
    with pytest.raises(NetworkError, match="has expired") as caught:
        publish([make_package(tmp_path, "new")], fort.url)
    assert old not in str(caught.value)


def test_a_revoked_token_is_refused_by_the_running_server(fort: Lab) -> None:
    token = fort.store.add("leaver", "read", 1)
    headers = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{fort.url}/linux-64/repodata.json", headers=headers).status_code == 200
    fort.store.revoke("leaver")
    assert httpx.get(f"{fort.url}/linux-64/repodata.json", headers=headers).status_code == 401


def test_a_write_with_a_read_token_is_refused(tmp_path: Path, fort: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(auth_file(tmp_path, fort.read)))
    with pytest.raises(NetworkError, match="'reader' may read, but not write") as caught:
        publish([make_package(tmp_path, "new")], fort.url)
    assert fort.read not in str(caught.value)
    assert not (fort.channel / "linux-64" / "new-1.0-h1_0.conda").exists()


@pytest.mark.parametrize("method", ["DELETE", "POST", "PATCH", "MKCOL", "MOVE"])
def test_nothing_can_be_removed_or_moved(fort: Lab, method: str) -> None:
    status, _ = raw(fort, "/linux-64/tool-1.0-h1_0.conda", fort.write, method)
    assert status == 405


def put(
    fort: Lab, name: str, data: bytes, *, subdir: str = "linux-64", announced: bytes | None = None
) -> httpx.Response:
    digest = base64.b64encode(hashlib.sha256(data if announced is None else announced).digest()).decode()
    headers = {"Authorization": f"Bearer {fort.write}", "Repr-Digest": f"sha-256=:{digest}:"}
    return httpx.put(f"{fort.url}/{subdir}/{name}", content=data, headers=headers)


@pytest.mark.parametrize("name", ["repodata.json", "x.html", ".htaccess", "run_exports.json", "evil.conda"])
def test_only_packages_can_be_written(fort: Lab, name: str) -> None:
    assert put(fort, name, b"{}").status_code == 403


def test_a_package_swapped_under_the_same_name_is_refused(tmp_path: Path, fort: Lab) -> None:
    forged = make_package(tmp_path, text="forged\n")
    answer = put(fort, forged.name, forged.read_bytes())
    assert answer.status_code == 409
    assert "different file under the name" in answer.text


def test_a_changed_byte_is_refused(tmp_path: Path, fort: Lab) -> None:
    package = make_package(tmp_path, "fresh")
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 1
    answer = put(fort, package.name, bytes(data), announced=package.read_bytes())
    assert answer.status_code == 422
    assert "other bytes than were announced" in answer.text
    assert not (fort.channel / "linux-64" / package.name).exists()


def test_a_package_in_the_wrong_platform_or_under_the_wrong_name_is_refused(tmp_path: Path, fort: Lab) -> None:
    package = make_package(tmp_path, "fresh")
    wrong = put(fort, package.name, package.read_bytes(), subdir="noarch")
    assert (wrong.status_code, "is for linux-64, not for noarch" in wrong.text) == (422, True)
    renamed = put(fort, "other-1.0-h1_0.conda", package.read_bytes())
    assert renamed.status_code == 422


def test_an_upload_without_an_announced_hash_is_refused(tmp_path: Path, fort: Lab) -> None:
    headers = {"Authorization": f"Bearer {fort.write}"}
    answer = httpx.put(f"{fort.url}/linux-64/a-1-0.conda", content=b"x", headers=headers)
    assert (answer.status_code, "announces its sha256" in answer.text) == (400, True)


def test_an_upload_of_another_length_than_announced_is_refused(tmp_path: Path, fort: Lab) -> None:
    digest = base64.b64encode(hashlib.sha256(b"x").digest()).decode()
    headers = {
        "Authorization": f"Bearer {fort.write}",
        "Repr-Digest": f"sha-256=:{digest}:",
        "Content-Range": "bytes 0-0/1",
    }
    answer = httpx.put(f"{fort.url}/linux-64/a-1-0.conda", content=b"xx", headers=headers)
    assert answer.status_code == 400


def hostile(folder: Path, member: tarfile.TarInfo, part: str = "pkg") -> Path:
    """A package with one more entry in one of its parts."""
    honest = make_package(folder / "honest", "hostile")
    target = folder / honest.name
    with zipfile.ZipFile(honest) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.startswith(f"{part}-"):
                plain = io.BytesIO(zstandard.ZstdDecompressor().stream_reader(data).read())
                with tarfile.open(fileobj=plain, mode="a") as tar:
                    tar.addfile(member, io.BytesIO(b"x" * member.size))
                data = zstandard.ZstdCompressor().compress(plain.getvalue())
            new.writestr(name, data)
    return target


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, 1 if kind == tarfile.REGTYPE else 0
    return member


@pytest.mark.parametrize(
    "member",
    [
        entry("../evil.txt"),
        entry("share/../../evil.txt"),
        entry("/etc/evil.txt"),
        entry("share/link", tarfile.SYMTYPE, "../../outside"),
        entry("share/link", tarfile.SYMTYPE, "/etc/passwd"),
        entry("share/link", tarfile.LNKTYPE, "../outside"),
        entry("share/device", tarfile.CHRTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.linkname or member.type.decode()}",
)
@pytest.mark.parametrize("part", ["pkg", "info"])
def test_an_archive_that_reaches_out_is_refused(tmp_path: Path, fort: Lab, member: tarfile.TarInfo, part: str) -> None:
    package = hostile(tmp_path, member, part)
    with pytest.raises(IntegrityError, match=r"leads out(side| of)|neither file, folder nor link"):
        inspect(package)
    assert put(fort, package.name, package.read_bytes()).status_code == 422
    assert not (fort.channel / "linux-64" / package.name).exists()


def test_a_link_inside_the_package_is_fine(tmp_path: Path) -> None:
    package = hostile(tmp_path, entry("share/link", tarfile.SYMTYPE, "../share/hostile.txt"))
    assert inspect(package).index["name"] == "hostile"


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip" * 100])
def test_what_is_no_package_is_refused(fort: Lab, data: bytes) -> None:
    answer = put(fort, "junk-1.0-0.conda", data)
    assert answer.status_code in (400, 422)
    assert not (fort.channel / "linux-64" / "junk-1.0-0.conda").exists()


def test_tokens_get_into_no_log(fort: Lab) -> None:
    httpx.get(f"{fort.url}/t/{fort.read}/linux-64/repodata.json")
    httpx.get(f"{fort.url}/linux-64/repodata.json?token={fort.read}")
    httpx.options(f"{fort.url}/t/{fort.read}/")
    httpx.get(f"{fort.url}/t/{fort.read}/else/where")
    logs = [path.read_text() for path in (fort.home / "logs").glob("serve-*.log")]
    assert any("GET '/t/********/linux-64/repodata.json'" in text for text in logs)
    assert all(fort.read not in text and fort.write not in text for text in logs)
    assert fort.read not in fort.store.path.read_text()
    assert oct(fort.store.path.stat().st_mode & 0o777) == "0o600"


def test_the_channel_is_what_it_was(fort: Lab) -> None:
    """Last of this module: after all attacks."""
    assert check_folder(fort.channel) == {"tool-1.0-h1_0.conda"}
    assert not list((fort.channel / ".uploads").glob("*.part"))


def test_a_published_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    package = make_package(tmp_path / "made")
    folder = tmp_path / "channel" / "linux-64"
    folder.mkdir(parents=True)
    (folder / package.name).symlink_to(package)
    with pytest.raises(IntegrityError, match="symbolic link"):
        publish([package], str(tmp_path / "channel"))
    index(tmp_path / "channel")
