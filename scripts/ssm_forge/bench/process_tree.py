"""Measures a command with everything that it starts: CPU by kind of program, memory, and when each part ran.

``/proc`` is read some twenty times a second. What a process does after it was last seen is in no sample; the kernel
adds it to the parent that waited for it, where it is found at the next look. So the total of the whole tree is exact
(``wait4``), and unseen is only what processes took that came and went between two looks. A process belongs to the
tree when its parent does, or when it is in a session that a process of the tree leads: workers are started in
sessions of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ssm_forge.bench.usage import Group, Moment, ToolUse, Usage

# What a command line says: the kind of program, and labels that its descendants share.
Describe = Callable[[tuple[str, ...]], tuple[str, Mapping[str, str]]]

INTERVAL_SECONDS = 0.05

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class _Stat:
    name: str
    parent: int
    session: int
    cpu: float
    waited: float
    start: int
    rss: int
    ended: bool = False


@dataclass
class _Process:
    start: int
    parent: _Process | None
    cpu: float = 0.0
    waited: float = 0.0
    command: bytes | None = None
    tool: str = ""
    own_labels: Mapping[str, str] = field(default_factory=dict)
    tally: _Tally | None = None

    def labels(self) -> dict[str, str]:
        """The outermost program that names a source file knows its real name; what it starts has temporary ones."""
        return {**self.own_labels, **(self.parent.labels() if self.parent else {})}


@dataclass
class _Tally:
    labels: dict[str, str]
    cpu: dict[str, float] = field(default_factory=dict)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    peak: int = 0


def _read_stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name may hold blanks and brackets.
    head, _, tail = text.rpartition(b")")
    fields = tail.split()
    return _Stat(
        name=head.partition(b"(")[2].decode(errors="replace"),
        parent=int(fields[1]),
        session=int(fields[3]),
        cpu=(int(fields[11]) + int(fields[12])) / _TICKS,
        waited=(int(fields[13]) + int(fields[14])) / _TICKS,
        start=int(fields[19]),
        rss=max(0, int(fields[21])) * _PAGE,
        ended=fields[0] in (b"Z", b"X"),
    )


def _read_command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _machine_busy() -> float:
    """CPU seconds that this machine's cores were not idle since it started."""
    fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    user, nice, system, _idle, _wait, interrupts, soft = fields
    return (user + nice + system + interrupts + soft) / _TICKS


def _below(process: _Process, gone: Sequence[_Process]) -> list[_Process]:
    """Those of ``gone`` that ``process`` started, and those that they started."""
    children = [each for each in gone if each.parent is process]
    return [*children, *(each for child in children for each in _below(child, gone))]


def _add(tally: _Tally, tool: str, seconds: float, at: float, moment: Moment) -> None:
    tally.cpu[tool] = tally.cpu.get(tool, 0.0) + seconds
    tally.spans[tool] = (tally.spans.get(tool, (at, at))[0], at)
    moment.cpu[tool] = moment.cpu.get(tool, 0.0) + seconds


class Tree:
    """The processes that a root process started, as samples see them."""

    def __init__(self, root: int, describe: Describe, labels: Mapping[str, str]) -> None:
        self.samples = 0
        self.peak_rss = 0
        self.largest = 0
        self.timeline: dict[int, Moment] = {}
        self._root = root
        self._describe = describe
        self._labels = dict(labels)
        self._members: dict[int, _Process] = {}
        self._sessions = {root}
        self._foreign: set[int] = set()
        self._tallies: dict[tuple[tuple[str, str], ...], _Tally] = {}

    def sample(self, at: float) -> None:
        """Look once; ``at`` is seconds since the command was started."""
        self.samples += 1
        before = self._members
        seen = self._refresh()
        gone = [process for pid, process in before.items() if self._members.get(pid) is not process]
        total = 0
        by_group: dict[tuple[tuple[str, str], ...], int] = {}
        moment = self.timeline.setdefault(int(at), Moment(float(int(at)), {}, 0))
        for pid, stat in seen.items():
            self._identify(pid, stat, self._members[pid])
        for pid, stat in seen.items():
            process = self._members[pid]
            if process.command is None:
                continue
            key, tally = self._tally(process)
            process.tally = tally
            _add(tally, process.tool, max(0.0, stat.cpu - process.cpu), at, moment)
            process.cpu = max(process.cpu, stat.cpu)
            ended = _below(process, gone)
            if ended:
                last = stat.waited - process.waited - sum(each.cpu + each.waited for each in ended)
                for each in ended:
                    # With the labels that it had: what had started it may be another program by now.
                    own = each.tally or self._tally(each)[1]
                    _add(own, each.tool, max(0.0, last) / len(ended), at, moment)
            process.waited = stat.waited
            by_group[key] = by_group.get(key, 0) + stat.rss
            total += stat.rss
            self.largest = max(self.largest, stat.rss)
        for key, resident in by_group.items():
            self._tallies[key].peak = max(self._tallies[key].peak, resident)
        self.peak_rss = max(self.peak_rss, total)
        self.timeline[int(at)] = replace(moment, rss=max(moment.rss, total))

    def _tally(self, process: _Process) -> tuple[tuple[tuple[str, str], ...], _Tally]:
        labels = {**process.labels(), **self._labels}
        key = tuple(sorted(labels.items()))
        return key, self._tallies.setdefault(key, _Tally(labels))

    def alive(self) -> list[int]:
        """Processes of the tree that still run, those included that nobody waits for any more."""
        return list(self._refresh())

    def groups(self) -> tuple[Group, ...]:
        """What the samples saw so far, by labels."""
        return tuple(
            Group(
                tally.labels, {tool: ToolUse(tally.cpu[tool], *span) for tool, span in tally.spans.items()}, tally.peak
            )
            for tally in self._tallies.values()
        )

    def _refresh(self) -> dict[int, _Stat]:
        """Find the tree's processes; those that are gone are forgotten."""
        present = {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208 - read twenty times a second
        seen: dict[int, _Stat] = {}
        fresh: dict[int, _Stat] = {}
        # A process that was there before and not ours is still not ours, and there are many.
        self._foreign &= present
        for pid in present - self._foreign:
            stat = _read_stat(pid)
            if stat is None:
                continue
            member = self._members.get(pid)
            (seen if member is not None and member.start == stat.start else fresh)[pid] = stat
        self._members = {pid: process for pid, process in self._members.items() if pid in seen}
        # A session may begin after its leader was first seen.
        self._sessions |= {pid for pid, stat in seen.items() if stat.session == pid}
        seen |= self._admit(fresh)
        self._foreign |= set(fresh)
        return seen

    def _admit(self, fresh: dict[int, _Stat]) -> dict[int, _Stat]:
        """Take the tree's processes out of ``fresh``."""
        admitted: dict[int, _Stat] = {}
        while pids := [pid for pid, stat in fresh.items() if self._belongs(pid, stat, fresh)]:
            for pid in pids:
                stat = admitted[pid] = fresh.pop(pid)
                self._members[pid] = _Process(stat.start, self._members.get(stat.parent), tool=stat.name)
                if stat.session == pid:
                    self._sessions.add(pid)
        return admitted

    def _belongs(self, pid: int, stat: _Stat, fresh: Mapping[int, _Stat]) -> bool:
        if pid == self._root or stat.parent in self._members:
            return True
        # Parents first, for labels come from them; a session is for those whose parent is gone.
        return stat.session in self._sessions and stat.parent not in fresh

    def _identify(self, pid: int, stat: _Stat, process: _Process) -> None:
        """Follow what the process runs: most start as a copy of their parent and become something else."""
        command = _read_command(pid)
        # One that has ended has no command line any more, and its last CPU belongs to what it was.
        if process.command is not None and command in (b"", process.command):
            return
        # Neither has one that is becoming another program at this moment: the next look tells what it is.
        if not command and not stat.ended:
            return
        process.command = command
        argv = command.decode(errors="replace").rstrip("\0").split("\0") if command else [stat.name]
        process.tool, process.own_labels = self._describe(tuple(argv))


def measure(
    command: Sequence[str | Path],
    *,
    describe: Describe,
    log: Path,
    output: Path | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    interval: float = INTERVAL_SECONDS,
) -> Usage:
    """Run a command in a session of its own until it ends; what it and all that it started took comes out.

    On any exception, Ctrl-C included, every process of the tree is stopped first.

    Args:
        describe: what a command line says.
        log: file that messages are added to.
        output: file for its stdout; the log where there is none.
        labels: labels of the whole tree.
        interval: seconds between two looks.
    """
    busy, own = _machine_busy(), time.process_time()
    started = time.monotonic()
    with log.open("ab") as messages, contextlib.ExitStack() as stack:
        stdout = messages if output is None else stack.enter_context(output.open("wb"))
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=messages,
            cwd=cwd,
            env=None if environment is None else dict(environment),
            start_new_session=True,
        )
    tree = Tree(process.pid, describe, labels or {})
    try:
        while True:
            tree.sample(time.monotonic() - started)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(interval)
    except BaseException:
        _stop(process, tree)
        raise
    wall, process.returncode = time.monotonic() - started, os.waitstatus_to_exitcode(status)
    figures = _figures(tree, process.returncode, wall, of_kernel=usage.ru_utime + usage.ru_stime)
    own_cpu = time.process_time() - own
    return replace(figures, others_cpu=max(0.0, _machine_busy() - busy - figures.cpu - own_cpu), own_cpu=own_cpu)


def _figures(tree: Tree, returncode: int, wall: float, *, of_kernel: float) -> Usage:
    """What the samples of a tree come to, without what was outside of it.

    Args:
        wall: seconds that the command took.
        of_kernel: CPU seconds of the tree as the kernel counts them.
    """
    by_tool: Counter[str] = Counter()
    for group in tree.groups():
        by_tool.update({tool: use.cpu for tool, use in group.tools.items()})
    return Usage(
        returncode=returncode,
        wall=wall,
        # What nobody waited for is in no total of the kernel's.
        cpu=max(of_kernel, sum(by_tool.values())),
        cpu_by_tool=dict(by_tool),
        peak_rss=tree.peak_rss,
        # Not the kernel's ru_maxrss: that counts this process too, which the command is a copy of at first.
        largest=tree.largest,
        groups=tree.groups(),
        timeline=tuple(tree.timeline[second] for second in sorted(tree.timeline)),
        samples=tree.samples,
        others_cpu=0.0,
        own_cpu=0.0,
    )


def _stop(process: subprocess.Popen[bytes], tree: Tree) -> None:
    """Ask the command to end, so that it can clean up, then end whatever is left of its tree."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _GRACE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        tree.alive()  # A process is known as long as its parent was seen.
        time.sleep(INTERVAL_SECONDS)
    for _ in range(3):
        for pid in tree.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(INTERVAL_SECONDS)
    process.wait()
