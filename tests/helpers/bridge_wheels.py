"""Small wheels in a workspace's download cache."""

from __future__ import annotations

import base64
import hashlib
import zipfile

from ssm_forge.base.fetch import Artifact, cached_path
from ssm_forge.base.paths import Workspace
from ssm_forge.bridge.pylock import LockedWheel


def add_wheel(place: Workspace, filename: str, files: dict[str, str]) -> LockedWheel:
    """Put a wheel into the download cache."""
    raw = place.root / filename
    record = "".join(f"{name},sha256={_hash(text)},{len(text.encode())}\n" for name, text in files.items())
    name, version = filename.split("-")[:2]
    with zipfile.ZipFile(raw, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{name}-{version}.dist-info/RECORD", f"{record}{name}-{version}.dist-info/RECORD,,\n")
    data = raw.read_bytes()
    artifact = Artifact("https://example.org/x", hashlib.sha256(data).hexdigest(), len(data), filename)
    target = cached_path(artifact, place)
    target.parent.mkdir(parents=True)
    raw.rename(target)
    return LockedWheel(name, version, artifact)


def _hash(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
