"""Measuring real processes: what they burn, hold and start is seen, and nothing of it outlives an error."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path, PurePath

import psutil
import pytest

from ssm_forge import process_tree
from ssm_forge.process_tree import Group, Moment, ToolUse, Tree, Usage, join, measure

# Burns CPU, then stays a moment, so that a sample sees all of it.
BURN = """\
import sys, time
while time.process_time() < float(sys.argv[3]): pass
time.sleep(float(sys.argv[4]))
"""
HOLD = "import sys, time; held = b'x' * int(sys.argv[3]); time.sleep(0.6); del held; time.sleep(0.15)"


def python(tool: str, code: str, *words: object, source: str = "-") -> list[str]:
    """A command that :func:`describe` knows as ``tool`` working on ``source``."""
    return [sys.executable, "-I", "-S", "-c", code, tool, source, *map(str, words)]


def burner(seconds: float, source: str = "-", *, rest: float = 0.15, tool: str = "burner") -> list[str]:
    return python(tool, BURN, seconds, rest, source=source)


def describe(argv: tuple[str, ...]) -> tuple[str, Mapping[str, str]]:
    if argv[1:4] == ("-I", "-S", "-c"):
        tool, source = argv[5:7]
    else:
        tool, source = PurePath(argv[0]).name, argv[-1]
    return tool, {"source": source} if source.endswith(".cu") else {}


def group(usage: Usage, source: str | None) -> Group:
    (found,) = [g for g in usage.groups if g.labels.get("source") == source]
    return found


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def living(folder: Path) -> list[int]:
    """Processes that have the test's folder in their command line; those that have ended have none."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(str(folder) in w for w in p.info["cmdline"] or ())]


def test_cpu_is_what_the_children_burnt_divided_by_tool_and_label(tmp_path: Path) -> None:
    script = f"{shlex.join(burner(0.25, 'a.cu'))} & {shlex.join(burner(0.7, 'b.cu'))} & wait"
    before = time.monotonic()
    usage = measure(["sh", "-c", script], describe=describe, log=tmp_path / "log")
    assert usage.returncode == 0
    assert 0.7 + 0.15 <= usage.wall <= time.monotonic() - before
    assert 0.95 <= usage.cpu < 1.5
    assert 0.9 < usage.cpu_by_tool["burner"] <= usage.cpu
    assert usage.cpu_by_tool["sh"] < 0.1
    assert usage.unseen < 0.2
    short, long, rest = group(usage, "a.cu"), group(usage, "b.cu"), group(usage, None)
    assert 0.2 < short.tools["burner"].cpu < 0.5
    assert 0.65 < long.tools["burner"].cpu < 1.1
    assert rest.cpu < 0.1
    assert "burner" not in rest.tools
    assert rest.first <= min(short.first, long.first) < short.last < long.last <= rest.last <= usage.wall
    assert min(short.peak_rss, long.peak_rss) > 2_000_000
    assert 5 < usage.samples < 1 + usage.wall / process_tree.INTERVAL
    assert 0 < usage.own_cpu < usage.wall


def test_the_timeline_adds_up_to_the_whole(tmp_path: Path) -> None:
    usage = measure(burner(1.5), describe=describe, log=tmp_path / "log", interval=0.02)
    seconds = [moment.at for moment in usage.timeline]
    assert seconds == sorted(set(seconds))
    assert seconds[0] == 0
    assert 1 <= seconds[-1] == int(seconds[-1]) <= usage.wall
    assert sum(moment.cpu["burner"] for moment in usage.timeline) == pytest.approx(usage.cpu_by_tool["burner"])
    assert usage.timeline[0].cpu["burner"] < usage.cpu_by_tool["burner"]
    assert max(moment.rss for moment in usage.timeline) == usage.peak_rss


def test_a_process_that_becomes_another_program_is_measured_as_each(tmp_path: Path) -> None:
    becomes = BURN + "import os; os.execv(sys.executable, sys.argv[5:])"
    # CPU time goes on through exec: the second burns 0.3 more.
    command = python("first", becomes, 0.3, 0.15, *burner(0.6, "two.cu", tool="second"), source="one.cu")
    usage = measure(command, describe=describe, log=tmp_path / "log")
    assert 0.25 < group(usage, "one.cu").tools["first"].cpu < 0.45
    assert 0.2 < group(usage, "two.cu").tools["second"].cpu < 0.45
    assert set(group(usage, "two.cu").tools) == {"second"}


def test_the_outermost_label_wins_and_the_caller_labels_everything(tmp_path: Path) -> None:
    script = f"{shlex.join(burner(0.1, 'temporary.cu'))}; true"
    command = ["sh", "-c", script, "real.cu"]
    usage = measure(command, describe=describe, log=tmp_path / "log", labels={"step": "cold"})
    (everything,) = usage.groups
    assert everything.labels == {"source": "real.cu", "step": "cold"}
    assert {"sh", "burner"} <= everything.tools.keys()


def test_memory_is_the_sum_at_one_moment_and_the_largest_process_is_told_apart(tmp_path: Path) -> None:
    large, small = (python("holder", HOLD, n, source=s) for n, s in ((200_000_000, "a.cu"), (100_000_000, "b.cu")))
    script = f"{shlex.join(large)} & {shlex.join(small)} & wait"
    usage = measure(["sh", "-c", script], describe=describe, log=tmp_path / "log")
    assert 300_000_000 < usage.peak_rss < 360_000_000
    assert max(moment.rss for moment in usage.timeline) == usage.peak_rss
    assert 200_000_000 < usage.largest < 240_000_000
    assert 200_000_000 < group(usage, "a.cu").peak_rss < 240_000_000
    assert 100_000_000 < group(usage, "b.cu").peak_rss < 140_000_000


def test_the_memory_of_whoever_measures_does_not_count(tmp_path: Path) -> None:
    assert psutil.Process().memory_info().rss > 30_000_000
    usage = measure(burner(0, rest=0.3), describe=describe, log=tmp_path / "log")
    assert 2_000_000 < usage.largest <= usage.peak_rss < 30_000_000


# Starts the rest of its command line, and leaves it to whoever takes it.
LEAVER = """\
import os, subprocess, sys, time
if sys.argv[3] == "late":
    time.sleep(0.3)
    os.setsid()
time.sleep(0.3)
subprocess.Popen(sys.argv[4:])
os._exit(0)
"""
# Ends when everything that it started has, whoever is the parent.
STARTER = """\
import subprocess, sys
child = subprocess.Popen(sys.argv[4:], start_new_session=sys.argv[3] == "at once", stdout=subprocess.PIPE)
child.stdout.read()
"""


@pytest.mark.parametrize("session", ["at once", "late"])
def test_what_a_child_in_a_session_of_its_own_leaves_behind_is_found(session: str, tmp_path: Path) -> None:
    """Its parent is gone when it is first seen; nobody waits for it, so that the kernel's total lacks it."""
    leaver = python("leaver", LEAVER, session, *burner(0.3, "left.cu"))
    usage = measure(python("starter", STARTER, session, *leaver), describe=describe, log=tmp_path / "log")
    assert {"starter", "leaver"} <= usage.cpu_by_tool.keys()
    left = group(usage, "left.cu")
    assert 0.25 < left.tools["burner"].cpu < 0.5
    assert usage.cpu >= left.cpu


def test_the_total_is_exact_where_no_sample_saw_the_process(tmp_path: Path) -> None:
    done = tmp_path / "done"

    def patient(argv: tuple[str, ...]) -> tuple[str, Mapping[str, str]]:
        """Keeps the first look from ending before the command has."""
        wait_for(done)
        return "sh", {}

    script = f"{shlex.join(burner(0.3, rest=0))}; echo >{shlex.quote(str(done))}"
    usage = measure(["sh", "-c", script], describe=patient, log=tmp_path / "log")
    assert 0.3 <= usage.cpu < 0.6
    assert usage.cpu_by_tool["sh"] < 0.1
    assert 0.2 < usage.unseen <= usage.cpu


def test_any_name_is_read_and_one_that_has_ended_is_described_by_it(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    seen: list[tuple[str, ...]] = []

    def patient(argv: tuple[str, ...]) -> tuple[str, Mapping[str, str]]:
        """Keeps the first look from ending before the child has ended."""
        wait_for(ended)
        seen.append(argv)
        return describe(argv)

    ends = "import time; open('/proc/self/comm', 'w').write('a) S (b'); time.sleep(0.2)"
    # Waits until the child has ended, and leaves it a zombie, which has a name and no command line.
    parent = """\
import os, subprocess, sys, time
child = subprocess.Popen(sys.argv[4:])
os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
open(sys.argv[3], "w").close()
time.sleep(0.3)
"""
    usage = measure(python("parent", parent, ended, *python("ends", ends)), describe=patient, log=tmp_path / "log")
    assert seen[-1] == ("a) S (b",)
    assert {"parent", "a) S (b"} <= usage.cpu_by_tool.keys()
    assert "ends" not in usage.cpu_by_tool


def test_what_others_burn_meanwhile_is_told_apart(tmp_path: Path) -> None:
    done = tmp_path / "done"
    waits = "import os, sys, time\nwhile not os.path.exists(sys.argv[3]): time.sleep(0.02)"
    with subprocess.Popen(python("other", BURN + "open(sys.argv[5], 'w')", 0.5, 0, done)):
        usage = measure(python("waiter", waits, done), describe=describe, log=tmp_path / "log")
    assert usage.others_cpu > 0.4
    assert usage.cpu < 0.3


def test_neither_the_command_nor_measuring_it_counts_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([100.0, 103.0])
    monkeypatch.setattr(process_tree, "_machine_busy", lambda: next(busy))
    usage = measure(burner(0.2), describe=describe, log=tmp_path / "log")
    assert usage.others_cpu == pytest.approx(3 - usage.cpu - usage.own_cpu)


@pytest.mark.parametrize(("script", "code"), [("true", 0), ("exit 3", 3), ("kill -9 $$", -9)])
def test_the_return_code_is_the_commands(script: str, code: int, tmp_path: Path) -> None:
    assert measure(["sh", "-c", script], describe=describe, log=tmp_path / "log").returncode == code


def test_messages_are_added_to_the_log_and_output_has_a_file_of_its_own(tmp_path: Path) -> None:
    log, output = tmp_path / "log", tmp_path / "output"
    log.write_text("before\n")
    command = ["sh", "-c", "echo said; echo complained >&2"]
    measure(command, describe=describe, log=log, output=output)
    assert (log.read_text(), output.read_text()) == ("before\ncomplained\n", "said\n")
    measure(command, describe=describe, log=log)
    assert (log.read_text(), output.read_text()) == ("before\ncomplained\nsaid\ncomplained\n", "said\n")


def test_folder_and_environment_are_what_the_caller_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    output = tmp_path / "output"
    command = ["/bin/sh", "-c", 'pwd; echo "${INHERITED-no} ${GIVEN-no}"']
    measure(command, describe=describe, log=tmp_path / "log", output=output, cwd=tmp_path)
    assert output.read_text() == f"{tmp_path}\nyes no\n"
    measure(command, describe=describe, log=tmp_path / "log", output=output, environment={"GIVEN": "yes"})
    assert output.read_text() == f"{Path.cwd()}\nno yes\n"


# Says that it is there, and does not go when asked.
STUBBORN = """\
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
open(sys.argv[3], "w").close()
time.sleep(60)
"""
# Starts one command as its child and one in a session of its own; cleans up with another such when asked to end.
CAREFUL = """\
import json, subprocess, sys, time
cleaned, child, session, cleaner = map(json.loads, sys.argv[3:])
try:
    subprocess.Popen(child)
    subprocess.Popen(session, start_new_session=True)
    time.sleep(60)
except KeyboardInterrupt:
    subprocess.run(cleaner, start_new_session=True)
    open(cleaned, "w").close()
"""


def stop_when(ready: list[Path], error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a look at the tree fail once these files are there."""
    look = Tree.sample

    def sample(tree: Tree, at: float) -> None:
        look(tree, at)
        if all(path.exists() for path in ready):
            raise error

    monkeypatch.setattr(Tree, "sample", sample)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_an_error_lets_the_command_clean_up_and_leaves_no_process(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned, *ready = (tmp_path / name for name in ("cleaned", "child", "left", "cleaner"))
    child, left, cleaner = (python("stubborn", STUBBORN, path) for path in ready)
    left, cleaner = (python("leaver", LEAVER, "at once", *command) for command in (left, cleaner))
    told = (json.dumps(value) for value in (str(cleaned), child, left, cleaner))
    stop_when(ready[:2], error, monkeypatch)
    with pytest.raises(type(error)):
        measure(python("careful", CAREFUL, *told), describe=describe, log=tmp_path / "log")
    assert cleaned.exists()
    assert living(tmp_path) == []


def test_a_command_that_does_not_end_when_asked_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = [tmp_path / "ready"]
    monkeypatch.setattr(process_tree, "_GRACE_SECONDS", 0.2)
    stop_when(ready, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        measure(python("stubborn", STUBBORN, ready[0]), describe=describe, log=tmp_path / "log")
    assert living(tmp_path) == []


def usage_of(source: str, *, returncode: int = 0, wall: float, cpu: float, memory: int) -> Usage:
    uses = {"cicc": ToolUse(cpu / 2, 0.5, 1.0), "ptxas": ToolUse(cpu / 4, 1.0, 1.5)}
    return Usage(
        returncode=returncode,
        wall=wall,
        cpu=cpu,
        cpu_by_tool={tool: use.cpu for tool, use in uses.items()},
        peak_rss=memory,
        largest=memory // 2,
        groups=(Group({"source": source}, uses, memory),),
        timeline=(Moment(0.0, {"cicc": cpu / 2}, memory), Moment(1.0, {"ptxas": cpu / 4}, memory // 4)),
        samples=10,
        others_cpu=0.5,
        own_cpu=0.25,
    )


def test_usages_one_after_the_other_are_added_and_shifted() -> None:
    first = usage_of("a.cu", wall=2.5, cpu=4.0, memory=100)
    second = usage_of("b.cu", wall=1.5, cpu=2.0, memory=300, returncode=-9)
    joined = join([first, second])
    assert joined.returncode == -9
    assert (joined.wall, joined.cpu, joined.unseen) == (4.0, 6.0, 1.5)
    assert joined.cpu_by_tool == {"cicc": 3.0, "ptxas": 1.5}
    assert (joined.peak_rss, joined.largest) == (300, 150)
    assert (joined.samples, joined.others_cpu, joined.own_cpu) == (20, 1.0, 0.5)
    assert joined.groups[0] == first.groups[0]
    assert joined.groups[1].labels == {"source": "b.cu"}
    assert joined.groups[1].tools == {"cicc": ToolUse(1.0, 3.0, 3.5), "ptxas": ToolUse(0.5, 3.5, 4.0)}
    assert [moment.at for moment in joined.timeline] == [0.0, 1.0, 2.5, 3.5]
    assert joined.timeline[2].cpu == {"cicc": 1.0}
    assert join([first]) == first


def test_a_group_lasts_from_its_first_tool_to_its_last() -> None:
    whole = usage_of("a.cu", wall=2.0, cpu=4.0, memory=1).groups[0]
    assert (whole.cpu, whole.first, whole.last) == (3.0, 0.5, 1.5)


def test_a_child_that_was_first_seen_together_with_its_parent_has_its_labels(tmp_path: Path) -> None:
    """Whatever their numbers: a parent may have the higher one."""

    def describe(argv: tuple[str, ...]) -> tuple[str, dict[str, str]]:
        return argv[0], {}

    root = process_tree._Stat("root", 0, 1, 0.0, 0.0, 1, 0)
    inner = process_tree._Stat("inner", 9, 1, 1.0, 0.0, 3, 0)
    outer = process_tree._Stat("outer", 1, 1, 0.5, 0.0, 2, 0)
    for fresh in ({1: root, 7: inner, 9: outer}, {9: outer, 7: inner, 1: root}):
        tree = Tree(1, describe, {})
        assert list(tree._admit(fresh)) == [1, 9, 7]
        assert not fresh
        tree._members[9].own_labels = {"source": "a.cu"}
        assert tree._members[7].labels() == {"source": "a.cu"}


def test_what_a_process_does_after_it_was_last_seen_is_found_with_its_parent(tmp_path: Path) -> None:
    """Looked at twice a second, half of each child's work is in no look at the child itself."""
    script = "; ".join(shlex.join(burner(0.7, source, rest=0)) for source in ("a.cu", "b.cu", "c.cu")) + "; sleep 0.6"
    usage = measure(["sh", "-c", script], describe=describe, log=tmp_path / "log", interval=0.5)
    found = [group(usage, source).cpu for source in ("a.cu", "b.cu", "c.cu")]
    assert all(0.6 < cpu < 0.95 for cpu in found), found
    assert usage.unseen < 0.1
