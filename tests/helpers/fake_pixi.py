"""A stand-in for pixi 0.77 that starts programs as it does: folder, variables, and how it quotes arguments.

``run TASK ARGS`` runs in the workspace, and puts each argument between single quotes, whatever is in it; ``run
--executable PROGRAM ARGS`` runs in the caller's folder, with arguments that arrive as they are.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def main() -> None:
    parser = argparse.ArgumentParser(prog="pixi run")
    parser.add_argument("--manifest-path", type=Path, required=True)
    parser.add_argument("-x", "--executable", action="store_true")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args(sys.argv[2:])
    root = args.manifest_path.resolve().parent
    os.environ.update(
        # The activated environment's Python is the one that runs the tests.
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        PIXI_PROJECT_ROOT=str(root),
        PIXI_EXE=sys.argv[0],
        INIT_CWD=str(Path.cwd()),
    )
    task = tomllib.loads(args.manifest_path.read_text())["tasks"].get(args.words[0])
    if task is None or args.executable:
        script = shlex.join(args.words)
    else:
        os.chdir(root)
        exports = "".join(f'export {name}="{value}"; ' for name, value in task.get("env", {}).items())
        script = exports + task["cmd"] + "".join(f" '{word}'" for word in args.words[1:])
    os.execv("/bin/bash", ["bash", "-c", script])


def put(folder: Path) -> Path:
    """Put this program as ``pixi`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pixi = folder / "pixi"
    pixi.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
    pixi.chmod(0o755)
    return pixi


if __name__ == "__main__":
    main()
