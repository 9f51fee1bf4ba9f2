"""How many threads a run gets on a machine that others use too.

Threads that share their cores with other processes wait for each other in every operation: two threads beside two busy
processes on two cores are slower than one. What is free is seen while the runner itself starts.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

SHORTEST = 0.3  # seconds, below which the clock ticks of a window tell nothing
STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Seen:
    """Seconds: of the clock, that our cores were idle, and that this process worked."""

    clock: float
    idle: float
    own: float


def look() -> Seen | None:
    """What /proc/stat says now of the cores that this process may use; None where there is none."""
    try:
        mine = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        lines = [line.split() for line in STAT.read_text().splitlines()]
        ticks = sum(int(words[4]) + int(words[5]) for words in lines if words and words[0] in mine)  # idle, waiting
        return Seen(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())
    except (OSError, AttributeError, ValueError, IndexError):
        return None


def free_threads(before: Seen | None, now: Seen | None) -> int | None:
    """The cores, rounded and at least one, that were idle or this process's own between two looks; None if unknown."""
    if before is None or now is None or now.clock - before.clock < SHORTEST:
        return None
    free = (now.idle - before.idle + now.own - before.own) / (now.clock - before.clock)
    return max(1, round(free))
