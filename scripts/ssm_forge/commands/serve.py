"""``serve``: the local channel over HTTP, and the tokens that open it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

import click

from ssm_forge.base.paths import launcher, workspace
from ssm_forge.base.tables import FoldingTable
from ssm_forge.base.ui import out, say
from ssm_forge.serve import run as server
from ssm_forge.serve.tokens import TokenStore

_STORE = click.option(
    "--tokens",
    "store",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with the tokens.  [default: .pixi/serve/tokens.json]",
)


def _open(store: Path | None) -> TokenStore:

    return TokenStore(store or workspace().state / "serve" / "tokens.json")


@click.group(invoke_without_command=True)
@click.option("--channel", type=click.Path(file_okay=False, path_type=Path), help="Another folder than channel/.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=8400, show_default=True, type=click.IntRange(0, 65535), help="0: a free one.")
@click.option("--public", is_flag=True, help="Reading needs no token.")
@click.option("--certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TLS: PEM chain.")
@click.option("--key", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TLS: PEM private key.")
@click.option("--behind-proxy", is_flag=True, help="Allow plain HTTP beyond this machine: a proxy does TLS.")
@_STORE
@click.pass_context
def serve(
    context: click.Context,
    channel: Path | None,
    host: str,
    port: int,
    public: bool,
    certificate: Path | None,
    key: Path | None,
    behind_proxy: bool,
    store: Path | None,
) -> None:
    """Serve the local channel over HTTP(S): reading with a read token, publishing with a write token."""
    if context.invoked_subcommand:
        return

    settings = server.Settings(
        channel=(channel or workspace().channel).absolute(),
        host=host,
        port=port,
        public=public,
        certificate=certificate,
        key=key,
        behind_proxy=behind_proxy,
    )
    server.run(settings, _open(store), workspace())


@serve.group()
def token() -> None:
    """Make, list and revoke tokens; a running server takes notice at once."""


@token.command("add")
@click.argument("name")
@click.option("--right", type=click.Choice(["read", "write"]), default="read", show_default=True)
@click.option("--days", type=click.FloatRange(min=0), default=365.0, show_default=True, help="How long it is valid.")
@_STORE
def token_add(name: str, right: Literal["read", "write"], days: float, store: Path | None) -> None:
    """Print a new token for NAME: the only time it is seen."""
    secret = _open(store).add(name, right, days)
    say(f"A {right} token for '{name}', valid for {days:g} days. Only its hash is kept here:")
    out.print(secret, markup=False)


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
@_STORE
def token_list(as_json: bool, store: Path | None) -> None:
    """List the tokens by name, without the tokens themselves."""
    tokens = _open(store).all()
    if as_json:
        rows = [{"name": t.name, "right": t.right, "expires": t.expires, "expired": t.expired} for t in tokens]
        out.print_json(json.dumps(rows))
        return
    table = FoldingTable("name", "right", "valid until")
    for item in tokens:
        day = time.strftime("%Y-%m-%d", time.gmtime(item.expires))
        table.add_row(item.name, item.right, f"{day} (expired)" if item.expired else day)
    out.print(table)
    if not tokens:
        say(f"There are none; '{launcher()} serve token add NAME' makes one.")


@token.command("revoke")
@click.argument("name")
@_STORE
def token_revoke(name: str, store: Path | None) -> None:
    """Make NAME's token worthless."""
    _open(store).revoke(name)
    say(f"The token '{name}' is revoked.")
