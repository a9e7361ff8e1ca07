"""Publishing to servers that index by themselves, by the engine's own uploads.

Quetz, Artifactory, prefix.dev and anaconda.org.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from ssm_forge.base.credentials import Credential, find, redact
from ssm_forge.base.errors import NetworkError, UsageError
from ssm_forge.base.web import Client, TransientError
from ssm_forge.channel.source import records_at
from ssm_forge.publish.target import Advance, Outcome, Parcel, Publishable, Target, compare

Upload = Callable[[list[str], str | None], None]


@dataclass(frozen=True)
class Hosted:
    """One channel on a hosted server, and how files get there.

    Attributes:
        read_url: the channel, as installers read it.
        login_url: address whose credentials are meant.
        variable: environment variable that holds a key, where the engine's own stores do not.
        upload: sends files, given a key or None for the engine's own stores.
        takes: kinds of credential that the server's upload takes, the usual one first.
    """

    read_url: str
    login_url: str
    variable: str
    upload: Upload
    takes: tuple[str, ...]


def target(url: str) -> Target | None:
    """The publisher for a hosted channel, or None when the URL names none of them.

    ``quetz://`` and ``artifactory://`` mean HTTPS; ``quetz+http://`` and ``artifactory+http://`` are for
    tests and for servers behind a tunnel.

    Raises:
        UsageError: when the channel's name is missing.
    """
    parts = urlsplit(url)
    kind, _, transport = parts.scheme.partition("+")
    base = f"{transport or 'https'}://{parts.netloc}"
    path = parts.path.strip("/")
    if parts.hostname in ("prefix.dev", "repo.prefix.dev"):
        kind, base = "prefix", "https://prefix.dev"
    elif parts.hostname in ("anaconda.org", "conda.anaconda.org"):
        kind, base = "anaconda", "https://api.anaconda.org"
    makers = {"quetz": _quetz, "artifactory": _artifactory, "prefix": _prefix, "anaconda": _anaconda}
    if kind not in makers:
        return None
    if not path:
        raise UsageError(f"{url} names a server, but no channel on it.", fix=f"Write {url.rstrip('/')}/CHANNEL.")
    return HostedTarget(makers[kind](base, path))


def _quetz(base: str, path: str) -> Hosted:
    from rattler_build import upload_package_to_quetz

    def upload(files: list[str], key: str | None) -> None:
        upload_package_to_quetz(files, base, path, api_key=key)

    return Hosted(f"{base}/get/{path}", base, "QUETZ_API_KEY", upload, ("conda", "bearer"))


def _artifactory(base: str, path: str) -> Hosted:
    from rattler_build import upload_package_to_artifactory

    front, _, repository = path.rpartition("/")
    server = f"{base}/{front}/" if front else f"{base}/"

    def upload(files: list[str], key: str | None) -> None:
        upload_package_to_artifactory(files, server, repository, token=key)

    return Hosted(f"{server}{repository}", base, "ARTIFACTORY_TOKEN", upload, ("bearer",))


def _prefix(base: str, path: str) -> Hosted:
    from rattler_build import upload_package_to_prefix

    def upload(files: list[str], key: str | None) -> None:
        upload_package_to_prefix(files, base, path, api_key=key)

    read = "https://repo.prefix.dev" if base == "https://prefix.dev" else base
    return Hosted(f"{read}/{path}", base, "PREFIX_API_KEY", upload, ("bearer",))


def _anaconda(base: str, path: str) -> Hosted:
    from rattler_build import upload_package_to_anaconda

    owner, _, label = path.partition("/label/")

    def upload(files: list[str], key: str | None) -> None:
        upload_package_to_anaconda(files, owner, channel=[label or "main"], api_key=key, url=base)

    read = "https://conda.anaconda.org" if base == "https://api.anaconda.org" else base
    return Hosted(f"{read}/{path}", "https://anaconda.org", "ANACONDA_API_KEY", upload, ("conda", "bearer"))


class HostedTarget:
    """A channel on such a server, with the methods of :class:`Target`.

    What the channel has is read from its index, what it lacks is sent by the engine.
    """

    def __init__(self, hosted: Hosted) -> None:
        self._hosted = hosted
        self._reader = Client(hosted.read_url)
        if not self._reader.has_credential and (key := self._key()):
            self._reader.use(Credential("", key, hosted.takes[0], hosted.variable))

    def present(self, package: Publishable) -> str | None:
        return compare(package, records_at(self._reader, package.subdir).get(package.filename))

    def upload(self, parcel: Parcel, advance: Advance) -> Outcome:
        from rattler_build import RattlerBuildError

        package = parcel.package
        try:
            self._hosted.upload([str(package.path)], self._key())
        except RattlerBuildError as error:
            raise self._explained(error, package) from error
        advance(package.size)
        return "added"

    def attach(self, parcel: Parcel) -> bool:
        """These servers have no place beside a package that an installer would look into."""
        return False

    def finish(self, parcels: Sequence[Parcel]) -> None:
        """The server indexes by itself, some time after it has said yes."""

    def _key(self) -> str | None:
        """The key to upload with; None lets the engine look into its own stores."""
        key = os.environ.get(self._hosted.variable)
        if key:
            return key
        credential = find(self._hosted.login_url)
        return credential.secret if credential and credential.kind in self._hosted.takes else None

    def _explained(self, error: Exception, package: Publishable) -> NetworkError:
        """The engine's error; it has tried passing failures three times itself, and often tells no more than that."""
        text = redact(" ".join(str(error).split()))
        message = f"{self._hosted.read_url} did not take {package.filename}: {text.rstrip('.')}."
        if any(word in text.lower() for word in ("connect", "timed out", "dns", "sending request")):
            return TransientError(message)
        return NetworkError(
            message,
            fix=f"Check that the channel exists, and that the key for {self._hosted.login_url} (RATTLER_AUTH_FILE or "
            f"{self._hosted.variable}) may write to it.",
        )
