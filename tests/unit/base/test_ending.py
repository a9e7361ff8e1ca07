"""The end of a process: at once where the engine's threads live, as usual elsewhere."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"
STEPS = """\
import atexit
import sys
from ssm_forge.base.ending import end
atexit.register(print, "taken down")
if sys.argv[1]:
    __import__(sys.argv[1])
print("said", end=" ")
end(7)
"""


@pytest.mark.parametrize(
    ("engine", "said"), [("rattler", "said "), ("rattler_build", "said "), ("", "said taken down\n")]
)
def test_the_interpreter_takes_itself_down_only_without_the_engine(engine: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, engine],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SCRIPTS)},
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, said, "")


@pytest.mark.parametrize("program", ["build/worker.py", "farm/worker.py"])
def test_programs_that_use_the_engine_end_so(program: str) -> None:
    tree = ast.parse((SCRIPTS / "ssm_forge" / program).read_text(encoding="utf-8"))
    last = tree.body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.body[0]).startswith("end(main(")
