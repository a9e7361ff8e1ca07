"""Where things are: one place that knows every folder the project reads or writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs


@dataclass(frozen=True)
class Workspace:
    """The folders of one checkout, and the user's caches that all checkouts share.

    Attributes:
        root: the checkout.
        cache: downloads, bridge packages and compiled objects; safe to delete at any time.
    """

    root: Path
    cache: Path

    @property
    def manifest(self) -> Path:
        """pixi.toml: environments and tasks."""
        return self.root / "pixi.toml"

    @property
    def lock(self) -> Path:
        """pixi.lock: what each environment consists of."""
        return self.root / "pixi.lock"

    @property
    def recipes(self) -> Path:
        """The recipes of both packages, and what they share."""
        return self.root / "recipes"

    @property
    def source_manifest(self) -> Path:
        """The workspace in which pixi builds the kernels."""
        return self.recipes / "pixi.toml"

    @property
    def source_lock(self) -> Path:
        """The lock of the workspace in which pixi builds the kernels."""
        return self.recipes / "pixi.lock"

    @property
    def source_envs(self) -> Path:
        """The environments of that workspace, which pixi makes, kernels included."""
        return self.recipes / ".pixi" / "envs"

    @property
    def variants(self) -> Path:
        """The build matrix."""
        return self.recipes / "variants.yaml"

    @property
    def patches(self) -> Path:
        """The patches of upstream's sources and of torch."""
        return self.root / "patches"

    @property
    def channel(self) -> Path:
        """The channel that built packages land in (``file://``, one folder per subdir)."""
        return Path(os.environ.get("SSM_FORGE_CHANNEL") or self.root / "channel")

    @property
    def state(self) -> Path:
        """What belongs to this checkout and is in no repository."""
        return self.root / ".pixi"

    @property
    def envs(self) -> Path:
        """The environments that installing makes where no prefix is named."""
        return self.state / "envs"

    @property
    def logs(self) -> Path:
        """A full log of each long run."""
        return Path(os.environ.get("SSM_FORGE_LOG_DIR") or self.state / "logs")

    @property
    def bridge_locks(self) -> Path:
        """What the bridge is made from: locks of wheels and of Debian packages."""
        return self.recipes / "bridge"

    @property
    def bridge(self) -> Path:
        """The local channel assembled from wheels and Debian packages."""
        return self.cache / "bridge"

    @property
    def downloads(self) -> Path:
        """Downloaded files, named by their sha256."""
        return self.cache / "downloads"

    @property
    def rattler_cache(self) -> Path:
        """The engine's cache, shared by builds and installs.

        Under pixi it is pixi's own, so that nothing is downloaded and unpacked twice, unless the user chose a place.
        """
        return _pixi_cache() if _shares_pixi_cache() else self.cache / "rattler"

    @property
    def moves_package_cache(self) -> str:
        """How to have that cache elsewhere, as half a sentence."""
        variable = "PIXI_CACHE_DIR" if _shares_pixi_cache() else "SSM_FORGE_CACHE_DIR"
        return f"set {variable} to a folder on a larger disk"

    @property
    def package_cache(self) -> Path:
        """Extracted packages that environments hard-link from."""
        return self.rattler_cache / "pkgs"


def _shares_pixi_cache() -> bool:
    return "PIXI_EXE" in os.environ and not os.environ.get("SSM_FORGE_CACHE_DIR")


def _pixi_cache() -> Path:
    """Where pixi keeps packages, in the order in which it looks."""
    for variable in ("PIXI_CACHE_DIR", "RATTLER_CACHE_DIR"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    own = platformdirs.user_cache_path("pixi")
    return own if own.exists() else platformdirs.user_cache_path("rattler") / "cache"


def workspace() -> Workspace:
    """The workspace this package was loaded from."""
    default_cache = platformdirs.user_cache_path("ssm-forge")
    return Workspace(
        root=Path(__file__).resolve().parents[3],
        cache=Path(os.environ.get("SSM_FORGE_CACHE_DIR") or default_cache).resolve(),
    )


def launcher() -> str:
    """How this user starts a task, for error messages: ``./run`` or ``pixi run``."""
    return os.environ.get("SSM_FORGE_LAUNCHER", "pixi run" if "PIXI_PROJECT_ROOT" in os.environ else "./run")
