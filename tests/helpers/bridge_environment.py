"""Installs bridge packages as any conda package: into a channel, solved, linked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path

from ssm_forge.bridge.package import BridgePackage, write


def installed(packages: Iterable[BridgePackage], folder: Path, *specs: str, cuda: str = "13.0") -> Path:
    """Install ``specs`` from ``packages`` into an environment below ``folder``."""
    from rattler.index import index_fs

    channel = folder / "channel"
    for package in packages:
        write(package, channel, threads=1)
    (channel / "noarch").mkdir(exist_ok=True)
    asyncio.run(index_fs(channel, write_zst=False, write_shards=False))
    return installed_from([channel.as_uri()], folder, *specs, cuda=cuda)


def installed_from(channels: Sequence[str], folder: Path, *specs: str, cuda: str = "13.0") -> Path:
    """Install ``specs`` from channels, by their URLs, into an environment below ``folder``."""
    import rattler

    from ssm_forge.manifest.virtual import virtual_packages

    prefix = folder / "environment"

    async def make() -> None:
        records = await rattler.solve(
            sources=list(channels),
            specs=list(specs),
            platforms=["linux-64", "noarch"],
            virtual_packages=[v.to_rattler() for v in virtual_packages(cuda=cuda, glibc="2.99")],
        )
        await rattler.install(records=records, target_prefix=prefix, cache_dir=folder / "packages", show_progress=False)

    asyncio.run(make())
    return prefix
