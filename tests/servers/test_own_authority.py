"""A server whose certificate an authority of its own has signed, and which asks who reads: the real clients."""

from __future__ import annotations

import datetime
import functools
import hashlib
import http.server
import ipaddress
import os
import shutil
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from lab import Running, auth_file, make_package, serving

from real_pixi import needs_pixi
from ssm_forge.channel import folder as channels
from ssm_forge.serve.tokens import TokenStore

CONDA = shutil.which("conda")
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_conda = pytest.mark.skipif(CONDA is None, reason="needs conda on PATH")
# What the clients call a certificate of an authority that they do not know.
UNKNOWN = ("certificate", "Certificate", "CERTIFICATE", "SSL")


@dataclass(frozen=True)
class Lab:
    """A channel behind TLS.

    Attributes:
        authority: PEM file of the authority, which no system knows.
        token: to read with.
        home: of whoever reads.
    """

    server: Running
    authority: Path
    token: str
    home: Path

    def run(self, *words: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
        """A client's command; nothing of the developer's settings gets in."""
        hidden = ("SSL_CERT", "REQUESTS_CA", "CURL_CA", "PIP_", "UV_", "CONDA_", "PIXI_", "RATTLER_", "XDG_", "NETRC")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        own = {"HOME": str(self.home), "PIXI_HOME": str(self.home), "PIXI_CACHE_DIR": str(self.home / "cache")}
        told = {**kept, **own, "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring", **settings}
        return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=told, timeout=120, check=False)

    def netrc(self) -> None:
        path = self.home / ".netrc"
        path.write_text(f"machine 127.0.0.1 login token password {self.token}\n")
        path.chmod(0o600)


def signed(folder: Path) -> tuple[Path, Path, Path]:
    """An authority, and a certificate for 127.0.0.1 that it has signed: its PEM file, the chain, the key."""
    now = datetime.datetime.now(datetime.timezone.utc)

    def build(name: str, public: ec.EllipticCurvePublicKey, *, authority: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Lab authority")]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )

    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(root.public_key())
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    # Python 3.13 and newer refuse an authority that does not say that it is one.
    mine = x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, decipher_only=False, **usage)
    top = build("Lab authority", root.public_key(), authority=True)
    top = top.add_extension(mine, critical=True).add_extension(identifier, critical=False)
    leaf = build("127.0.0.1", key.public_key(), authority=False)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = leaf.add_extension(address, critical=False).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )
    paths = folder / "ca.pem", folder / "chain.pem", folder / "key.pem"
    pem = serialization.Encoding.PEM
    paths[0].write_bytes(top.sign(root, hashes.SHA256()).public_bytes(pem))
    paths[1].write_bytes(leaf.sign(root, hashes.SHA256()).public_bytes(pem))
    paths[2].write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    return paths


def alone(folder: Path, *, authority: bool) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signed itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "alone.pem").write_bytes(made.public_bytes(pem))
    (folder / "alone.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "alone.pem", folder / "alone.key"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("own-authority")
    authority, chain, key = signed(folder)
    make_package(folder / "channel/linux-64", "mamba-ssm")
    channels.index(folder / "channel")
    store = TokenStore(folder / "tokens.json")
    token = store.add("reader", "read", 1)
    options = ("--certificate", str(chain), "--key", str(key))
    with serving(folder / "channel", store, folder / "server", *options) as server:
        yield Lab(server, authority, token, folder / "home")


@pytest.fixture
def at(lab: Lab, tmp_path: Path) -> Lab:
    """The lab with a reader who knows nothing yet."""
    home = tmp_path / "reader"
    home.mkdir()
    return replace(lab, home=home)


def workspace(lab: Lab, folder: Path) -> Path:
    folder.mkdir()
    (folder / "pixi.toml").write_text(
        f'[workspace]\nname = "x"\nchannels = ["{lab.server.url}"]\nplatforms = ["linux-64"]\n'
    )
    return folder


class TestPixi:
    pytestmark = needs_pixi

    def test_it_trusts_the_authority_that_it_is_told_and_no_other(self, at: Lab, tmp_path: Path) -> None:
        place = workspace(at, tmp_path / "mine")
        at.netrc()
        refused = at.run("pixi", "add", "mamba-ssm", folder=place)
        assert refused.returncode != 0
        assert any(word in refused.stderr for word in UNKNOWN), refused.stderr
        done = at.run("pixi", "add", "mamba-ssm", folder=place, SSL_CERT_FILE=str(at.authority))
        assert done.returncode == 0, done.stderr
        assert (place / ".pixi/envs/default/share/mamba-ssm.txt").read_text() == "data\n"

    @pytest.mark.parametrize("authority", [True, False])
    def test_a_certificate_that_signed_itself_does_unless_it_says_that_it_is_an_authority(
        self, authority: bool, at: Lab, tmp_path: Path
    ) -> None:
        """As `openssl req -x509` makes it, it says so."""
        chain, key = alone(tmp_path, authority=authority)
        channel = tmp_path / "channel"
        make_package(channel / "linux-64", "mamba-ssm")
        channels.index(channel)
        options = ("--public", "--certificate", str(chain), "--key", str(key))
        with serving(channel, TokenStore(tmp_path / "tokens.json"), tmp_path / "server", *options) as server:
            place = workspace(replace(at, server=server), tmp_path / "mine")
            done = at.run("pixi", "add", "mamba-ssm", folder=place, SSL_CERT_FILE=str(chain))
        assert (done.returncode != 0) is authority, done.stderr
        assert any(word in done.stderr for word in UNKNOWN) is authority, done.stderr

    @pytest.mark.parametrize("way", ["netrc", "RATTLER_AUTH_FILE", "pixi auth login"])
    def test_the_token_is_known_in_each_way_and_gets_into_no_lock(self, way: str, at: Lab, tmp_path: Path) -> None:
        place = workspace(at, tmp_path / "mine")
        settings = {"SSL_CERT_FILE": str(at.authority)}
        refused = at.run("pixi", "add", "mamba-ssm", folder=place, **settings)
        assert refused.returncode != 0
        assert "401" in refused.stderr, refused.stderr
        if way == "netrc":
            at.netrc()
        elif way == "RATTLER_AUTH_FILE":
            settings[way] = str(auth_file(at.home, at.token))
        else:
            told = at.run("pixi", "auth", "login", "127.0.0.1", "--token", at.token, folder=place, **settings)
            assert told.returncode == 0, told.stderr
        done = at.run("pixi", "add", "mamba-ssm", folder=place, **settings)
        assert done.returncode == 0, done.stderr
        lock = (place / "pixi.lock").read_text()
        assert f"- conda: {at.server.url}/linux-64/mamba-ssm-" in lock
        assert at.token not in lock

    def test_a_token_in_the_channels_url_ends_up_in_the_lock(self, at: Lab, tmp_path: Path) -> None:
        """As docs/pixi.md warns."""
        place = workspace(at, tmp_path / "mine")
        text = (place / "pixi.toml").read_text()
        (place / "pixi.toml").write_text(text.replace(at.server.url, f"{at.server.url}/t/{at.token}"))
        done = at.run("pixi", "add", "mamba-ssm", folder=place, SSL_CERT_FILE=str(at.authority))
        assert done.returncode == 0, done.stderr
        assert at.token in (place / "pixi.lock").read_text()


class TestConda:
    pytestmark = needs_conda

    @pytest.mark.parametrize("way", ["ssl_verify", "REQUESTS_CA_BUNDLE"])
    def test_it_trusts_the_authority_that_it_is_told_and_no_other(self, way: str, at: Lab, tmp_path: Path) -> None:
        at.netrc()
        assert CONDA is not None
        words = [CONDA, "create", "-y", "-p", str(tmp_path / "env"), "-c", at.server.url, "--override-channels"]
        settings = {"CONDA_PKGS_DIRS": str(at.home / "pkgs"), "CONDA_REMOTE_MAX_RETRIES": "0"}
        refused = at.run(*words, "mamba-ssm", folder=tmp_path, **settings)
        assert refused.returncode != 0
        assert any(word in refused.stderr + refused.stdout for word in UNKNOWN), refused.stderr
        if way == "ssl_verify":
            (at.home / ".condarc").write_text(f"ssl_verify: {at.authority}\n")
        else:
            settings[way] = str(at.authority)
        done = at.run(*words, "mamba-ssm", folder=tmp_path, **settings)
        assert done.returncode == 0, done.stderr + done.stdout
        assert (tmp_path / "env/share/mamba-ssm.txt").read_text() == "data\n"

    def test_a_token_in_the_channels_url_is_read(self, at: Lab, tmp_path: Path) -> None:
        assert CONDA is not None
        url = f"{at.server.url}/t/{at.token}"
        words = [CONDA, "create", "-y", "-p", str(tmp_path / "env"), "-c", url, "--override-channels", "mamba-ssm"]
        settings = {"CONDA_PKGS_DIRS": str(at.home / "pkgs"), "CONDA_SSL_VERIFY": str(at.authority)}
        done = at.run(*words, folder=tmp_path, **settings)
        assert done.returncode == 0, done.stderr + done.stdout
        assert (tmp_path / "env/share/mamba-ssm.txt").exists()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def wheels(lab: Lab, tmp_path: Path) -> Iterator[str]:
    """A package index behind the same certificate, with one wheel."""
    folder = tmp_path / "index/simple/toy"
    folder.mkdir(parents=True)
    wheel = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy.py", "")
        archive.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        archive.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("toy-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "index.html").write_text(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(lab.authority.with_name("chain.pem"), lab.authority.with_name("key.pem"))
    handler = functools.partial(_Quiet, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"https://127.0.0.1:{server.server_port}/simple"
        server.shutdown()


@pytest.mark.parametrize("way", ["--cert", "PIP_CERT", "REQUESTS_CA_BUNDLE"])
def test_pip_trusts_the_authority_that_it_is_told_and_no_other(way: str, at: Lab, wheels: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pip", "install", "--retries", "0", "--index-url", wheels, "--no-deps", "toy"]
    words += ["--target", str(tmp_path / "site"), "--disable-pip-version-check"]
    refused = at.run(*words, folder=tmp_path)
    assert refused.returncode != 0
    assert any(word in refused.stderr + refused.stdout for word in UNKNOWN)
    option, settings = (["--cert", str(at.authority)], {}) if way == "--cert" else ([], {way: str(at.authority)})
    done = at.run(*words, *option, folder=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/toy.py").exists()


@pytest.mark.skipif(UV is None, reason="uv is not in this environment; the tools of ./run have it")
@pytest.mark.parametrize("options", [(), ("--native-tls",)], ids=["SSL_CERT_FILE", "--native-tls"])
def test_uv_trusts_the_authority_that_it_is_told_and_no_other(
    options: tuple[str, ...], at: Lab, wheels: str, tmp_path: Path
) -> None:
    assert UV is not None
    words = [UV, "pip", "install", "--no-cache", "--index-url", wheels, "--target", str(tmp_path / "site"), "toy"]
    words += ["--python", sys.executable, *options]
    refused = at.run(*words, folder=tmp_path, UV_HTTP_RETRIES="0")
    assert refused.returncode != 0
    assert any(word in refused.stderr for word in UNKNOWN)
    done = at.run(*words, folder=tmp_path, SSL_CERT_FILE=str(at.authority))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/toy.py").exists()
