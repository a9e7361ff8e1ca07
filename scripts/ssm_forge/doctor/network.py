"""Which channels and registries answer from here, asked at once, with what is set for proxies."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request

ANSWERS = "answers"
_ADDRESSES = {
    "conda-forge": "https://conda.anaconda.org/conda-forge/noarch/current_repodata.json",
    "PyPI": "https://pypi.org/simple/pip/",
    "GitHub": "https://github.com/",
    "prefix.dev": "https://prefix.dev/conda-forge/noarch/repodata_shards.msgpack.zst",
}
_SECONDS = 2.5


def ask() -> dict[str, str]:
    """Channel or registry -> ``answers``, or why it does not; asked for at most 2.5 seconds."""
    answers = dict.fromkeys(_ADDRESSES, f"no answer in {_SECONDS} s")
    threads = [threading.Thread(target=_ask, args=(name, answers), daemon=True) for name in _ADDRESSES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_SECONDS)
    return dict(answers)


def _ask(name: str, answers: dict[str, str]) -> None:
    request = urllib.request.Request(_ADDRESSES[name], method="HEAD", headers={"User-Agent": "ssm-forge-doctor"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS):
            answers[name] = ANSWERS
    except urllib.error.HTTPError as error:
        # Refused, but there.
        answers[name] = ANSWERS if error.code < 500 else f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        answers[name] = str(getattr(error, "reason", error)) or type(error).__name__
