"""Who is trusted, and what they signed: the policy's file, and a package's statement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hostile import as_json, changed, damaged, hostile, json_files, judge
from hypothesis import given
from hypothesis import strategies as st

from ssm_forge.base.errors import IntegrityError, UsageError
from ssm_forge.channel import policy
from ssm_forge.channel import statement as trust
from ssm_forge.channel.statement import PublicKey

NAME, SHA256 = "tool-1.0-h1_0.conda", "0" * 64
STATEMENT = {
    "_type": trust.STATEMENT_TYPE,
    "subject": [{"name": NAME, "digest": {"sha256": SHA256}}],
    "predicateType": trust.PREDICATE_TYPE,
    "predicate": {},
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    trust.make_key(folder, "lab")
    return folder


@pytest.fixture(scope="module")
def sign(keys: Path) -> Callable[[Any], Any]:
    private = trust.load_private(keys / "lab.key")
    return lambda content: trust.sign(content, private)


@pytest.fixture(scope="module")
def trusted(keys: Path) -> PublicKey:
    return trust.load_public(keys / "lab.pub")


@hostile()
@given(st.data())
def test_a_sidecar_is_a_signed_statement_or_refused(
    sign: Callable[[Any], Any], trusted: PublicKey, data: st.DataObject
) -> None:
    bundles = [sign(STATEMENT)]
    sidecar = data.draw(json_files(bundles))

    def use(found: tuple[PublicKey, Any]) -> None:
        assert found[1]["subject"] == STATEMENT["subject"]

    judge(lambda: trust.verify(sidecar, NAME, SHA256, [trusted]), IntegrityError, then=use)


@hostile()
@given(changed(STATEMENT))
def test_a_statement_that_a_trusted_key_signed_is_about_this_file_or_refused(
    sign: Callable[[Any], Any], trusted: PublicKey, content: Any
) -> None:
    sidecar = as_json([sign(content)])

    def use(found: tuple[PublicKey, Any]) -> None:
        assert any(s["name"] == NAME and s["digest"]["sha256"] == SHA256 for s in found[1]["subject"] if "name" in s)

    judge(lambda: trust.verify(sidecar, NAME, SHA256, [trusted]), IntegrityError, then=use)


POLICY = {
    "channel": [
        {"url": "https://conda.example/lab", "keys": ["lab.pub"]},
        {"url": "./local", "keys": ["lab.pub"]},
        {
            "url": "https://conda.example/ci",
            "require": "sigstore",
            "identity": "https://github.com/lab/*",
            "issuer": "https://token.actions.githubusercontent.com",
        },
    ]
}


def _toml(content: Any) -> bytes:
    try:
        return tomlkit.dumps(content).encode()
    except Exception:  # Not everything that JSON has can be said in TOML.
        return b""


policies = st.one_of(
    changed(POLICY, 2).map(_toml),
    changed(POLICY, 1).map(_toml),
    damaged(_toml(POLICY)),
    st.binary(max_size=40),
    st.sampled_from((b"a = " + b"[" * 100_000, b"a." * 1_000 + b"b = 1", b"a = 1979-99-99", b"a = 0x" + b"f" * 9_000)),
)


@hostile()
@given(policies)
def test_a_policy_is_obeyed_in_full_or_called_unreadable(keys: Path, data: bytes) -> None:
    path = keys / "trust.toml"
    path.write_bytes(data)

    def use(rules: tuple[policy.Rule, ...]) -> None:
        for rule in rules:
            assert rule.url.endswith("/") and (rule.keys or (rule.identity and rule.require == "sigstore"))

    judge(lambda: policy.load(path), UsageError, then=use)


def test_the_valid_ones_are_taken(keys: Path, sign: Callable[[Any], Any], trusted: PublicKey) -> None:
    assert trust.verify(json.dumps([sign(STATEMENT)]).encode(), NAME, SHA256, [trusted])[0] == trusted
    (keys / "trust.toml").write_bytes(_toml(POLICY))
    assert len(policy.load(keys / "trust.toml")) == 3


def test_a_key_that_never_ends_is_not_read() -> None:
    with pytest.raises(UsageError, match="can't be read"):
        trust.load_public(Path("/dev/zero"))
