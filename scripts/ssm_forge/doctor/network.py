"""Which channels and registries answer from here, asked at once, with what is set for proxies."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request

ANSWERS = "answers"
_PLACES = {
    "conda-forge": "https://conda.anaconda.org/conda-forge/noarch/current_repodata.json",
    "PyPI": "https://pypi.org/simple/pip/",
    "GitHub": "https://github.com/",
    "prefix.dev": "https://prefix.dev/conda-forge/noarch/repodata_shards.msgpack.zst",
}
_SECONDS = 2.5


def ask() -> dict[str, str]:
    """Place -> ``answers``, or why it does not."""
    found = dict.fromkeys(_PLACES, f"no answer in {_SECONDS} s")
    threads = [threading.Thread(target=_ask, args=(name, found), daemon=True) for name in _PLACES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_SECONDS)
    return dict(found)


def _ask(name: str, found: dict[str, str]) -> None:
    request = urllib.request.Request(_PLACES[name], method="HEAD", headers={"User-Agent": "ssm-forge-doctor"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS):
            found[name] = ANSWERS
    except urllib.error.HTTPError as error:
        # Refused, but there.
        found[name] = ANSWERS if error.code < 500 else f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        found[name] = str(getattr(error, "reason", error)) or type(error).__name__
