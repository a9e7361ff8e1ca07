"""What a measured command took: figures of whole commands, and those of several added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

MEMORY_NOTE = "sum of RSS over all processes of the tree; pages that two of them share count twice"


@dataclass(frozen=True)
class ToolUse:
    """What one kind of program took under one set of labels.

    Attributes:
        cpu: seconds, user and system, as far as samples saw it.
        first: seconds from the start of the command to the first sample with such a process.
        last: the same, of the last one.
    """

    cpu: float
    first: float
    last: float


@dataclass(frozen=True)
class Group:
    """All processes with the same labels.

    Attributes:
        peak_rss: bytes, the highest sum of RSS at one moment.
    """

    labels: dict[str, str]
    tools: dict[str, ToolUse]
    peak_rss: int

    @property
    def cpu(self) -> float:
        """CPU seconds of all its tools."""
        return sum(use.cpu for use in self.tools.values())

    @property
    def first(self) -> float:
        """Seconds from the start of the command to the first sample of any of its tools."""
        return min(use.first for use in self.tools.values())

    @property
    def last(self) -> float:
        """The same, to the last sample."""
        return max(use.last for use in self.tools.values())


@dataclass(frozen=True)
class Moment:
    """One second of the timeline.

    Attributes:
        at: seconds from the start.
        cpu: CPU seconds by kind of program within this second.
        rss: bytes, the highest sum of RSS in it.
    """

    at: float
    cpu: dict[str, float]
    rss: int


@dataclass(frozen=True)
class Usage:
    """What a command and everything it started took.

    Attributes:
        wall: seconds.
        cpu: seconds, user and system, of the whole tree.
        cpu_by_tool: seconds, as far as samples saw it.
        peak_rss: bytes, the highest sum of RSS at one moment (see ``MEMORY_NOTE``).
        largest: bytes, the highest RSS of a single process.
        samples: how often the tree was looked at.
        others_cpu: CPU seconds that the rest of this machine took meanwhile.
        own_cpu: CPU seconds that measuring took.
    """

    returncode: int
    wall: float
    cpu: float
    cpu_by_tool: dict[str, float]
    peak_rss: int
    largest: int
    groups: tuple[Group, ...]
    timeline: tuple[Moment, ...]
    samples: int
    others_cpu: float
    own_cpu: float

    @property
    def unseen(self) -> float:
        """CPU seconds that no sample saw: short processes, and the end of each long one."""
        return max(0.0, self.cpu - sum(self.cpu_by_tool.values()))


def join(usages: Iterable[Usage]) -> Usage:
    """Commands that ran one after the other, as one."""
    every = list(usages)
    shift, groups, timeline = 0.0, [], []
    by_tool: Counter[str] = Counter()
    for usage in every:
        groups += [_shifted(group, shift) for group in usage.groups]
        timeline += [replace(moment, at=moment.at + shift) for moment in usage.timeline]
        by_tool.update(usage.cpu_by_tool)
        shift += usage.wall
    return Usage(
        returncode=max((usage.returncode for usage in every), key=abs),
        wall=shift,
        cpu=sum(usage.cpu for usage in every),
        cpu_by_tool=dict(by_tool),
        peak_rss=max(usage.peak_rss for usage in every),
        largest=max(usage.largest for usage in every),
        groups=tuple(groups),
        timeline=tuple(timeline),
        samples=sum(usage.samples for usage in every),
        others_cpu=sum(usage.others_cpu for usage in every),
        own_cpu=sum(usage.own_cpu for usage in every),
    )


def _shifted(group: Group, seconds: float) -> Group:
    tools = {t: replace(use, first=use.first + seconds, last=use.last + seconds) for t, use in group.tools.items()}
    return replace(group, tools=tools)
