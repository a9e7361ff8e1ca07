"""One archive that installs an environment with no network at all: channel, lock, built kernels.

Layout of the archive (an uncompressed tar, since packages are compressed already)::

    ssm-forge-NAME/pack.json        what it is: environment, platform, kernels, how to install it
    ssm-forge-NAME/pixi.lock        the environment, kernels included, with hashes
    ssm-forge-NAME/channel/SUBDIR/  the packages, indexed: any conda tool can use it as a channel
    ssm-forge-NAME/install.sh       with --with-tools: installs with nothing but Python
    ssm-forge-NAME/tools/ wheels/   with --with-tools: this project, and what it runs with
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rattler import RepoDataRecord

from ssm_forge.base import files, foreign
from ssm_forge.base.arch import Capability
from ssm_forge.base.errors import InstallError, IntegrityError, SolveError, UsageError
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.platforms import LINUX_64
from ssm_forge.base.unpacking import DAMAGE, Member, is_damage
from ssm_forge.channel import folder as channels
from ssm_forge.channel import policy
from ssm_forge.install import from_lock as environment
from ssm_forge.install.downloads import Mirror, collect, local_file, require_plain_names
from ssm_forge.install.integrity import Report
from ssm_forge.install.marker import Installed, installed_from
from ssm_forge.install.registry import remember
from ssm_forge.manifest.environments import Platform
from ssm_forge.manifest.recipe import PROJECTS
from ssm_forge.manifest.virtual import VirtualPackage, virtual_packages
from ssm_forge.package.installed import engine_records
from ssm_forge.package.write import EPOCH
from ssm_forge.solve.lock import LockedEnvironment, read, write_locked
from ssm_forge.solve.solver import Request, solve

FORMAT = 1

# Packages that were never on a server (kernels, bridge) are locked under this URL on every machine.
LOCAL_CHANNEL = "file:///ssm-forge/channel/"

# What an environment may be called: a name that can only be a folder's, wherever an archive comes from.
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{,127}")
_FIELDS: dict[str, Callable[[object], bool]] = {
    "format": foreign.is_number,
    "environment": foreign.is_text,
    "subdir": foreign.is_file_name,
    "packages": foreign.is_number,
    "kernels": lambda value: isinstance(value, list) and all(map(foreign.is_file_name, value)),
}


@dataclass(frozen=True)
class Pack:
    """What pack.json says of an archive.

    Attributes:
        format: of the archive; readers refuse a newer one.
        environment: name in the lock.
        subdir: conda platform of the packages.
        packages: how many.
        kernels: file names of the packages built by ssm-forge.
        installed: what ssm-forge knows of the environment (variant, Python, source), or None.
    """

    format: int
    environment: str
    subdir: str
    packages: int
    kernels: tuple[str, ...]
    installed: Installed | None


class Unpacked(NamedTuple):
    """An environment that was installed from an archive.

    Attributes:
        prefix: where it is.
        report: what its verification gave.
    """

    prefix: Path
    report: Report


def add_kernels(locked: LockedEnvironment, workspace: Workspace, *, gpu: Capability | None = None) -> LockedEnvironment:
    """A locked environment with the kernels of the workspace's channel that fit it as it is.

    Args:
        locked: the environment.
        workspace: whose channel to look in.
        gpu: the GPU of the machine that the pack is for; without it only portable kernels are taken.

    Raises:
        SolveError: when the channel has none that fit.
    """
    hint = (
        f"Build them with '{launcher()} install-mamba --variant {locked.name}', name the other machine's GPU with "
        "--gpu if they are for one generation, or pack with --no-kernels."
    )
    gpu_package = (VirtualPackage("__cuda_arch", str(gpu)),) if gpu else ()
    if not (workspace.channel / locked.platform.subdir / "repodata.json").exists():
        raise SolveError(f"{workspace.channel} holds no built kernels for {locked.name}.", fix=hint)
    names = [r.name.normalized for r in locked.records]
    request = Request(
        specs=(*PROJECTS, *names),
        channels=(workspace.channel.resolve().as_uri(),),
        virtual=(*locked.platform.virtual, *gpu_package),
        subdir=locked.platform.subdir,
        snapshot=workspace.channel,
        pinned=locked.records,
        extra={r.file_name: json.loads(r.to_json()) for r in locked.records},
        purpose=f"the kernels on top of environment {locked.name}",
    )
    try:
        solved = solve(request)
    except SolveError as error:
        raise SolveError(error.what, fix=hint) from error
    kernels = [r for r in solved if r.name.normalized not in set(names)]
    records = sorted([*locked.records, *kernels], key=lambda r: r.name.normalized)
    return LockedEnvironment(locked.name, locked.channels, locked.platform, tuple(records))


def of_prefix(prefix: Path) -> LockedEnvironment:
    """An installed environment as if it were locked: exactly the packages that are there.

    Raises:
        InstallError: when ``prefix`` is not a conda environment.
    """
    records: tuple[RepoDataRecord, ...] = engine_records(prefix)
    if not records:
        raise InstallError(f"{prefix} is not a conda environment (it has no package records in conda-meta).")
    urls = dict.fromkeys(f"{r.url.rsplit('/', 2)[0]}/" for r in records)
    subdir = next((r.subdir for r in records if r.subdir != "noarch"), LINUX_64.subdir)
    platform = Platform(subdir, subdir, virtual_packages(subdir=subdir))
    return LockedEnvironment(_plain_name(prefix.name), tuple(urls), platform, records)


def _plain_name(text: str) -> str:
    """The name of a folder in the letters that :func:`unpack` takes."""
    return re.sub(r"[^a-z0-9_.-]", "-", text.lower()).lstrip("_.-") or "environment"


def pack(
    locked: LockedEnvironment,
    target: Path,
    *,
    mirrors: Sequence[Mirror],
    workspace: Workspace,
    installed: Installed | None = None,
    add_tools: Callable[[Path], None] | None = None,
) -> Pack:
    """Write a locked environment as the archive ``target``, which appears whole or not at all; returns its pack.json.

    Args:
        mirrors: where packages are taken from instead.
        installed: what ssm-forge knows of the environment, None where it knows nothing.
        add_tools: adds the tools to the folder that becomes the archive; None for an archive without them.

    Raises:
        IntegrityError: when a package's bytes are not the locked ones.
        NetworkError: when a package can't be downloaded.
    """
    workspace.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace.cache, prefix="pack-") as scratch:
        top = Path(scratch) / f"ssm-forge-{locked.name}"
        channel = top / "channel"
        collect(locked.records, mirrors, channel, workspace)
        _add_statements(locked, mirrors, channel, policy.find(None, workspace))
        channels.index(channel)
        write_locked((_portable(locked),), top / "pixi.lock")
        kernels = tuple(r.file_name for r in locked.records if r.name.normalized in PROJECTS)
        contents = Pack(FORMAT, locked.name, locked.platform.subdir, len(locked.records), kernels, installed)
        (top / "pack.json").write_text(json.dumps(asdict(contents), indent=2) + "\n", encoding="utf-8")
        if add_tools is not None:
            add_tools(top)
        _write_tar(top, target)
    return contents


def _add_statements(
    locked: LockedEnvironment, mirrors: Sequence[Mirror], channel: Path, rules: Sequence[policy.Rule]
) -> None:
    """Signed statements travel with their packages: whoever unpacks may ask for them, and has no network."""
    for record in locked.records:
        data = policy.statement_for(record, rules, local_file(record, mirrors))
        if data is not None:
            target = channel / record.subdir / f"{record.file_name}.sigs"
            files.write_whole(target, data)
            files.write_whole(target.with_name(f"{target.name}.{hashlib.sha256(data).hexdigest()}"), data)


def _portable(locked: LockedEnvironment) -> LockedEnvironment:
    """No path of this machine in the lock: what is local is locked under :data:`LOCAL_CHANNEL`."""
    records = []
    for record in locked.records:
        url, channel = record.url, str(record.channel or "")
        if url.startswith("file://"):
            url, channel = f"{LOCAL_CHANNEL}{record.subdir}/{record.file_name}", LOCAL_CHANNEL
        records.append(RepoDataRecord(record, record.file_name, url, channel))
    urls = [LOCAL_CHANNEL if url.startswith("file://") else url for url in locked.channels]
    if any(r.url.startswith(LOCAL_CHANNEL) for r in records):
        urls.insert(0, LOCAL_CHANNEL)
    return LockedEnvironment(locked.name, tuple(dict.fromkeys(urls)), locked.platform, tuple(records))


def _write_tar(top: Path, target: Path) -> None:
    """The same content gives the same bytes: order, times and owners are fixed."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.mtime = EPOCH
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
        return member

    target.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(target) as partial, tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(p for p in top.rglob("*") if p.is_file() and p.name != ".lock"):
            tar.add(path, path.relative_to(top.parent).as_posix(), recursive=False, filter=plain)


def unpack(
    source: Path,
    prefix: Path | None,
    *,
    workspace: Workspace,
    force: bool = False,
    trust: Path | None = None,
) -> Unpacked:
    """Install an archive, or the folder it was unpacked to, and verify the result. Uses no network.

    Args:
        prefix: where to; None for ``.pixi/envs/NAME``.
        trust: the policy that is asked for, else the one in force here.

    Raises:
        UsageError: when ``source`` is not a pack, or ``prefix`` exists and ``force`` is not set.
        IntegrityError: when the archive is damaged, or a package in it lacks the statement that the policy asks for.
    """
    with _opened(source, workspace) as top:
        contents = _read_pack(top, source)
        environments = read(top / "pixi.lock")
        if len(environments) != 1:
            raise IntegrityError(f"the lock of {source} has {len(environments)} environments, and a pack has one.")
        locked = environments[0]
        require_plain_names(locked.records)
        target = (prefix or workspace.envs / contents.environment).absolute()
        mirrors = [Mirror(url, top / "channel") for url in locked.channels]
        missing = [r for r in locked.records if not (top / "channel" / r.subdir / r.file_name).is_file()]
        if missing:
            raise IntegrityError(f"{source} lacks {missing[0].file_name}, which its lock names.", fix="Copy it again.")
        report = environment.create(
            locked,
            target,
            mirrors=mirrors,
            workspace=workspace,
            force=force,
            installed=contents.installed,
            rules=policy.for_channels(trust, locked.channels, workspace),
        )
    if contents.installed:
        remember(target, workspace)
    return Unpacked(target, report)


def _read_pack(top: Path, source: Path) -> Pack:
    """What pack.json says; nothing of it is believed that it should not say."""
    unusable = UsageError(f"{source} was not written by '{launcher()} pack' (no usable pack.json).")
    try:
        data = foreign.json_from(foreign.read_bytes(top / "pack.json"))
        foreign.require(data, _FIELDS)
    except (OSError, ValueError) as error:
        raise unusable from error
    if data["format"] > FORMAT:
        raise UsageError(
            f"{source} has format {data['format']}; this ssm-forge reads up to {FORMAT}.", fix="Update it."
        )
    if not _NAME.fullmatch(data["environment"]):
        raise IntegrityError(
            f"{source} calls its environment {data['environment']!r:.80}, which is no name of one; "
            "nothing was installed.",
            fix="Ask whoever made the archive; do not install it.",
        )
    if set(data) - {"installed"} != set(_FIELDS):
        raise unusable
    kernels = tuple(data["kernels"])
    try:
        # Of the packages, those that the pack itself holds are believed.
        fields = data.get("installed")
        installed = None if fields is None else replace(installed_from(fields), packages=kernels)
    except ValueError as error:
        raise unusable from error
    return Pack(**{**data, "kernels": kernels, "installed": installed})


@contextmanager
def _opened(source: Path, workspace: Workspace) -> Iterator[Path]:
    """The folder inside the archive, unpacked to a scratch place unless it is a folder already."""
    if source.is_dir():
        yield source
        return
    if not source.is_file():
        raise UsageError(f"{source} does not exist.")
    workspace.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace.cache, prefix="unpack-") as scratch:
        try:
            with tarfile.open(source, "r:", tarinfo=Member) as tar:
                for member in tar:
                    _extract(tar, member, Path(scratch))
        except (*DAMAGE, OSError) as error:
            if not is_damage(error):
                raise
            raise IntegrityError(f"{source} is not a whole archive ({error}).", fix="Copy it again.") from error
        tops = [p for p in Path(scratch).iterdir() if p.is_dir()]
        if len(tops) != 1:
            raise UsageError(f"{source} was not written by '{launcher()} pack'.")
        yield tops[0]


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Plain files below ``folder`` and nothing else: an archive may come from anywhere."""
    if member.isdir():
        return
    target = (folder / member.name).resolve()
    if not member.isfile() or not target.is_relative_to(folder.resolve()):
        raise IntegrityError(f"the archive holds '{member.name}', which no pack does; nothing was installed.")
    stream = tar.extractfile(member)
    assert stream is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        while chunk := stream.read(1 << 20):
            out.write(chunk)
    target.chmod(0o755 if member.mode & 0o100 else 0o644)
