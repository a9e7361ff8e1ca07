"""Our own server as a reader sees it: ranges, tags, tokens in every form that conda's tools use, TLS."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from lab import Lab, environment, make_package, serving

from ssm_forge.publish.send import publish
from ssm_forge.serve.tokens import TokenStore

NAME = "tool-1.0-h1_0.conda"


@pytest.fixture
def filled(lab: Lab, tmp_path: Path) -> Lab:
    publish([make_package(tmp_path / "made", size=200_000)], lab.url)
    return lab


def test_ranges_tags_and_heads(filled: Lab) -> None:
    whole = (filled.channel / "linux-64" / NAME).read_bytes()
    with httpx.Client(headers={"Authorization": f"Bearer {filled.read}"}) as client:
        url = f"{filled.url}/linux-64/{NAME}"
        full = client.get(url)
        assert full.content == whole
        assert full.headers["accept-ranges"] == "bytes"
        part = client.get(url, headers={"Range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, whole[100:200])
        assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
        assert client.get(url, headers={"Range": "bytes=-10"}).content == whole[-10:]
        assert client.get(url, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416
        assert client.get(url, headers={"If-None-Match": full.headers["etag"]}).status_code == 304
        old = client.get(url, headers={"Range": "bytes=0-9", "If-Range": '"another"'})
        assert (old.status_code, old.content) == (200, whole)
        head = client.head(url)
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(whole)))


def test_the_index_gets_a_new_tag_when_it_changes(filled: Lab, tmp_path: Path) -> None:
    with httpx.Client(headers={"Authorization": f"Bearer {filled.read}"}) as client:
        url = f"{filled.url}/linux-64/repodata.json"
        before = client.get(url)
        assert before.headers["cache-control"] == "private, no-cache"
        publish([make_package(tmp_path / "made", "more")], filled.url)
        after = client.get(url, headers={"If-None-Match": before.headers["etag"]})
        assert after.status_code == 200
        assert set(after.json()["packages.conda"]) == {NAME, "more-1.0-h1_0.conda"}


def test_a_token_works_in_every_form_that_conda_tools_use(filled: Lab) -> None:
    url = f"{filled.url}/linux-64/{NAME}"
    assert httpx.get(url, headers={"Authorization": f"Bearer {filled.read}"}).status_code == 200
    assert httpx.get(url, auth=("anything", filled.read)).status_code == 200
    assert httpx.get(f"{filled.url}/t/{filled.read}/linux-64/{NAME}").status_code == 200
    assert httpx.get(url, headers={"Authorization": f"Bearer {filled.write}"}).status_code == 200


# As conda.common.url has it (split_anaconda_token, unchanged from conda 4.2 to 26.7).
CONDAS_TOKEN = re.compile(r"/t/([a-zA-Z0-9-]*)")


def test_conda_reads_a_token_whole_from_a_channels_url(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "tokens.json")
    secrets = [store.add(f"user{number}", "read", 1) for number in range(50)]
    for secret in secrets:
        url = f"https://conda.lab.example:8400/t/{secret}/linux-64"
        found = CONDAS_TOKEN.search(url)
        assert found is not None
        assert found.group(1) == secret
    assert len(set(secrets)) == len(secrets)


def test_a_token_that_was_made_with_underscores_still_works(tmp_path: Path) -> None:
    old = "ssmf_x_Yz-0123456789abcdefghijklmnopqrstuvwxyzABC"
    entry = {"name": "old", "right": "read", "sha256": hashlib.sha256(old.encode()).hexdigest(), "expires": 1 << 40}
    (tmp_path / "tokens.json").write_text(json.dumps([entry]))
    make_package(tmp_path / "channel" / "linux-64")
    with serving(tmp_path / "channel", TokenStore(tmp_path / "tokens.json"), tmp_path / "home") as server:
        assert httpx.get(f"{server.url}/t/{old}/linux-64/{NAME}").status_code == 200
        assert httpx.get(f"{server.url}/linux-64/{NAME}", auth=("any", old)).status_code == 200


def test_a_public_channel_is_read_without_a_token_but_not_written(tmp_path: Path) -> None:
    channel = tmp_path / "channel"
    package = make_package(channel / "linux-64")
    with serving(channel, TokenStore(tmp_path / "none.json"), tmp_path / "home", "--public") as server:
        assert httpx.get(f"{server.url}/linux-64/{package.name}").status_code == 200
        assert httpx.put(f"{server.url}/linux-64/a-1-0.conda", content=b"x").status_code == 401


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "tls.pem", folder / "tls.key"


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, key = certificate(tmp_path)
    store = TokenStore(tmp_path / "tokens.json")
    token = store.add("writer", "write", 1)
    options = ("--certificate", str(chain), "--key", str(key))
    with serving(tmp_path / "channel", store, tmp_path / "home", *options) as server:
        assert server.url.startswith("https://")
        monkeypatch.setenv("SSL_CERT_FILE", str(chain))
        monkeypatch.setenv("SSM_FORGE_CHANNEL_TOKEN", f"127.0.0.1={token}")
        assert publish([make_package(tmp_path / "made")], server.url)[0].outcome == "added"
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{server.url}/linux-64/repodata.json")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "no valid token"),
        (("--public", "--host", "0.0.0.0"), "in the clear"),
        (("--public", "--certificate", __file__), "belong together"),
        (("--public", "--certificate", __file__, "--key", __file__), "are no certificate and key"),
    ],
)
def test_a_server_that_would_be_open_or_useless_does_not_start(
    tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    command = [sys.executable, "-m", "ssm_forge", "serve", "--port", "0", "--channel", str(tmp_path / "c")]
    command += ["--tokens", str(tmp_path / "none.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), check=False, timeout=60)
    assert done.returncode == 2
    assert reason in done.stderr


def test_tokens_are_made_listed_and_revoked(tmp_path: Path) -> None:
    def serve(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ssm_forge", "serve", "token", *words, "--tokens", str(tmp_path / "t.json")]
        return subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), check=False)

    made = serve("add", "alice", "--right", "write", "--days", "2")
    secret = made.stdout.strip()
    assert secret.startswith("ssmf-")
    found = TokenStore(tmp_path / "t.json").find(secret)
    assert found is not None
    assert (found.name, found.right, found.expired) == ("alice", "write", False)
    listed = serve("list")
    assert "alice" in listed.stdout
    assert secret not in listed.stdout
    assert serve("add", "alice").returncode == 2
    assert serve("revoke", "alice").returncode == 0
    assert serve("revoke", "alice").returncode == 2
    assert TokenStore(tmp_path / "t.json").find(secret) is None
