"""Measuring real processes: what they burn, hold and start is seen, and nothing of it outlives an error.

No test counts on the clock: a process says itself what it took, and stays until a look has seen that (see ``Looks``).
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import SimpleNamespace

import psutil
import pytest

from ssm_forge.bench import process_tree
from ssm_forge.bench.process_tree import Tree, measure
from ssm_forge.bench.usage import Group, Moment, ToolUse, Usage, join

# Only turns a hang into a failure.
PATIENCE_SECONDS = 120.0

# What each process of these tests begins with.
TELL = """\
import json, os, sys, time
def say(path):
    with open(path + ".part", "w") as file:
        json.dump({"pid": os.getpid(), "cpu": time.process_time(), "at": time.monotonic()}, file)
    os.rename(path + ".part", path + ".told")
def wait(path):
    for _ in range(12000):
        if os.path.exists(path): return
        time.sleep(0.01)
    sys.exit("nobody wrote " + path)
def tell(path):
    say(path)
    wait(path + ".seen")
def burn(seconds):
    while time.process_time() < seconds: pass
"""
BURN = TELL + "burn(float(sys.argv[3])); tell(sys.argv[4])\n"
# Holds so much memory until it was seen together with others.
HOLD = TELL + "held = b'x' * int(sys.argv[3]); say(sys.argv[4])\nfor path in sys.argv[4:]: wait(path + '.seen')\n"


class Looks:
    """Every look at the tree, counted; whoever had told something before it began is told that it was seen.

    Attributes:
        started: when the command was started, or a moment later.
        gate: called before each look.
        done: called after each look.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.started = 0.0
        self.gate: Callable[[], None] = lambda: None
        self.done: Callable[[Tree], None] = lambda tree: None

    def sample(self, tree: Tree, at: float) -> None:
        self.count += 1
        if self.count == 1:
            self.started = time.monotonic() - at
        self.gate()
        with self.seeing():
            _SAMPLE(tree, at)
        self.done(tree)

    def alive(self, tree: Tree) -> list[int]:
        with self.seeing():
            return _ALIVE(tree)

    @contextmanager
    def seeing(self) -> Iterator[None]:
        told = list(self.folder.glob("*.told"))
        yield
        for path in told:
            path.with_suffix(".seen").touch()


_SAMPLE, _ALIVE = Tree.sample, Tree.alive


@pytest.fixture(autouse=True)
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Looks:
    made = Looks(tmp_path)
    monkeypatch.setattr(Tree, "sample", lambda tree, at: made.sample(tree, at))
    monkeypatch.setattr(Tree, "alive", lambda tree: made.alive(tree))
    return made


def told(path: Path) -> SimpleNamespace:
    """What a process said: ``pid``, ``cpu`` (its CPU seconds until then), ``at`` (the clock)."""
    return SimpleNamespace(**json.loads(path.with_suffix(".told").read_text()))


def close_to(seconds: float, measured: float) -> bool:
    """Whether it was measured: the kernel counts ticks, and after having told a process still waits and ends."""
    return seconds - 0.05 <= measured <= seconds + 0.15


def python(tool: str, code: str, *words: object, source: str = "-") -> list[str]:
    """A command that :func:`describe` knows as ``tool`` working on ``source``."""
    return [sys.executable, "-I", "-S", "-c", code, tool, source, *map(str, words)]


def burner(seconds: float, tells: Path, source: str = "-", *, tool: str = "burner") -> list[str]:
    """Burns so much CPU, tells so, and ends when that was seen."""
    return python(tool, BURN, seconds, tells, source=source)


def describe(argv: tuple[str, ...]) -> tuple[str, Mapping[str, str]]:
    if argv[1:4] == ("-I", "-S", "-c"):
        tool, source = argv[5:7]
    else:
        tool, source = PurePath(argv[0]).name, argv[-1]
    return tool, {"source": source} if source.endswith(".cu") else {}


def group(usage: Usage, source: str | None) -> Group:
    (found,) = [g for g in usage.groups if g.labels.get("source") == source]
    return found


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def living(folder: Path) -> list[int]:
    """Processes that have the test's folder in their command line; those that have ended have none."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(str(folder) in w for w in p.info["cmdline"] or ())]


def test_cpu_is_what_the_children_burnt_divided_by_tool_and_label(tmp_path: Path, looks: Looks) -> None:
    first, second, gone = (tmp_path / name for name in ("first", "second", "gone"))
    last = python("burner", TELL + "burn(0.5); wait(sys.argv[4]); tell(sys.argv[3])", second, gone, source="b.cu")
    script = f"{{ {shlex.join(burner(0.25, first, 'a.cu'))}; echo >{shlex.quote(str(gone))}; }} & {shlex.join(last)} & "
    before, used = time.monotonic(), time.process_time()
    usage = measure(["sh", "-c", script + "wait"], describe=describe, log=tmp_path / "log")
    assert usage.returncode == 0
    assert told(second).at - looks.started <= usage.wall <= time.monotonic() - before
    burnt = told(first).cpu + told(second).cpu
    assert burnt >= 0.75
    assert burnt - 0.05 <= usage.cpu <= burnt + 0.5
    assert burnt - 0.1 <= usage.cpu_by_tool["burner"] <= usage.cpu
    assert usage.cpu_by_tool["sh"] < 0.1
    assert usage.unseen < 0.2
    short, long, rest = group(usage, "a.cu"), group(usage, "b.cu"), group(usage, None)
    assert close_to(told(first).cpu, short.tools["burner"].cpu)
    assert close_to(told(second).cpu, long.tools["burner"].cpu)
    assert rest.cpu < 0.1
    assert "burner" not in rest.tools
    assert rest.first <= min(short.first, long.first) < short.last < long.last <= rest.last <= usage.wall
    assert told(second).at - looks.started <= long.last
    assert min(short.peak_rss, long.peak_rss) > 2_000_000
    assert looks.count == usage.samples <= 1 + usage.wall / process_tree.INTERVAL_SECONDS
    assert 0 < usage.own_cpu <= time.process_time() - used


def test_the_timeline_adds_up_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Looks) -> None:
    """Each look counts for 0.3 seconds here; the command burns until it was seen doing so in the third second."""
    enough = tmp_path / "enough"
    times = iter(number * 0.3 for number in range(100_000))
    look = Tree.sample
    monkeypatch.setattr(Tree, "sample", lambda tree, at: look(tree, next(times)))

    def stop_when_seen(tree: Tree) -> None:
        if sum(sum(moment.cpu.values()) for second, moment in tree.timeline.items() if second >= 2) > 0.1:
            enough.touch()

    looks.done = stop_when_seen
    burning = python("burner", TELL + "while not os.path.exists(sys.argv[3]): burn(time.process_time() + 0.01)", enough)
    usage = measure(burning, describe=describe, log=tmp_path / "log", interval=0.001)
    seconds = [moment.at for moment in usage.timeline]
    assert seconds == list(range(int((looks.count - 1) * 0.3) + 1))
    assert sum(moment.cpu["burner"] for moment in usage.timeline) == pytest.approx(usage.cpu_by_tool["burner"])
    assert usage.timeline[0].cpu["burner"] + 0.1 <= usage.cpu_by_tool["burner"]
    assert max(moment.rss for moment in usage.timeline) == usage.peak_rss


def test_a_process_that_becomes_another_program_is_measured_as_each(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    becomes = BURN + "os.execv(sys.executable, sys.argv[5:])"
    # CPU time goes on through exec: the second burns 0.3 more.
    command = python("first", becomes, 0.3, one, *burner(0.6, two, "two.cu", tool="second"), source="one.cu")
    usage = measure(command, describe=describe, log=tmp_path / "log")
    assert close_to(told(one).cpu, group(usage, "one.cu").tools["first"].cpu)
    assert close_to(told(two).cpu - told(one).cpu, group(usage, "two.cu").tools["second"].cpu)
    assert set(group(usage, "two.cu").tools) == {"second"}


def test_the_outermost_label_wins_and_the_caller_labels_everything(tmp_path: Path) -> None:
    script = f"{shlex.join(burner(0, tmp_path / 'burner', 'temporary.cu'))}; true"
    command = ["sh", "-c", script, "real.cu"]
    usage = measure(command, describe=describe, log=tmp_path / "log", labels={"step": "cold"})
    (everything,) = usage.groups
    assert everything.labels == {"source": "real.cu", "step": "cold"}
    assert {"sh", "burner"} <= everything.tools.keys()


def test_a_process_that_is_becoming_a_program_is_told_by_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no command line for a moment, and a name that says nothing of its source."""
    read, first = process_tree._read_command, set[int]()

    def late(pid: int) -> bytes:
        if pid in first:
            return read(pid)
        first.add(pid)
        return b""

    monkeypatch.setattr(process_tree, "_read_command", late)
    # The second ends only after a look that the shell was there for twice.
    burners = "; ".join(shlex.join(burner(0, tmp_path / name, "temporary.cu")) for name in ("one", "two"))
    command = ["sh", "-c", f"{burners}; true", "real.cu"]
    usage = measure(command, describe=describe, log=tmp_path / "log")
    assert [group.labels for group in usage.groups] == [{"source": "real.cu"}]


def test_memory_is_the_sum_at_one_moment_and_the_largest_process_is_told_apart(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    large = python("holder", HOLD, 200_000_000, a, b, source="a.cu")
    small = python("holder", HOLD, 100_000_000, b, a, source="b.cu")
    script = f"{shlex.join(large)} & {shlex.join(small)} & wait"
    usage = measure(["sh", "-c", script], describe=describe, log=tmp_path / "log")
    assert 300_000_000 < usage.peak_rss < 360_000_000
    assert max(moment.rss for moment in usage.timeline) == usage.peak_rss
    assert 200_000_000 < usage.largest < 240_000_000
    assert 200_000_000 < group(usage, "a.cu").peak_rss < 240_000_000
    assert 100_000_000 < group(usage, "b.cu").peak_rss < 140_000_000


def test_the_memory_of_whoever_measures_does_not_count(tmp_path: Path) -> None:
    held = b"x" * 60_000_000
    assert psutil.Process().memory_info().rss > len(held)
    usage = measure(burner(0, tmp_path / "burner"), describe=describe, log=tmp_path / "log")
    assert 2_000_000 < usage.largest <= usage.peak_rss < 50_000_000


# Starts the rest of its command line once it was seen itself, and leaves it to whoever takes it.
LEAVER = (
    TELL
    + """\
import subprocess
tell(sys.argv[4])
if sys.argv[3] == "late":
    os.setsid()
    tell(sys.argv[4] + "-late")
subprocess.Popen(sys.argv[5:])
os._exit(0)
"""
)
# Ends when everything that it started has, whoever is the parent.
STARTER = """\
import subprocess, sys
child = subprocess.Popen(sys.argv[4:], start_new_session=sys.argv[3] == "at once", stdout=subprocess.PIPE)
child.stdout.read()
"""


@pytest.mark.parametrize("session", ["at once", "late"])
def test_what_a_child_in_a_session_of_its_own_leaves_behind_is_found(
    session: str, tmp_path: Path, looks: Looks
) -> None:
    """Its parent is gone when it is first seen; nobody waits for it, so that the kernel's total lacks it."""
    leaving, left = tmp_path / "leaver", tmp_path / "left"
    last = leaving.with_name("leaver-late") if session == "late" else leaving

    def leaver_is_gone() -> None:
        if last.with_suffix(".seen").exists():
            wait_until(lambda: ended(told(last).pid))

    looks.gate = leaver_is_gone
    leaver = python("leaver", LEAVER, session, leaving, *burner(0.3, left, "left.cu"))
    usage = measure(python("starter", STARTER, session, *leaver), describe=describe, log=tmp_path / "log")
    assert {"starter", "leaver"} <= usage.cpu_by_tool.keys()
    found = group(usage, "left.cu")
    assert close_to(told(left).cpu, found.tools["burner"].cpu)
    assert usage.cpu >= found.cpu


def test_the_total_is_exact_where_no_sample_saw_the_process(tmp_path: Path) -> None:
    done, burnt = tmp_path / "done", tmp_path / "burnt"

    def patient(argv: tuple[str, ...]) -> tuple[str, Mapping[str, str]]:
        """Keeps the first look from ending before the command has."""
        wait_until(done.exists)
        return "sh", {}

    unseen = python("burner", TELL + "burn(0.3); say(sys.argv[3])", burnt)
    script = f"{shlex.join(unseen)}; echo >{shlex.quote(str(done))}"
    usage = measure(["sh", "-c", script], describe=patient, log=tmp_path / "log")
    assert told(burnt).cpu <= usage.cpu < told(burnt).cpu + 0.3
    assert usage.cpu_by_tool["sh"] < 0.1
    assert told(burnt).cpu - 0.1 < usage.unseen <= usage.cpu


def test_any_name_is_read_and_one_that_has_ended_is_described_by_it(tmp_path: Path) -> None:
    begun, over, parent_tells = tmp_path / "begun", tmp_path / "over", tmp_path / "parent"
    seen: list[tuple[str, ...]] = []

    def patient(argv: tuple[str, ...]) -> tuple[str, Mapping[str, str]]:
        """The child is started and ends during the first look, which does not see it."""
        begun.touch()
        wait_until(over.exists)
        seen.append(argv)
        return describe(argv)

    ends = "open('/proc/self/comm', 'w').write('a) S (b')"
    # Waits until the child has ended, and leaves it a zombie, which has a name and no command line.
    parent = """\
import subprocess
wait(sys.argv[3])
child = subprocess.Popen(sys.argv[6:])
os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
open(sys.argv[4], "w").close()
tell(sys.argv[5])
"""
    command = python("parent", TELL + parent, begun, over, parent_tells, *python("ends", ends))
    usage = measure(command, describe=patient, log=tmp_path / "log")
    assert seen[-1] == ("a) S (b",)
    assert {"parent", "a) S (b"} <= usage.cpu_by_tool.keys()
    assert "ends" not in usage.cpu_by_tool


def test_what_others_burn_meanwhile_is_told_apart(tmp_path: Path) -> None:
    begun, idle, burnt = (tmp_path / name for name in ("begun", "idle", "burnt"))
    other = "wait(sys.argv[3]); say(sys.argv[4]); burn(time.process_time() + 0.6); say(sys.argv[5])"
    waiter = python("waiter", TELL + "open(sys.argv[3], 'w').close(); wait(sys.argv[4] + '.told')", begun, burnt)
    with subprocess.Popen(python("other", TELL + other, begun, idle, burnt)):
        usage = measure(waiter, describe=describe, log=tmp_path / "log")
    # The machine's total is counted in ticks, coarser than a process's own.
    assert usage.others_cpu > 0.6 * (told(burnt).cpu - told(idle).cpu) > 0.3
    # By name and not by amount: waiting, too, takes the longer the busier the machine is.
    assert set(usage.cpu_by_tool) <= {"waiter"}


def test_neither_the_command_nor_measuring_it_counts_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([100.0, 103.0])
    monkeypatch.setattr(process_tree, "_machine_busy", lambda: next(busy))
    usage = measure(burner(0.2, tmp_path / "burner"), describe=describe, log=tmp_path / "log")
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
time.sleep(600)
"""
# Starts one command as its child and one in a session of its own; cleans up with another such when asked to end.
# Whoever runs the tests in the background may have SIGINT ignored, which is inherited.
CAREFUL = """\
import json, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
cleaned, child, session, cleaner = map(json.loads, sys.argv[3:])
try:
    subprocess.Popen(child)
    subprocess.Popen(session, start_new_session=True)
    time.sleep(600)
except KeyboardInterrupt:
    subprocess.run(cleaner, start_new_session=True)
    open(cleaned, "w").close()
"""


def stop_when(ready: list[Path], error: BaseException, looks: Looks) -> None:
    """Make a look at the tree fail once these files are there."""

    def fail(tree: Tree) -> None:
        if all(path.exists() for path in ready):
            raise error

    looks.done = fail


def require_that_all_end(folder: Path) -> None:
    """Who was killed ends when it gets to run; nobody here ends by itself."""
    wait_until(lambda: not living(folder))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_an_error_lets_the_command_clean_up_and_leaves_no_process(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Looks
) -> None:
    cleaned, *ready = (tmp_path / name for name in ("cleaned", "child", "left", "cleaner"))
    child, left, cleaner = (python("stubborn", STUBBORN, path) for path in ready)
    left = python("leaver", LEAVER, "at once", tmp_path / "leaver", *left)
    cleaner = python("leaver", LEAVER, "at once", tmp_path / "second-leaver", *cleaner)
    words = (json.dumps(value) for value in (str(cleaned), child, left, cleaner))
    monkeypatch.setattr(process_tree, "_GRACE_SECONDS", PATIENCE_SECONDS)
    stop_when(ready[:2], error, looks)
    with pytest.raises(type(error)):
        measure(python("careful", CAREFUL, *words), describe=describe, log=tmp_path / "log")
    assert cleaned.exists()
    require_that_all_end(tmp_path)


def test_a_command_that_does_not_end_when_asked_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: Looks
) -> None:
    ready = [tmp_path / "ready"]
    monkeypatch.setattr(process_tree, "_GRACE_SECONDS", 0.2)
    stop_when(ready, KeyboardInterrupt(), looks)
    with pytest.raises(KeyboardInterrupt):
        measure(python("stubborn", STUBBORN, ready[0]), describe=describe, log=tmp_path / "log")
    require_that_all_end(tmp_path)


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


def test_one_that_has_ended_keeps_its_labels_when_what_started_it_becomes_another_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A script that asks a compiler something, and then becomes the compiler of an extension."""
    stat, commands = process_tree._Stat, {1: b"make", 2: b"script", 3: b"asked\0y.c"}
    looks = [
        {
            1: stat("make", 0, 1, 0.0, 0.0, 1, 0),
            2: stat("sh", 1, 1, 0.1, 0.0, 2, 0),
            3: stat("cc", 2, 1, 1.0, 0.0, 3, 0),
        },
        {1: stat("make", 0, 1, 0.0, 0.0, 1, 0), 2: stat("cc", 1, 1, 0.1, 1.5, 2, 0)},
    ]

    def describe(argv: tuple[str, ...]) -> tuple[str, dict[str, str]]:
        labels = {"asked": {"source": "y.c"}, "compiler": {"extension": "e", "source": "x.cu"}}
        return argv[0], labels.get(argv[0], {})

    tree = Tree(1, describe, {})
    for at, look in enumerate(looks):
        monkeypatch.setattr(process_tree.os, "listdir", lambda path, look=look: list(map(str, look)))
        monkeypatch.setattr(process_tree, "_read_stat", look.get)
        monkeypatch.setattr(process_tree, "_read_command", lambda pid: commands.get(pid, b""))
        tree.sample(float(at))
        commands[2] = b"compiler\0x.cu"
    assert all(group.tools and group.first <= group.last for group in tree.groups())
    (asked,) = [group for group in tree.groups() if group.labels == {"source": "y.c"}]
    assert asked.cpu == pytest.approx(1.5)
    assert [group.labels for group in tree.groups() if "extension" in group.labels] == [
        {"extension": "e", "source": "x.cu"}
    ]


def test_what_a_process_does_after_it_was_last_seen_is_found_with_its_parent(tmp_path: Path, looks: Looks) -> None:
    """Half of each child's work is done after a look at the child itself, and before the next look at all."""
    halves = [(tmp_path / f"{name}-half", tmp_path / f"{name}-whole") for name in "abc"]
    code = BURN + "burn(2 * float(sys.argv[3])); say(sys.argv[5])"
    children = [python("burner", code, 0.15, *paths, source=f"{paths[0].name[0]}.cu") for paths in halves]
    last = burner(0, tmp_path / "last")

    def wait_for_the_second_half() -> None:
        seen = [half for half, _ in halves if half.with_suffix(".seen").exists()]
        # Ended is not enough: a look in which its parent takes it from the kernel sees neither of them with its time.
        wait_until(lambda: not any(Path(f"/proc/{told(half).pid}").exists() for half in seen))

    looks.gate = wait_for_the_second_half
    script = "; ".join(map(shlex.join, [*children, last]))
    usage = measure(["sh", "-c", script], describe=describe, log=tmp_path / "log")
    for half, whole in halves:
        assert told(whole).cpu >= 0.3
        assert close_to(told(whole).cpu, group(usage, f"{half.name[0]}.cu").cpu), half
    assert usage.unseen < 0.1
