"""Whether two spellings mean the same place: asked before a rule about a channel is passed over."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}


def canonical(url: str) -> str:
    """The one spelling of a folder's URL, ending in a slash: scheme, host, port, path; ``file://`` with links resolved.

    Raises:
        ValueError: when it is no URL.
    """
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    if scheme == "file":
        return local_path(url).resolve().as_uri().rstrip("/") + "/"
    host = (parts.hostname or "").rstrip(".")
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in (None, _DEFAULT_PORTS.get(scheme)) else f":{parts.port}"
    segments: list[str] = []
    # Most servers decode a path before they look at it, so that "%2F" and "%2E%2E" mean what "/" and ".." do.
    for segment in unquote(parts.path).split("/"):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    return "/".join((f"{scheme}://{host}{port}", *map(quote, segments), ""))


def is_under(url: str, folder: str) -> bool:
    """Whether ``url`` is ``folder`` or lies below it, however the two are spelled."""
    if url.lower().startswith("file:") and folder.lower().startswith("file:"):
        # A link may stand anywhere: the channel, a platform's folder in it, or the package itself.
        top, path = local_path(folder).resolve(), local_path(url)
        return any(parent.resolve() == top for parent in (path, *path.parents, *path.resolve().parents))
    return canonical(url).startswith(canonical(folder))


def local_path(url: str) -> Path:
    """The path that a ``file://`` URL means."""
    return Path(unquote(urlsplit(url).path))
