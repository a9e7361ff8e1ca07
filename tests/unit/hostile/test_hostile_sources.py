"""Where packages and their parts come from: a Python index, wheels on a server, pixi's files, a package's payload."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomlkit
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hostile import (
    DEEP_JSON,
    changed,
    damaged,
    hostile,
    json_files,
    judge,
    memory_below,
    scalars,
    writes_only_below,
    zstd_bomb,
)
from hypothesis import given
from hypothesis import strategies as st
from test_hostile_bundle import _conda, _tar

from ssm_forge.base import foreign, mirrors, web
from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.base.paths import workspace
from ssm_forge.bundle import write as bundle
from ssm_forge.channel import statement as trust
from ssm_forge.manifest import environments as manifest
from ssm_forge.package.read import Package
from ssm_forge.upkeep import package_index, remote_zip

FILE = {
    "filename": "tool-1.0.tar.gz",
    "url": "https://files.example/tool-1.0.tar.gz",
    "hashes": {"sha256": "ab" * 32},
    "size": 10,
    "yanked": False,
}
WHEEL = {**FILE, "filename": "tool-1.0-py3-none-any.whl", "url": "../tool-1.0-py3-none-any.whl"}
LISTING = {"meta": {"api-version": "1.1"}, "name": "tool", "files": [FILE, WHEEL]}

Answers = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answers], None]:
    """Lets a function answer every request."""

    def set_up(answers: Answers) -> None:
        transport = httpx.MockTransport(answers)
        monkeypatch.setattr(web, "session", lambda **_: httpx.Client(transport=transport))
        monkeypatch.setattr(remote_zip, "session", lambda **_: httpx.Client(transport=transport))

    return set_up


@hostile()
@given(json_files(LISTING))
def test_what_a_python_index_lists_can_be_used_or_is_refused(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "session", lambda **_: httpx.Client(transport=httpx.MockTransport(lambda _: answer(data))))

        def use(found: list[package_index.Release]) -> None:
            for release in found:
                # What the cache and the download do with it.
                assert foreign.is_file_name(release.artifact.name)
                assert foreign.is_hex(64)(release.artifact.sha256)
                assert release.artifact.size >= 0

        judge(lambda: package_index.releases("tool", workspace()), NetworkError, then=use)


def answer(data: bytes, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, content=data, headers={key.replace("_", "-"): text for key, text in headers.items()})


def test_an_index_that_does_not_end_is_not_read_to_its_end(answering: Callable[[Answers], None]) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 20
            yield b" " * (1 << 20)

    answering(lambda request: httpx.Response(200, content=endless()))
    with pytest.raises(NetworkError, match="more than"):
        package_index.releases("tool", workspace())
    assert sent <= foreign.MOST_SMALL_BYTES + (2 << 20)


# --- wheels on a server -----------------------------------------------------------------------------------------------


def zipped(name: str = "crt/host_config.h", data: bytes = b"text\n" * 1_000) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("other.txt", "other")
        made.writestr(name, data)
    return stream.getvalue()


def ranged(data: bytes) -> Answers:
    """A server that answers as it should."""

    def respond(request: httpx.Request) -> httpx.Response:
        first, last = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
        return answer(data[first : last + 1], 206, content_range=f"bytes {first}-{last}/{len(data)}")

    return respond


def read(answers: Answers) -> bytes | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_zip, "session", lambda **_: httpx.Client(transport=httpx.MockTransport(answers)))
        return judge(lambda: remote_zip.read_member("https://x.example/a.whl", "host_config.h"), NetworkError)


@hostile()
@given(damaged(zipped()))
def test_a_file_in_a_wheel_on_a_server_is_read_or_refused(data: bytes) -> None:
    read(ranged(data))


def test_a_sound_wheel_is_read() -> None:
    assert read(ranged(zipped())) == b"text\n" * 1_000


@hostile()
@given(st.sampled_from((200, 206, 302, 404, 500)), st.text(max_size=30) | scalars.map(str), st.binary(max_size=99))
def test_a_server_that_lies_about_ranges_is_refused(status: int, length: str, data: bytes) -> None:
    told = length.encode("latin-1", "replace").decode("latin-1")[:9_000].translate({ord(c): "" for c in "\r\n\0"})
    for extent in (told, f"bytes 0-0/{told}"):
        read(lambda request, extent=extent: answer(data, status, content_range=extent))  # type: ignore[misc]


def test_more_than_was_asked_for_and_a_bomb_in_a_wheel_take_no_memory() -> None:
    def too_much(request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            206, headers={"content-range": "bytes 0-0/9"}, content=(b"x" * (1 << 20) for _ in range(200))
        )

    bomb = zipped(data=bytes(512 << 20))
    with memory_below(100 << 20):
        assert read(too_much) is None
        assert read(ranged(bomb)) is None


# --- pixi's files -----------------------------------------------------------------------------------------------------

CONFIG = {"mirrors": {"https://conda.anaconda.org/conda-forge": ["https://mirror.example/conda-forge"]}}
WORKSPACE: dict[str, Any] = {
    "workspace": {
        "name": "x",
        "channels": ["conda-forge", {"channel": "https://x.example/lab", "priority": 1}],
        "platforms": ["linux-64", {"name": "gpu", "platform": "linux-64", "cuda": {"driver": "13.0", "arch": "9.0"}}],
    },
    "dependencies": {"python": "3.12.*", "tool": {"version": "1.0", "channel": "lab", "build-number": 1}},
    "feature": {"a": {"dependencies": {"x": "*"}, "platforms": ["gpu"], "channel-priority": "strict"}},
    "environments": {"a": ["a"], "b": {"features": ["a"], "no-default-feature": True}},
}


def toml_files(valid: Any) -> st.SearchStrategy[bytes]:
    """Documents in place of a valid one: changed where TOML can write it, damaged, or something else."""

    def written(content: Any) -> bytes:
        try:
            return tomlkit.dumps(content).encode("utf-8", "surrogatepass")
        except Exception:  # Not every value has a form in TOML.
            return b"x = "

    text = tomlkit.dumps(valid).encode()
    deep = (b"x = " + b"[" * 50_000, b"x = " + b"{a = " * 50_000, b"[" + b"a." * 50_000 + b"a]\nx = 1")
    return st.one_of(changed(valid).map(written), damaged(text), st.binary(max_size=40), st.sampled_from(deep))


@hostile()
@given(toml_files(CONFIG))
def test_pixis_configuration_is_understood_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "config.toml"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIXI_CONFIG_FILE", str(path))
        judge(mirrors.configured, UsageError)
        judge(lambda: mirrors.mirrored("https://conda.anaconda.org/conda-forge/linux-64/x.conda"), UsageError)


@hostile()
@given(toml_files(WORKSPACE))
def test_a_workspace_is_understood_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "pixi.toml"
    path.write_bytes(data)
    judge(
        lambda: manifest.load(path),
        UsageError,
        then=lambda found: [found.environment(e.name) for e in found.environments],
    )


def test_the_sound_documents_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pixi.toml").write_text(tomlkit.dumps(WORKSPACE))
    assert [e.name for e in manifest.load(tmp_path / "pixi.toml").environments] == ["default", "a", "b"]
    (tmp_path / "config.toml").write_text(tomlkit.dumps(CONFIG))
    monkeypatch.setenv("PIXI_CONFIG_FILE", str(tmp_path / "config.toml"))
    assert mirrors.mirrored("https://conda.anaconda.org/conda-forge/x") == "https://mirror.example/conda-forge/x"


# --- a package's payload, and what it says it was built from ----------------------------------------------------------


@hostile()
@given(damaged(_conda(b"", bundle.archive.zstandard.compress(_tar({"lib/a.so": b"a" * 100, "lib/b.so": b"b"})))))
def test_the_payload_for_a_bundle_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "payload.conda"
    path.write_bytes(data)
    with writes_only_below(None):
        judge(lambda: list(bundle._payload(path)), IntegrityError)


@pytest.mark.parametrize("name", ["../evil.so", "/etc/evil.so", "lib/../../evil.so"])
def test_a_payload_that_leads_out_is_not_bundled(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.conda"
    path.write_bytes(_conda(b"", bundle.archive.zstandard.compress(_tar({name: b"a"}))))
    with pytest.raises(IntegrityError, match="do not fit"):
        list(bundle._payload(path))


def test_a_payload_that_is_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.conda"
    path.write_bytes(_conda(b"", zstd_bomb(1 << 30)))
    with memory_below(50 << 20):
        judge(lambda: list(bundle._payload(path)), IntegrityError)
    # A member that says it has more bytes than a bundle can have is refused by its header.
    huge = bytearray(_tar({"lib/a.so": b""}))
    huge[124:136] = b"77777777777\0"
    checksum = sum(huge[:148]) + 8 * 32 + sum(huge[156:512])
    huge[148:156] = b"%06o\0 " % checksum
    path.write_bytes(_conda(b"", bundle.archive.zstandard.compress(bytes(huge))))
    with memory_below(50 << 20), pytest.raises(IntegrityError, match="do not fit into a bundle"):
        list(bundle._payload(path))


PROVENANCE = {
    "name": "tool",
    "recipe_sha256": "ab" * 32,
    "variant": {"python": "3.12"},
    "cuda_arch_list": "9.0",
    "materials": [{"uri": "https://example.org/x", "sha256": "cd" * 32, "role": "source"}],
}


@hostile()
@given(json_files(PROVENANCE))
def test_what_a_package_was_built_from_can_be_signed_for_or_is_refused(data: bytes) -> None:
    def told(path: Path) -> dict[str, Any]:
        content = foreign.json_from(data)
        if not isinstance(content, dict):
            raise IntegrityError("not an object")  # As reading the package says.
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssm_forge.channel.statement.provenance", told)
        package = Package(Path("tool-1.0-h1_0.conda"), "linux-64", "ab" * 32, 1, {})
        key = Ed25519PrivateKey.from_private_bytes(bytes(32))
        if _is_json(data):
            judge(lambda: trust.statement(package), IntegrityError, then=lambda found: trust.sign(found, key))


def _is_json(data: bytes) -> bool:
    try:
        foreign.json_from(data)
    except ValueError:
        return False
    return data not in DEEP_JSON
