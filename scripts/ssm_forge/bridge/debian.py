"""Debian packages as a source of files: a lock's entries in, downloaded .deb files out, and the index to renew it.

Nothing is installed on the machine; :mod:`.deb_file` unpacks. The trust chain is Debian's own
(wiki.debian.org/SecureApt): InRelease is signed and holds the sha256 of Packages.xz, which holds the sha256 of every
.deb.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import httpx
import tomlkit

from ssm_forge.base import foreign, web
from ssm_forge.base.errors import IntegrityError, NetworkError, UsageError
from ssm_forge.base.fetch import Artifact, checked, fetch_all, mirrored
from ssm_forge.base.paths import Workspace, launcher
from ssm_forge.base.platforms import LINUX_64, PLATFORMS
from ssm_forge.base.ui import say

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# The part of a snapshot archive's addresses that says when.
_SNAPSHOT_TIME = re.compile(r"/\d{8}T\d{6}Z(?=/|$)")
_GONE = (404, 410)

# What gpgv says of a signature that is refused.
_REFUSED = {
    "BADSIG": "a bad signature",
    "REVKEYSIG": "a signature of a key that was revoked",
    "EXPKEYSIG": "a signature of a key that has expired",
    "EXPSIG": "a signature that has expired",
}


@dataclass(frozen=True)
class Deb:
    """One pinned Debian package.

    Attributes:
        package: name, ``g++-11``.
        version: Debian version, ``11.3.0-12``.
        suite: release it is taken from, ``bookworm``.
        component: ``main`` or ``non-free``.
        url: where the release's pool has it.
        sha256: digest of the .deb.
        size: in bytes.
        part: where its files go, in words of the toolchain that uses the lock (``tool``, ``sysroot`` ...).
        also: other places with the same bytes, tried in order once ``url`` is gone.
    """

    package: str
    version: str
    suite: str
    component: str
    url: str
    sha256: str
    size: int
    part: str = "tool"
    also: tuple[str, ...] = field(default=())

    @property
    def archive(self) -> str:
        """The archive that the package's release is in."""
        return self.url.partition("/pool/")[0]

    @property
    def architecture(self) -> str:
        """``amd64``, ``arm64`` or ``all``, as the name of its file says."""
        return PurePosixPath(self.url).stem.rpartition("_")[2]

    @property
    def upstream(self) -> str:
        """Upstream's version in Debian's."""
        return re.split(r"[-+]", self.version.partition(":")[2] or self.version)[0]

    def artifact(self, url: str = "") -> Artifact:
        """The file to fetch, from ``url`` or from the pool."""
        return Artifact(url or self.url, self.sha256, self.size, PurePosixPath(self.url).name)


@dataclass(frozen=True)
class Index:
    """The packages of one release and component, verified against the release's InRelease.

    Attributes:
        archive: where the archive is.
        suite: ``bookworm``.
        component: ``main``.
        release: the point release, ``12.11``.
        date: when the release was signed, as in snapshot addresses: ``20261121T091544Z``.
        signature: ``checked``, or ``not checked`` and why.
        stanzas: package name -> the fields of its paragraph.
    """

    archive: str
    suite: str
    component: str
    release: str
    date: str
    signature: str
    stanzas: dict[str, dict[str, str]]

    def find(self, package: str) -> Deb:
        """The package as the release has it now.

        Raises:
            UsageError: when the release has no such package.
            IntegrityError: when what the index says of the package can't be a file.
        """
        stanza = self.stanzas.get(package)
        if stanza is None:
            raise UsageError(f"Debian {self.suite} {self.component} has no package '{package}'.")
        try:
            fields = {
                "package": package,
                "version": stanza["Version"],
                "suite": self.suite,
                "component": self.component,
                "url": f"{self.archive}/{stanza['Filename']}",
                "sha256": stanza["SHA256"],
                "size": int(stanza["Size"][:20]),
            }
            return _deb({**fields, "also": []})
        except (KeyError, ValueError) as error:
            raise IntegrityError(
                f"the index of Debian {self.suite} has a package '{package}' that can't be used ({error})."
            ) from error


@functools.lru_cache
def load_index(
    archive: str, suite: str, component: str, workspace: Workspace, architecture: str = LINUX_64.debian
) -> Index:
    """Download and verify the package list of a release (main is 9 MB, non-free 0.1 MB; cached by hash).

    Raises:
        NetworkError: when the archive does not answer.
        IntegrityError: when the signature is bad, or the list is damaged or not the one that InRelease names.
    """
    base = f"{archive}/dists/{suite}"
    try:
        answer = web.get(mirrored(f"{base}/InRelease")).raise_for_status()
    except httpx.HTTPError as error:
        raise NetworkError(
            f"the package index of Debian {suite} could not be read ({type(error).__name__}: {error}).",
            fix="Check the network (SSM_FORGE_MIRRORS=FROM=TO sets a mirror) and run the same command again.",
        ) from error
    try:
        text, signature = _verified(answer.content, suite)
    except ValueError as error:
        raise IntegrityError(f"InRelease of Debian {suite} is no text ({error}).") from error
    folder = f"{component}/binary-{architecture}"
    name = f"{folder}/Packages.xz"
    entry = re.search(rf"^ ([0-9a-f]{{64}}) +(\d+) {re.escape(name)}$", text, re.MULTILINE)
    if entry is None:
        raise IntegrityError(f"InRelease of Debian {suite} does not list {name}.")
    digest, size = entry.group(1), int(entry.group(2))
    listing = Artifact(f"{base}/{folder}/by-hash/SHA256/{digest}", digest, size, "Packages.xz")
    path = fetch_all([listing], workspace)[listing]
    try:
        stanzas = read_packages(path.read_bytes())
        release = read_release(text)
    except ValueError as error:
        raise IntegrityError(f"the package index of Debian {suite} is damaged ({error}).") from error
    return Index(archive, suite, component, release.version, release.date, signature, stanzas)


def index_of(deb: Deb, workspace: Workspace) -> Index:
    """The package list that a package is in; those for every architecture are in that of each."""
    every = deb.architecture not in (known.debian for known in PLATFORMS)
    architecture = LINUX_64.debian if every else deb.architecture
    return load_index(deb.archive, deb.suite, deb.component, workspace, architecture)


class Release(NamedTuple):
    """Which release an InRelease is of; see :class:`Index`."""

    version: str
    date: str


def read_release(text: str) -> Release:
    """Which release an InRelease is of.

    Raises:
        ValueError: when it does not say when.
    """
    header = _fields(text)
    try:
        date = parsedate_to_datetime(header["Date"]).strftime("%Y%m%dT%H%M%SZ")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"InRelease has the date {header.get('Date', '')!r:.40}") from error
    return Release(header.get("Version", "?"), date)


def read_packages(data: bytes) -> dict[str, dict[str, str]]:
    """A Packages.xz: package name -> the fields of its paragraph.

    Raises:
        ValueError: when it is none, or larger than any is.
    """
    paragraphs = foreign.from_xz(data).decode("utf-8").strip().split("\n\n")
    return {s["Package"]: s for s in map(_fields, paragraphs) if "Package" in s}


def _fields(paragraph: str) -> dict[str, str]:
    """The one-line fields of a deb822 paragraph; continuation lines are left out."""
    lines = (line for line in paragraph.splitlines() if line[:1].strip() and ": " in line)
    return {key: value.strip() for key, _, value in (line.partition(": ") for line in lines)}


class _Verified(NamedTuple):
    """The signed text of an InRelease; of the signature, ``checked``, or ``not checked`` and why."""

    text: str
    signature: str


def _verified(inrelease: bytes, suite: str) -> _Verified:
    """The signed text of InRelease, and whether the signature was checked.

    Only what gpgv says was signed is returned when it did check. A release that is signed with a key newer than
    the keyring can't be checked, which is reported; anything else that is no good signature is refused, or it
    would be enough to take the signature off.

    Raises:
        IntegrityError: for a signature that is bad, expired, of a revoked key, or missing.
    """
    tool = shutil.which("gpgv")
    plain = inrelease.decode("utf-8").split("-----BEGIN PGP SIGNATURE-----")[0]
    if tool is None:
        return _Verified(plain, "not checked: gpgv is not on this machine")
    if not KEYRING.exists():
        return _Verified(plain, f"not checked: {KEYRING} is not on this machine")
    with tempfile.TemporaryDirectory() as scratch:
        message, signed = Path(scratch, "InRelease"), Path(scratch, "signed")
        message.write_bytes(inrelease)
        command = [tool, "--keyring", str(KEYRING), "--status-fd", "1", "--output", str(signed), str(message)]
        status = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
        # Every signature of the file has lines of its own (doc/DETAILS of GnuPG); VALIDSIG also stands beside
        # a signature that has expired, GOODSIG only for one that is good.
        words = {line.split()[1] for line in status.splitlines() if line.startswith("[GNUPG:] ")}
        if "GOODSIG" in words and "BADSIG" not in words and signed.exists():
            return _Verified(signed.read_text(encoding="utf-8"), "checked")
    fault = next((text for word, text in _REFUSED.items() if word in words), "")
    if "NO_PUBKEY" in words and not fault:
        return _Verified(plain, f"not checked: {KEYRING} has no key for this release")
    raise IntegrityError(
        f"InRelease of Debian {suite} has {fault or 'no signature'}; nothing of it was used.",
        fix="Try again; if it happens again, the mirror or the network is not to be trusted.",
    )


def read_lock(path: Path) -> tuple[Deb, ...]:
    """The packages that ``recipes/bridge/debs.<name>.toml`` pins.

    Raises:
        UsageError: when the file is missing or is not a lock.
    """
    try:
        entries = foreign.toml_from(foreign.read_bytes(path)).get("deb")
        if not isinstance(entries, list):
            raise ValueError("it has no list of packages")
        return tuple(map(_deb, entries))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is not a lock of Debian packages ({type(error).__name__}: {error}).",
            fix=f"Restore it from git, or write it again with '{launcher()} bump bridge'.",
        ) from error


# Names and digests become paths in the cache.
_DEB: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("package", "version", "suite", "component"), foreign.is_file_name),
    "url": lambda value: isinstance(value, str) and value.isprintable() and foreign.is_file_name(_last(value)),
    "sha256": foreign.is_hex(64),
    "size": foreign.is_number,
}


def _last(url: str) -> str:
    return PurePosixPath(url).name


def _deb(entry: object) -> Deb:
    """A package as a lock or an index tells of it.

    Raises:
        ValueError: when it does not tell all of it.
    """
    foreign.require(entry, _DEB)
    foreign.require(entry, {"part": foreign.is_file_name, "also": foreign.is_list_of_text}, all_of_them=False)
    fields = dict(cast("dict[str, Any]", entry))
    odd = set(fields) - {*_DEB, "part", "also"}
    if odd:
        raise ValueError(f"it says {sorted(odd)} too")
    return Deb(**{**fields, "also": tuple(fields.get("also", ()))})


def lock_text(name: str, debs: Iterable[Deb], *, note: str) -> str:
    """The lock as text, sorted by part and package."""
    document = tomlkit.document()
    for line in [*note.splitlines(), f"Refresh with: ./run bump bridge ({name})"]:
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    entries = tomlkit.aot()
    for deb in sorted(debs, key=lambda d: (d.part, d.package)):
        entry = tomlkit.table()
        for key in ("package", "version", "part", "suite", "component", "url", "sha256", "size"):
            entry.add(key, getattr(deb, key))
        entry.add("also", list(deb.also))
        entries.append(entry)
    document.add("deb", entries)
    return tomlkit.dumps(document)


def refreshed(debs: Sequence[Deb], workspace: Workspace) -> tuple[Deb, ...]:
    """The same packages as their releases have them now; what did not move stays as it was.

    Raises:
        UsageError: when a release dropped a package.
        NetworkError, IntegrityError: from the index.
    """
    now = []
    for deb in debs:
        index = index_of(deb, workspace)
        newest = index.find(deb.package)
        if newest.sha256 == deb.sha256:
            now.append(deb)
            continue
        path = newest.url.removeprefix(newest.archive)
        also = (_SNAPSHOT_TIME.sub(f"/{index.date}", url.partition("/pool/")[0]) + path for url in deb.also)
        now.append(replace(newest, part=deb.part, also=tuple(also)))
    return tuple(now)


def fetch_debs(debs: Sequence[Deb], workspace: Workspace) -> dict[Deb, Path]:
    """Download what the cache lacks; every file is compared with its locked sha256.

    Debian's pool drops a version once a point release supersedes it. Such a file is then taken from the
    places that the lock records (``also``), or from where the release's signed index has the same bytes.

    Raises:
        NetworkError: when a file is nowhere to be had, naming the refresh command; nothing else is taken
            in its place.
        IntegrityError: when the bytes are not those of the lock.
    """
    try:
        fetch_all([deb.artifact() for deb in debs], workspace)
    except NetworkError as error:
        if not _gone(error):
            raise
        for deb in debs:
            _fetch_moved(deb, workspace)
    return {deb: checked(deb.artifact(), workspace) for deb in debs}


def _gone(error: NetworkError) -> bool:
    cause = error.__cause__
    return isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code in _GONE


def _fetch_moved(deb: Deb, workspace: Workspace) -> None:
    """Fetch a package from its pool, else a recorded place, else where the index has the same bytes."""
    try:
        fetch_all([deb.artifact()], workspace)
        return
    except NetworkError as error:
        if not _gone(error):
            raise
    say(f"{deb.package} {deb.version} left Debian's pool; looking in the places the lock records.")
    tried = []
    for url in deb.also:
        try:
            fetch_all([deb.artifact(url)], workspace)
            return
        except NetworkError as error:
            tried.append(str(error.what))
    index = index_of(deb, workspace)
    newest = index.find(deb.package)
    if newest.sha256 == deb.sha256:
        fetch_all([deb.artifact(newest.url)], workspace)
        return
    raise NetworkError(
        f"{deb.package} {deb.version} is gone from Debian {deb.suite}, whose index now has {newest.version} "
        f"(signature {index.signature}); other places failed too ({'; '.join(tried) or 'none'}).",
        fix=f"Refresh the lock with '{launcher()} bump bridge', or update ssm-forge.",
    )
