"""Our packages in other people's channels: looked up by exact file name, the first channel that has one wins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_forge.base import mirrors
from ssm_forge.base.credentials import for_engine, redact, require_clean
from ssm_forge.base.errors import ForgeError, IntegrityError, NetworkError
from ssm_forge.base.paths import workspace
from ssm_forge.base.platforms import LINUX_64
from ssm_forge.base.urls import is_under
from ssm_forge.base.web import HOW_TO_LOG_IN
from ssm_forge.channel import index as repodata
from ssm_forge.channel.local_index import require_readable
from ssm_forge.manifest.virtual import channel_url, subdir_type

_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class ListedPackage:
    """A package that a channel lists.

    Attributes:
        channel: the channel's URL, ending in a slash.
        sha256: of the package file, hex, as the channel's index says.
    """

    channel: str
    sha256: str


def channel_urls(channels: Sequence[str]) -> tuple[str, ...]:
    """The URLs of what ``--channel`` names: folders, URLs, or names such as ``conda-forge``.

    Raises:
        UsageError: for an URL that holds a secret.
    """

    return tuple(
        Path(name).resolve().as_uri() if Path(name).is_dir() else channel_url(require_clean(name)) for name in channels
    )


@for_engine()
def find(filename: str, channels: Sequence[str], subdir: str = LINUX_64.subdir) -> ListedPackage | None:
    """The first of ``channels`` that lists ``filename``, read as the solver reads them, or None.

    Raises:
        NetworkError: when a channel can't be read: silently compiling for an hour instead helps nobody.
        DamagedIndexError: when its index is no index.
    """
    import rattler
    import rattler.exceptions

    name, version, build = filename.removesuffix(".conda").rsplit("-", 2)
    cache = workspace().cache / "repodata"
    cache.mkdir(parents=True, exist_ok=True)
    platforms = [subdir_type(subdir), subdir_type("noarch")]
    spec = rattler.MatchSpec(f"{name} =={version} {build}")
    for url in channels:
        gateway = rattler.Gateway(cache_dir=cache, client=mirrors.client(timeout=_TIMEOUT_SECONDS))
        try:
            answers = asyncio.run(gateway.query([rattler.Channel(url)], platforms, [spec], recursive=False))
        except (rattler.exceptions.GatewayError, rattler.exceptions.FetchRepoDataError) as error:
            # A failed gateway leaves threads behind that crash the interpreter if it ends at once.
            time.sleep(0.5)
            raise _unreadable(url, subdir, error) from error
        for record in (record for answer in answers for record in answer):
            if record.file_name == filename and record.sha256:
                return ListedPackage(url.rstrip("/") + "/", record.sha256.hex())
    return None


def require_origin(filename: str, url: str, channel: str) -> None:
    """Make sure that the solver took a package from the channel that it was planned from.

    Raises:
        IntegrityError: when it took it from elsewhere.
    """
    if channel and not is_under(url, channel):
        raise IntegrityError(
            f"{filename} was to come from {redact(channel)}, but the solver took {redact(url)}. Nothing was installed.",
            fix="Name the channel that is to be trusted first, and alone.",
        )


def _unreadable(url: str, subdir: str, error: Exception) -> ForgeError:

    reason = redact(str(error)).strip().splitlines()[-1].removeprefix("Caused by: ")
    require_readable((url,), subdir, None)
    if damage := repodata.damage_in(str(error)):
        return repodata.DamagedIndexError(redact(url), f"has an index that can't be read ({damage})")
    refused = any(status in str(error) for status in ("401", "403"))
    fix = HOW_TO_LOG_IN if refused else "Check the network and the URL, or leave --channel out."
    return NetworkError(f"channel {redact(url)} could not be read ({reason}).", fix=fix)
