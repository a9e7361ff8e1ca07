"""``python -m ssm_forge TASK ARGS``: what ``./run`` and the tasks of pixi.toml start."""

from __future__ import annotations

from ssm_forge.cli import main

if __name__ == "__main__":
    main()
