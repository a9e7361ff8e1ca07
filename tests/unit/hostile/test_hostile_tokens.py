"""The file with the server's tokens."""

from __future__ import annotations

from pathlib import Path

from hostile import hostile, json_files, judge
from hypothesis import given

from ssm_forge.base.errors import UsageError
from ssm_forge.serve.tokens import Token, TokenStore

VALID = [
    {"name": "ci", "right": "write", "sha256": "0" * 64, "expires": 2_000_000_000},
    {"name": "lab", "right": "read", "sha256": "1" * 64, "expires": 1},
]


@hostile()
@given(json_files(VALID))
def test_a_tokens_file_is_read_or_called_unreadable(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokens.json"
    path.write_bytes(data)

    def use(found: list[Token]) -> None:
        assert all(token.right in ("read", "write") for token in found)
        [token.expired for token in found]

    judge(TokenStore(path).all, UsageError, then=use)
    judge(lambda: TokenStore(path).find("ssmf-secret"), UsageError)
