"""Publishing: finished packages, with their signed statements, into a channel somewhere.

The same rules everywhere: what is there with the same bytes is skipped, another file under the same name is
never replaced, a transient failure is tried again, and a run that was cut goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ssm_forge.base.credentials import for_engine, redact, require_clean
from ssm_forge.base.errors import UsageError, did_you_mean
from ssm_forge.base.paths import launcher
from ssm_forge.base.ui import download_progress
from ssm_forge.base.web import TransientError as TransientError  # What targets raise.
from ssm_forge.base.web import retrying
from ssm_forge.channel import folder as channels
from ssm_forge.package.read import Package, inspect
from ssm_forge.publish import to_hosted, to_http
from ssm_forge.publish.target import Advance, Outcome, Parcel, Publishable, Target
from ssm_forge.publish.to_folder import FolderTarget
from ssm_forge.publish.to_s3 import S3Target


@dataclass(frozen=True)
class Published:
    """What became of one package.

    Attributes:
        sha256: of the package, hex.
        statement: whether its signed statement lies beside it.
    """

    filename: str
    sha256: str
    outcome: Outcome
    statement: bool


def target(url: str) -> Target:
    """The channel that ``--to`` names by path or URL.

    Raises:
        UsageError: for an URL that is none, or holds a secret.
    """
    require_clean(url)
    parts = urlsplit(url)
    scheme = parts.scheme
    if scheme in ("", "file"):
        return FolderTarget(Path(unquote(parts.path) if scheme else url).expanduser().absolute())
    if scheme == "s3":
        return S3Target(url)

    hosted = to_hosted.target(url)
    if hosted is not None:
        return hosted
    if scheme in ("http", "https"):
        return to_http.target(url)
    raise UsageError(
        f"'{redact(url)}' is no channel that can be published to.",
        fix="Use a folder, s3://, http(s)://, quetz://, artifactory://, https://prefix.dev/NAME or "
        "https://anaconda.org/NAME.",
    )


def publish(
    paths: Sequence[Path],
    to: str,
    *,
    statements: Callable[[Package], bytes] = lambda package: b"",
    log: Callable[[str], None] = lambda line: None,
) -> list[Published]:
    """Publish ``paths`` and return what became of each.

    Args:
        statements: gives the sidecar for a package.
        log: takes a line for each step; never a secret.

    Raises:
        UsageError: for a file that is not there, or an URL that is no channel.
        IntegrityError: for a file that is no package, or another file of the same name in the channel.
        NetworkError: when the server can't be reached or refuses.
        MachineError: when the disk is full.
    """
    destination = target(to)
    parcels = []
    for path in paths:
        if not path.is_file():
            raise UsageError(
                f"{path} does not exist.", fix=f"'{launcher()} publish' without names takes all there are."
            )
        package = inspect(path)
        parcels.append(Parcel(package, statements(package)))
    return send(destination, parcels, to, log)


def send(destination: Target, parcels: Sequence[Parcel], to: str, log: Callable[[str], None]) -> list[Published]:
    """Bring checked files to a target; arguments and errors are those of :func:`publish`."""
    published: list[Published] = []
    with for_engine(), download_progress() as progress:
        # A conflict is found before anything is sent: one in the last package leaves no half of the others.
        present = {p.package.filename: _present(destination, p.package, to) for p in parcels}
        missing = [p for p in parcels if present[p.package.filename] is None]
        bar = progress.add_task(
            f"publishing {len(missing)} packages", total=sum(p.package.size for p in missing) or None
        )
        for parcel in parcels:
            package = parcel.package
            outcome: Outcome = "was there"
            if present[package.filename] is None:
                outcome = _upload(destination, parcel, lambda count: progress.advance(bar, count), log)
            has_statement = bool(parcel.statements) and _attach(destination, parcel, log)
            published.append(Published(package.filename, package.sha256, outcome, has_statement))
            log(f"{package.filename} sha256 {package.sha256}: {outcome}, statement: {has_statement}")
        retrying(lambda: destination.finish(parcels), log)
    return published


def _present(destination: Target, package: Publishable, to: str) -> str | None:
    present_sha256 = retrying(lambda: destination.present(package))
    if present_sha256 is not None and present_sha256 != package.sha256:
        raise channels.different(package.filename, redact(to))
    return present_sha256


def _upload(destination: Target, parcel: Parcel, advance: Advance, log: Callable[[str], None]) -> Outcome:
    return retrying(lambda: destination.upload(parcel, advance), log)


def _attach(destination: Target, parcel: Parcel, log: Callable[[str], None]) -> bool:
    return retrying(lambda: destination.attach(parcel), log)


def select(names: Sequence[str], channel: Path) -> list[Path]:
    """The package files that a user means: paths, or names in the local channel; all when none is named.

    Raises:
        UsageError: when a name fits nothing, or there is nothing at all.
    """
    everything = [path for subdir in channels.subdirs(channel) for path in sorted((channel / subdir).glob("*.conda"))]
    if not names:
        if not everything:
            raise UsageError(f"{channel} has no packages.", fix=f"Build them with '{launcher()} install-mamba'.")
        return everything
    chosen: list[Path] = []
    for name in names:
        if name.endswith(".conda") and Path(name).exists():
            chosen.append(Path(name).absolute())
            continue
        fitting = [path for path in everything if path.name == name or path.name.rsplit("-", 2)[0] == name]
        if not fitting:
            names_known = {form for path in everything for form in (path.name, path.name.rsplit("-", 2)[0])}
            message = f"'{name}' is neither a package file nor a package in {channel}."
            raise UsageError(message, fix=did_you_mean(name, names_known).strip())
        chosen += fitting
    return list(dict.fromkeys(chosen))
