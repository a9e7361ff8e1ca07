"""``publish``: built packages into a channel that others install from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from ssm_forge.base import paths
from ssm_forge.base.credentials import redact, require_clean
from ssm_forge.base.own_tools import require
from ssm_forge.base.ui import note, open_log, out, say
from ssm_forge.channel import statement as trust
from ssm_forge.publish import send as publishing
from ssm_forge.publish import wheels as publishing_wheels


@click.command()
@click.argument("packages", nargs=-1)
@click.option("--to", "to", required=True, metavar="URL", help="Folder, s3://, http(s)://, quetz://, artifactory://.")
@click.option(
    "--sign-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="SSM_FORGE_SIGN_KEY",
    help="Private key for a signed statement beside each package.  [env: SSM_FORGE_SIGN_KEY]",
)
@click.option(
    "--attestation",
    "attestations",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A sigstore bundle made elsewhere (CI), stored beside the package that it is about.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def publish(
    packages: tuple[str, ...], to: str, sign_key: Path | None, attestations: tuple[Path, ...], as_json: bool
) -> None:
    """Publish PACKAGES (files, or names of built packages; all of them by default) to the channel at URL.

    Conda packages and wheels alike; wheels go to folders and to servers of `serve`.

    Credentials come from RATTLER_AUTH_FILE, netrc, the keyring or the environment. What the channel has is
    skipped; a different file under the same name is never replaced.
    """
    require("boto3" if to.startswith("s3:") else "httpx", "cryptography")

    require_clean(to)
    workspace = paths.workspace()
    wheels, names = publishing_wheels.select(packages, workspace.channel)
    if wheels and not packages and not publishing_wheels.takes_wheels(to):
        note(f"{redact(to)} has no place for wheels; {len(wheels)} stay where they are.")
        wheels = []
    all_of_them = not packages and (not wheels or any(workspace.channel.glob("*/*.conda")))
    chosen = publishing.select(names, workspace.channel) if names or all_of_them else []
    with open_log(workspace.logs, "publish") as log:
        statements = trust.writer(sign_key, attestations)
        published = publishing.publish(chosen, to, statements=statements, log=log) if chosen else []
        if wheels:
            statements = trust.writer(sign_key, attestations, lambda wheel: wheel.provenance())
            published += publishing_wheels.publish(wheels, to, statements=statements, log=log)
    for item in published:
        signed = ", with its signed statement" if item.statement else ""
        say(f"{item.filename}: {item.outcome}{signed}")
    say(f"{redact(to)} has all {len(published)} packages. Full log: {log.path}")
    statements_wanted = bool(sign_key or attestations)
    if statements_wanted and not all(item.statement for item in published):
        note("this kind of server has no place for statements; they were not stored.")
    if as_json:
        out.print_json(json.dumps([asdict(item) for item in published]))
