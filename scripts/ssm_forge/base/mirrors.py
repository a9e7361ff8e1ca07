"""Mirrors of conda channels that the user has configured for pixi and rattler: in force here wherever pixi uses them.

The engine's own client knows nothing of configuration files, so each client for channels is made here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssm_forge.base import foreign
from ssm_forge.base.errors import UsageError
from ssm_forge.base.paths import workspace

if TYPE_CHECKING:
    from rattler.networking import Client

_RETRIES = 3


def _files() -> list[Path]:
    """Where pixi looks for its configuration; later files win."""
    home = Path.home()
    user = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    own = Path(os.environ.get("PIXI_HOME") or home / ".pixi")
    shared = [folder / tool / "config.toml" for folder in (Path("/etc"), user) for tool in ("rattler", "pixi")]
    only = os.environ.get("PIXI_CONFIG_FILE")
    files = [Path(only)] if only else [*shared, own / "config.toml"]
    return [*files, workspace().state / "config.toml"]


def configured() -> dict[str, tuple[str, ...]]:
    """URL prefix -> what to ask instead, in order; each ends in a slash.

    Raises:
        UsageError: when a configuration file can't be read.
    """
    mirrors: dict[str, tuple[str, ...]] = {}
    for path in _files():
        try:
            data = foreign.toml_from(foreign.read_bytes(path))
            foreign.require(data, {"mirrors": _are_mirrors}, all_of_them=False)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise UsageError(f"pixi's configuration {path} can't be read ({error}).") from error
        for source, targets in data.get("mirrors", {}).items():
            mirrors[_slash(source)] = tuple(_slash(target) for target in targets)
    return mirrors


def _are_mirrors(value: object) -> bool:
    return isinstance(value, dict) and all(map(foreign.is_list_of_text, value.values()))


def _slash(url: str) -> str:
    return url.rstrip("/") + "/"


def mirrored(url: str) -> str:
    """``url`` at the first mirror of its channel; as it is where there is none."""
    for source, targets in sorted(configured().items(), key=lambda item: -len(item[0])):
        if targets and _slash(url).startswith(source):
            return targets[0].rstrip("/") + url[len(source) - 1 :]
    return url


def client(*, timeout: int | None = None, first: Mapping[str, Sequence[str]] | None = None) -> Client:
    """The engine's client: retries, mirrors, credentials, OCI, Google's and Amazon's storage.

    Args:
        timeout: seconds for a request.
        first: mirrors that go before the configured ones: URL prefix -> what to ask instead.
    """
    from rattler.networking import Client
    from rattler.networking import middleware as m

    rules = {source: list(targets) for source, targets in ({**configured(), **(first or {})}).items()}
    return Client(
        [
            m.RetryMiddleware(_RETRIES),
            *([m.MirrorMiddleware(rules)] if rules else []),
            m.AuthenticationMiddleware(),
            m.OciMiddleware(),
            m.GCSMiddleware(),
            m.S3Middleware(),
        ],
        timeout=timeout,
    )
