"""Where credentials are: netrc and the file that RATTLER_AUTH_FILE names."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from hostile import damaged, hostile, json_files, judge
from hypothesis import given
from hypothesis import strategies as st

from ssm_forge.base import credentials
from ssm_forge.base.credentials import Credential
from ssm_forge.base.errors import UsageError
from ssm_forge.base.web import show

NETRC = b"""machine conda.example login me password "a b"
machine other.example
  login you
  account x
  password secret
macdef init
  cd /tmp

default login anonymous password none
"""
ENTRIES = {
    "conda.example": {"BearerToken": "token"},
    "*.example": {"BasicHTTP": {"username": "me", "password": "secret"}},
    "other.example": {"CondaToken": "ab-12"},
}
_WORDS = (
    *(b"machine", b"login", b"password", b"default", b"macdef", b"conda.example"),
    *(b'"', b"\\", b"#", b"\n", b" ", b"\xff"),
)
netrcs = st.one_of(
    damaged(NETRC),
    st.lists(st.sampled_from(_WORDS), max_size=20).map(b" ".join),
    st.lists(st.sampled_from(_WORDS), max_size=20).map(b"".join),
    st.binary(max_size=60),
    st.sampled_from((b"machine " + b"a" * 100_000, b"\0", b'machine conda.example password "', b"machine " * 5_000)),
)


def as_used(found: Credential | None) -> None:
    """What every request does with it."""
    if found is not None:
        request = httpx.Request("GET", "https://conda.example/channel/noarch/repodata.json")
        show(request, found)
        assert request.url.host == "conda.example"
        assert "\n" not in str(request.headers) and "\n" not in str(request.url)


@hostile()
@given(netrcs)
def test_a_netrc_is_read_or_called_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    path = tmp_path / "netrc"
    path.write_bytes(data)
    monkeypatch.setenv("NETRC", str(path))
    judge(lambda: credentials._from_netrc("conda.example"), UsageError, then=as_used)


@hostile()
@given(json_files(ENTRIES), st.sampled_from(("conda.example", "other.example", "a.b.example")))
def test_a_file_of_credentials_is_read_or_called_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, host: str
) -> None:
    path = tmp_path / "credentials.json"
    path.write_bytes(data)
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(path))
    judge(lambda: credentials._from_auth_file(host), UsageError, then=as_used)


@pytest.mark.parametrize("token", ["a\r\nHost: evil", "a b", "ключ", "", "../../x", 7])
def test_a_token_that_would_change_the_request_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: object
) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(json.dumps({"conda.example": {"CondaToken": token}}), encoding="utf-8")
    monkeypatch.setenv("RATTLER_AUTH_FILE", str(path))
    with pytest.raises(UsageError) as caught:
        credentials.find("https://conda.example/channel")
    assert len(str(token)) < 2 or str(token) not in str(caught.value).replace(str(path), "")
