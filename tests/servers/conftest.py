from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, serving

from ssm_forge.serve.tokens import TokenStore


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials of the developer's machine: tests are somebody without any."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
    for name in ("RATTLER_AUTH_FILE", "NETRC", "SSM_FORGE_CHANNEL_TOKEN", "SSM_FORGE_TRUST"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    store = TokenStore(tmp_path / "tokens.json")
    read, write = store.add("reader", "read", 1), store.add("writer", "write", 1)
    channel = tmp_path / "channel"
    with serving(channel, store, tmp_path / "home") as server:
        made = Lab(channel, server, store, read, write, tmp_path / "home")
        made.login(write, monkeypatch)
        yield made
