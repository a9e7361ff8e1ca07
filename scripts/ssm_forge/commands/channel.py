"""``channel``: housekeeping of a channel, and the keys that sign for its packages."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import click

from ssm_forge.base.credentials import require_clean
from ssm_forge.base.errors import VerifyError
from ssm_forge.base.own_tools import require
from ssm_forge.base.paths import launcher, workspace
from ssm_forge.base.ui import human_bytes, note, open_log, out, say
from ssm_forge.channel import check as channel_check
from ssm_forge.channel import coverage as covering
from ssm_forge.channel import mirror as channel_mirror
from ssm_forge.channel import prune as channel_prune
from ssm_forge.channel import statement as trust
from ssm_forge.channel import wheel_upkeep as upkeep
from ssm_forge.channel.source import ChannelSource, FolderSource, open_source
from ssm_forge.manifest import variants

_CHANNEL = click.argument("channel", required=False)
_JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@click.group()
def channel() -> None:
    """Check, prune or mirror a channel, show what it covers. CHANNEL: a folder or URL, else the local one."""
    require("msgpack", "cryptography")


def _source(channel: str | None) -> ChannelSource:

    return open_source(channel or str(workspace().channel))


def _folder(channel: Path | None) -> Path:
    return (channel or workspace().channel).absolute()


@channel.command()
@_CHANNEL
@click.option("--repair", is_flag=True, help="First index what is sound, set aside what is damaged.")
@_JSON
def check(channel: str | None, repair: bool, as_json: bool) -> None:
    """Every listed file present and intact, the index in step, nothing unlisted lying about."""

    source = _source(channel)
    if repair:
        if not isinstance(source, FolderSource):
            raise click.UsageError("--repair works on a folder.")
        for line in (*channel_check.repair(source.folder), *upkeep.repair(source.folder)):
            note(line)
    problems, count = channel_check.check(source)
    wheel_problems, wheels = upkeep.check(source)
    problems += wheel_problems
    if as_json:
        documents = [asdict(problem) for problem in problems]
        out.print_json(json.dumps({"channel": source.name, "packages": count, "wheels": wheels, "problems": documents}))
    else:
        for problem in problems:
            out.print(str(problem), markup=False)
        verdict = f"{len(problems)} problems" if problems else "all listed, present and intact"
        counted = f"{count} packages" + (f" and {wheels} wheels" if wheels else "")
        out.print(f"{source.name}: {counted}, {verdict}", markup=False)
        if not isinstance(source, FolderSource):
            say("not checked: files that the index does not list (a server does not show them), and what packages hold")
    if problems:
        raise VerifyError(
            f"{source.name} is not in order: {problems[0]}"
            + (f" (and {len(problems) - 1} more)." if len(problems) > 1 else "."),
            fix=f"'{launcher()} channel check --repair' lists what is sound and sets aside what is damaged; publish "
            "what is missing.",
        )


@channel.command()
@click.argument("channel", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Newest builds a variant that stay.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_JSON
def prune(channel: Path | None, keep: int, dry_run: bool, as_json: bool) -> None:
    """Remove superseded packages, old shards and unfinished uploads from a channel folder."""

    result = channel_prune.prune(_folder(channel), keep=keep, dry_run=dry_run)
    result += upkeep.prune(_folder(channel), keep=keep, dry_run=dry_run)
    if as_json:
        out.print_json(json.dumps({**asdict(result), "dry_run": dry_run}))
        return
    for path in (*result.packages, *result.other):
        out.print(path, markup=False)
    verb = "would go" if dry_run else "removed"
    files = len(result.packages) + len(result.other)
    say(f"{len(result.packages)} packages, {files} files, {human_bytes(result.size)} {verb}.")


@channel.command()
@click.argument("source")
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", multiple=True, metavar="PATTERN", help="Only files that fit, e.g. 'mamba-ssm-*cuda118*'.")
@_JSON
def mirror(source: str, target: Path, only: tuple[str, ...], as_json: bool) -> None:
    """Copy SOURCE (folder or URL) into the folder TARGET, each file verified: for air-gapped machines."""

    opened = open_source(source)
    with open_log(workspace().logs, "mirror") as log:
        copied, present = channel_mirror.mirror(opened, target.absolute(), only=only, log=log)
        wheels = upkeep.mirror(opened, target.absolute(), only=only, log=log)
        copied, present = copied + wheels.copied, present + wheels.present
    if as_json:
        out.print_json(json.dumps({"source": opened.name, "target": str(target), "copied": copied, "there": present}))
    use = f"--channel {shlex.quote(str(target))}"
    say(f"{target}: {copied} packages copied, {present} were there. Install from it with {use}.")


@channel.command()
@_CHANNEL
@click.option(
    "--html",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a static page to this file.",
)
@click.option("--url", help="The channel's address as the page shows it.")
@_JSON
def coverage(channel: str | None, page: Path | None, url: str | None, as_json: bool) -> None:
    """The table of what exists for each variant and Python."""

    source = _source(channel)
    table = covering.rows([*covering.items(source), *upkeep.items(source)], variants.load(workspace().variants))
    if page:
        covering.write_page(table, require_clean(url or source.name), page)
        say(f"{page} written.")
    if as_json:
        out.print_json(json.dumps(covering.as_dicts(table)))
    elif not page:
        out.print(covering.table(table))


@channel.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", default="channel", show_default=True, help="NAME.key and NAME.pub are written.")
def keygen(folder: Path, name: str) -> None:
    """Make a key pair in FOLDER: the private one signs, the public one goes into a trust policy."""

    private, public = trust.make_key(folder, name)
    say(f"{private}: keep it offline; '{launcher()} publish --sign-key {shlex.quote(str(private))}' signs with it.")
    say(f"{public}: give it to whoever installs, for their trust policy.")
