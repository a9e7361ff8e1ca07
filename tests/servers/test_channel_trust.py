"""Signed statements: made from what a package says of itself, bound to its bytes, asked for on install."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

import pytest
from lab import Lab, make_package
from rattler import RepoDataRecord

from ssm_forge.flow import planning

pytest.importorskip("cryptography", reason="cryptography is not in this environment; the tools of ./run have it")

from ssm_forge.base.arch import ArchList
from ssm_forge.base.errors import IntegrityError, UsageError
from ssm_forge.base.paths import Workspace
from ssm_forge.base.urls import is_under
from ssm_forge.channel import folder as channels
from ssm_forge.channel import others as remote
from ssm_forge.channel import policy
from ssm_forge.channel import statement as trust
from ssm_forge.flow import pipeline, plan
from ssm_forge.manifest.variants import Variant
from ssm_forge.package.read import inspect
from ssm_forge.publish.send import publish
from ssm_forge.solve.solver import Request, solve


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with the lab's key pair and a stranger's."""
    trust.make_key(tmp_path / "keys", "lab")
    trust.make_key(tmp_path / "keys", "stranger")
    return tmp_path / "keys"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make_package(tmp_path / "made", provenance=True)


def publish_signed(package: Path, url: str, key: Path) -> None:
    assert publish([package], url, statements=trust.writer(key, ()))[0].statement


def record(url: str) -> RepoDataRecord:
    return solve(Request(specs=("tool",), channels=(url,)))[0]


def rules(keys: Path, url: str, *names: str) -> tuple[policy.Rule, ...]:
    path = keys / "trust.toml"
    path.write_text(f'[[channel]]\nurl = "{url}"\nkeys = {json.dumps([f"{name}.pub" for name in names])}\n')
    return policy.load(path)


def ignore(line: str) -> None:
    """A log that nobody reads."""


def test_a_statement_names_what_the_package_was_built_from(package: Path) -> None:
    checked = inspect(package)
    told = trust.statement(checked)
    assert told["subject"] == [{"name": package.name, "digest": {"sha256": checked.sha256}}]
    build = told["predicate"]["buildDefinition"]
    assert build["externalParameters"]["variant"]["forge_variant"] == "cu130"
    digests = {item["uri"]: item["digest"]["sha256"] for item in build["resolvedDependencies"]}
    assert digests == {"recipes/tool": "ab" * 32, "https://example.org/tool.tar.gz": "cd" * 32}


def test_a_package_that_says_nothing_is_not_signed_for(tmp_path: Path, keys: Path) -> None:
    with pytest.raises(IntegrityError, match="does not say what it was built from"):
        publish([make_package(tmp_path)], str(tmp_path / "lab"), statements=trust.writer(keys / "lab.key", ()))


@pytest.mark.parametrize("kind", ["folder", "server"])
def test_a_signed_package_passes_the_policy(
    request: pytest.FixtureRequest, tmp_path: Path, package: Path, keys: Path, kind: str
) -> None:
    url = str(tmp_path / "lab")
    if kind == "server":
        lab: Lab = request.getfixturevalue("lab")
        url = lab.url
    publish_signed(package, url, keys / "lab.key")
    read = url if kind == "server" else Path(url).as_uri()
    lines: list[str] = []
    assert policy.enforce([record(read)], rules(keys, read, "stranger", "lab"), lines.append) == 1
    assert lines == [f"{package.name}: signed by lab.pub"]


def test_signing_again_gives_the_same_statement(package: Path, keys: Path) -> None:
    sidecar = trust.writer(keys / "lab.key", ())
    assert sidecar(inspect(package)) == sidecar(inspect(package))


def test_another_key_an_unsigned_package_and_another_channel(tmp_path: Path, package: Path, keys: Path) -> None:
    lab = tmp_path / "lab"
    publish([package], str(lab))
    with pytest.raises(IntegrityError, match="comes without a signed statement"):
        policy.enforce([record(lab.as_uri())], rules(keys, lab.as_uri(), "lab"), ignore)
    publish_signed(package, str(lab), keys / "stranger.key")
    with pytest.raises(IntegrityError, match=r"no statement signed by lab.pub: found one signed by another key"):
        policy.enforce([record(lab.as_uri())], rules(keys, lab.as_uri(), "lab"), ignore)
    assert policy.enforce([record(lab.as_uri())], rules(keys, "https://elsewhere.example", "lab"), ignore) == 0


@pytest.mark.parametrize(
    ("rule", "channel"),
    [
        ("https://Conda.Lab.example:8400", "https://conda.lab.example:8400"),
        ("https://conda.lab.example:8400", "HTTPS://CONDA.LAB.EXAMPLE:8400/"),
        ("https://conda.lab.example:443", "https://conda.lab.example"),
        ("https://conda.lab.example", "https://conda.lab.example.:443/"),
        ("https://conda.lab.example/a", "https://conda.lab.example/x/../a"),
        ("https://conda.lab.example/a", "https://conda.lab.example//a/./"),
        ("https://conda.lab.example/a", "https://conda.lab.example/%61"),
        ("https://conda.lab.example/a/b", "https://conda.lab.example/a%2Fb"),
        ("https://conda.lab.example/my channel", "https://conda.lab.example/my%20channel"),
        ("conda-forge", "https://conda.anaconda.org/conda-forge"),
        ("https://conda.anaconda.org/conda-forge", "conda-forge"),
    ],
)
def test_a_rule_means_its_channel_however_the_two_are_spelled(keys: Path, rule: str, channel: str) -> None:
    found = rules(keys, rule, "lab")
    policy.require_used(found, remote.channel_urls([channel]))
    # As a server's index may spell it: the engine's own spelling, and the one that was asked for.
    for base in (remote.channel_urls([channel])[0], channel.rstrip("/") + "/"):
        if "://" in base:
            assert is_under(f"{base}linux-64/tool-1.0-h1_0.conda", found[0].url)


@pytest.mark.parametrize(
    ("rule", "channel"),
    [
        ("https://conda.lab.example/a", "https://conda.lab.example/ab"),
        ("https://conda.lab.example/a", "https://conda.lab.example"),
        ("https://conda.lab.example", "http://conda.lab.example"),
        ("https://conda.lab.example", "https://conda.lab.example:8400"),
        ("https://conda.lab.example", "https://conda.lab.example.evil.org"),
        ("conda-forge", "bioconda"),
    ],
)
def test_a_rule_that_matches_no_used_channel_is_an_error(keys: Path, rule: str, channel: str) -> None:
    with pytest.raises(UsageError, match="no channel in use is there"):
        policy.require_used(rules(keys, rule, "lab"), remote.channel_urls([channel]))


def test_an_installation_stops_at_a_rule_that_protects_nothing(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Variant("cu130", "bridge", {}, {}, {})
    channel, archs = "https://conda.lab.example/", ArchList.parse("9.0")
    work = plan.Plan(
        row, "3.12", archs, tmp_path, (channel,), (), None, 1, 0, 0, 0, rules(keys, "https://conda.1ab.example", "lab")
    )
    monkeypatch.setattr(planning, "make", lambda *_: work)
    with pytest.raises(UsageError, match="no channel in use is there"):
        pipeline.install_mamba(plan.Options(source="bridge"), dry_run=True, as_json=True)


@pytest.mark.parametrize("linked", ["the rule's folder", "the channel", "the platform", "the package"])
def test_a_rule_for_a_folder_is_not_escaped_through_a_link(
    tmp_path: Path, package: Path, keys: Path, linked: str
) -> None:
    lab, link = tmp_path / "lab", tmp_path / "link"
    publish([package], str(lab))
    rule_for, url = lab, f"{lab.as_uri()}/linux-64/{package.name}"
    if linked == "the rule's folder":
        link.symlink_to(lab)
        rule_for = link
    elif linked == "the channel":
        link.symlink_to(lab)
        url = f"{link.as_uri()}/linux-64/{package.name}"
    else:
        part = lab / "linux-64" if linked == "the platform" else lab / "linux-64" / package.name
        part.rename(tmp_path / "elsewhere")
        part.symlink_to(tmp_path / "elsewhere")
    found = RepoDataRecord(record(lab.as_uri()), package.name, url, lab.as_uri())
    with pytest.raises(IntegrityError, match="comes without a signed statement"):
        policy.enforce([found], rules(keys, rule_for.as_uri(), "lab"), ignore)


def test_every_rule_about_a_channel_holds(tmp_path: Path, package: Path, keys: Path) -> None:
    """A second table for the same channel is not passed over because the first one is satisfied."""
    lab = tmp_path / "lab"
    publish_signed(package, str(lab), keys / "lab.key")
    both = (*rules(keys, lab.as_uri(), "lab"), *rules(keys, tmp_path.as_uri(), "stranger"))
    with pytest.raises(IntegrityError, match=r"no statement signed by stranger\.pub"):
        policy.enforce([record(lab.as_uri())], both, ignore)


def test_a_folder_is_named_beside_the_policy(tmp_path: Path, keys: Path) -> None:
    (tmp_path / "lab").mkdir()
    assert rules(keys, "../lab", "lab")[0].url == f"{(tmp_path / 'lab').as_uri()}/"


def test_a_swapped_package_with_a_new_index_is_refused(tmp_path: Path, package: Path, keys: Path) -> None:
    """Whoever owns the server can forge the index, but not the statement."""
    lab = tmp_path / "lab"
    publish_signed(package, str(lab), keys / "lab.key")
    forged = make_package(tmp_path / "forged", text="forged\n", provenance=True)
    forged.replace(lab / "linux-64" / package.name)
    channels.index(lab, force=True)
    with pytest.raises(IntegrityError, match="found one about another file"):
        policy.enforce([record(lab.as_uri())], rules(keys, lab.as_uri(), "lab"), ignore)


def test_a_changed_byte_in_a_signed_local_package_is_refused(tmp_path: Path, package: Path, keys: Path) -> None:
    lab = tmp_path / "lab"
    publish_signed(package, str(lab), keys / "lab.key")
    stored = lab / "linux-64" / package.name
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 1
    stored.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="is not the locked package"):
        policy.enforce([record(lab.as_uri())], rules(keys, lab.as_uri(), "lab"), ignore)


def test_a_statement_of_an_older_package_can_not_be_shown_for_a_newer_one(
    tmp_path: Path, package: Path, keys: Path
) -> None:
    old = trust.writer(keys / "lab.key", ())(inspect(package))
    key = trust.load_public(keys / "lab.pub")
    assert trust.verify(old, package.name, inspect(package).sha256, [key])[0] == key
    with pytest.raises(IntegrityError, match="one about another file"):
        trust.verify(old, "tool-2.0-h1_0.conda", inspect(package).sha256, [key])


@pytest.mark.parametrize("field", ["payload", "payloadType", "signatures"])
def test_a_changed_envelope_is_refused(package: Path, keys: Path, field: str) -> None:
    checked = inspect(package)
    bundles = json.loads(trust.writer(keys / "lab.key", ())(checked))
    envelope = bundles[0]["dsseEnvelope"]
    if field == "payload":
        envelope[field] = base64.b64encode(base64.b64decode(envelope[field]) + b" ").decode()
    elif field == "signatures":
        envelope[field] = [{"sig": base64.b64encode(b"\0" * 64).decode()}]
    else:
        envelope[field] = "application/json"
    with pytest.raises(IntegrityError, match="has no statement signed by"):
        trust.verify(json.dumps(bundles).encode(), package.name, checked.sha256, [trust.load_public(keys / "lab.pub")])


@pytest.mark.parametrize("data", [b"", b"no json", b"[1]", b'[{"dsseEnvelope": 1}]', b'[{"dsseEnvelope": {}}]'])
def test_what_is_no_statement_is_refused(keys: Path, data: bytes) -> None:
    with pytest.raises(IntegrityError):
        trust.verify(data, "tool-1.0-h1_0.conda", "ab" * 32, [trust.load_public(keys / "lab.pub")])


def test_bundles_made_elsewhere_are_stored_beside_their_package(tmp_path: Path, package: Path, keys: Path) -> None:
    mine = trust.sign(trust.statement(inspect(package)), trust.load_private(keys / "stranger.key"))
    other = trust.sign({**trust.statement(inspect(package)), "subject": []}, trust.load_private(keys / "lab.key"))
    for name, bundle in (("mine", mine), ("other", other)):
        (tmp_path / f"{name}.sigstore.json").write_text(json.dumps(bundle))
    paths = [tmp_path / "mine.sigstore.json", tmp_path / "other.sigstore.json"]
    sidecar = json.loads(trust.writer(keys / "lab.key", paths)(inspect(package)))
    assert len(sidecar) == 2
    assert sidecar[1] == mine


def test_a_rule_for_sigstore_is_the_engines_to_check(tmp_path: Path, package: Path, keys: Path) -> None:
    """A key's signature does not pass for a certificate of sigstore's."""
    lab = tmp_path / "lab"
    publish_signed(package, str(lab), keys / "lab.key")
    (keys / "trust.toml").write_text(
        f'[[channel]]\nurl = "{lab.as_uri()}"\nrequire = "sigstore"\n'
        'identity = "https://github.com/lab/*"\nissuer = "https://token.actions.githubusercontent.com"\n'
    )
    with pytest.raises(IntegrityError, match="no valid sigstore attestation"):
        policy.enforce([record(lab.as_uri())], policy.load(keys / "trust.toml"), ignore)


@pytest.mark.parametrize(
    "text",
    [
        "no toml [",
        "[[channel]]\nurl = 'x'",
        "[[channel]]\nurl = 'x'\nrequire = 'nothing'",
        "[[channel]]\nkeys = ['lab.pub']",
        "[[channel]]\nurl = ''\nkeys = ['lab.pub']",
        "[[channel]]\nurl = 'https://x:port'\nkeys = ['lab.pub']",
        "[[channel]]\nurl = 'x'\nkeys = ['lab.pub']\nidentity = 'not asked for'",
        "[[channel]]\nurl = 'x'\nrequire = 'sigstore'\nidentity = 'https://github.com/lab/*'",
        "[[channel]]\nurl = 'x'\nrequire = 'sigstore'\nidentity = ''\nissuer = 'https://github.com'",
        "[[channel]]\nurl = 'x'\nrequire = 'sigstore'\nidentity = 'https://github.com/lab/*'\nissuer = ''",
        "[[channel]]\nurl = 'x'\nkeys = 'lab.pub'",
        "[[channel]]\nurl = 1\nkeys = ['lab.pub']",
        "channel = [1]",
        "[[channel]]\nurl = 'x'\nkey = 'lab.pub'",
        "[[channel]]\nurl = 'x'\nkeys = ['missing.pub']",
        "[[channels]]\nurl = 'x'",
        "",
    ],
)
def test_a_policy_that_is_not_understood_stops_everything(keys: Path, text: str) -> None:
    (keys / "trust.toml").write_text(text)
    with pytest.raises(UsageError):
        policy.load(keys / "trust.toml")


def test_the_policy_in_force(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Workspace(root=tmp_path, cache=tmp_path / "cache")
    assert policy.find(None, place) == ()
    place.recipes.mkdir()
    (place.recipes / "trust.toml").write_text("[[channel]]\nurl = 'https://a.example'\nkeys = ['../keys/lab.pub']")
    assert [rule.url for rule in policy.find(None, place)] == ["https://a.example/"]
    rules(keys, "https://b.example", "lab")
    monkeypatch.setenv("SSM_FORGE_TRUST", str(keys / "trust.toml"))
    assert [rule.url for rule in policy.find(None, place)] == ["https://b.example/"]
    monkeypatch.setenv("SSM_FORGE_TRUST", str(tmp_path / "missing.toml"))
    with pytest.raises(UsageError, match="can't be read"):
        policy.find(None, place)


def test_keys_are_private_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.PASSPHRASE_VARIABLE, "sesame")
    private, public = trust.make_key(tmp_path, "lab")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"ENCRYPTED" in private.read_bytes()
    trust.load_private(private)
    monkeypatch.setenv(trust.PASSPHRASE_VARIABLE, "wrong-sesame")
    with pytest.raises(UsageError, match="can't be used as a private key") as caught:
        trust.load_private(private)
    assert "sesame" not in str(caught.value)
    with pytest.raises(UsageError, match="never overwritten"):
        trust.make_key(tmp_path, "lab")
    assert trust.load_public(public).name == "lab.pub"
