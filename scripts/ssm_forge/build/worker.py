"""Builds one recipe in a process of its own, so that it can be stopped with everything it started.

Started by :mod:`ssm_forge.build.run` as ``python -m ssm_forge.build.worker SPEC.json DESCRIPTOR``. What the engine and
the recipe's tools say goes to stdout; what came of it, ``{"package": "PATH"}`` or ``{"error": "..."}``, is written to
the open file DESCRIPTOR, which no tool inherits.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssm_forge.base.ending import end
from ssm_forge.base.paths import workspace
from ssm_forge.manifest.build_key import BuildKey
from ssm_forge.manifest.recipe import render


class _Events:
    """Receives the engine's progress."""

    def on_download_start(self, event: Any) -> None: ...

    def on_download_progress(self, event: Any) -> None: ...

    def on_download_complete(self, event: Any) -> None: ...

    def on_build_step(self, event: Any) -> None:
        _print(f"step: {event.step_name}")

    def on_log(self, event: Any) -> None:
        _print(str(event.message))


def _print(text: str) -> None:
    # Whatever the locale: a compiler's words need not be ASCII.
    sys.stdout.buffer.write(text.encode("utf-8", "replace") + b"\n")
    sys.stdout.flush()


def main(spec_path: Path, answer_fd: int) -> int:
    """Build what ``spec_path`` says, write what came of it to the open file ``answer_fd``, and return the exit code."""
    from rattler_build import RattlerBuildError, ToolConfiguration

    os.set_inheritable(answer_fd, False)

    def tell(**outcome: str) -> None:
        os.write(answer_fd, json.dumps(outcome).encode())

    spec = json.loads(spec_path.read_text(encoding="utf-8"))
    rendered = render(
        spec["project"], BuildKey.from_renderer(spec["values"]), replace(workspace(), root=Path(spec["root"]))
    )
    try:
        result = rendered.engine.run_build(
            tool_config=ToolConfiguration(test_strategy="native", channel_priority="strict"),
            output_dir=spec["output_dir"],
            channels=spec["channels"],
            progress_callback=_Events(),
            no_build_id=True,
            # It says what the engine solved; finalize reads that, and leaves the recipe out.
            no_include_recipe=False,
            # Packed again, and well, when it is finished (see finalize).
            package_format="conda:1",
        )
    except RattlerBuildError as error:
        tell(error=str(error))
        return 1
    tell(package=str(result.packages[0]))
    return 0


if __name__ == "__main__":
    end(main(Path(sys.argv[1]), int(sys.argv[2])))
