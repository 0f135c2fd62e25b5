"""How a run spends its time: phases of this process, and records of all of its starts.

The first host writes WORKDIR/attempts/N.json for its N-th start, at every checkpoint and at the
end:

    {"began": 1790000000.0, "until": 1790003600.0, "first": 0, "last": 400, "chips": 256,
     "seconds": {"start": 95.1, "compile": 240.3, "input": 2.2, "step": 3180.0, "save": 31.9}}

Goodput is the share of the time from the first start to the last record that was spent on steps
that were kept. Steps lost by an interruption are mostly not in any record, so they count as time
between records, like the time without a machine. If a later start begins before the `last` of a
record, because that checkpoint was never finished or was damaged, the steps in between are lost.
"""

import collections
import itertools
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from saber_jax.runs.console import DropCounter
from saber_jax.runs.files import listed, make_folder, read_json, write_json

PHASES: tuple[str, ...] = ("start", "input", "compile", "step", "validate", "save", "finish")
"""Phases of a run, in the order of a step."""
REMEMBERED = 64


class PhaseClock:
    """The current phase of this process. One thread changes it, others may read it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._phase, self._step, self._since = "start", -1, time.monotonic()
        self._of_step: dict[str, float] = {}
        self._attempts = 0
        self._steps: collections.deque[float] = collections.deque(maxlen=REMEMBERED)
        self._waits: collections.deque[float] = collections.deque(maxlen=REMEMBERED)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Enters `phase`, one of PHASES; "input" begins step number `step`."""
        now = time.monotonic()
        with self._lock:
            passed = now - self._since
            self._seconds[self._phase] += passed
            self._of_step[self._phase] = self._of_step.get(self._phase, 0.0) + passed
            if phase == "input":
                self._end_step()
            self._phase, self._since = phase, now
            self._step = self._step if step is None else step

    def _end_step(self) -> None:
        # A step with a compilation is not representative.
        if self._of_step.keys() >= {"input", "step"} and "compile" not in self._of_step:
            self._steps.append(self._of_step["input"] + self._of_step["step"])
            self._waits.append(self._of_step["input"])
        self._of_step = {}

    def now(self) -> tuple[str, int, float]:
        """(phase, step or -1 before the first, seconds since the phase began)."""
        with self._lock:
            return self._phase, self._step, time.monotonic() - self._since

    def medians(self) -> tuple[float, float] | None:
        """Seconds of a step and of its wait for input; None before the first whole step."""
        with self._lock:
            if not self._steps:
                return None
            return statistics.median(self._steps), statistics.median(self._waits)

    def begin_attempt(self) -> dict[str, float]:
        """Seconds by phase that belong to earlier attempts; the first one has no earlier ones."""
        before = self.seconds() if self._attempts else dict.fromkeys(PHASES, 0.0)
        self._attempts += 1
        return before

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, including the current one."""
        with self._lock:
            running = {self._phase: time.monotonic() - self._since}
            return {name: s + running.get(name, 0.0) for name, s in self._seconds.items()}


class Attempt:
    """The record of this start, written by one process. A rollback to a checkpoint starts another
    one. What cannot be written to a full disk is dropped with a warning."""

    def __init__(self, workdir: Path, clock: PhaseClock, *, first: int, chips: int):
        """`first` is the step that this start begins with."""
        self._clock = clock
        self._folder = Path(workdir) / "attempts"
        numbers = [int(path.stem) for path in _records(self._folder)]
        self._path = self._folder / f"{max(numbers, default=0) + 1}.json"
        self._dropped = DropCounter(f"records of times in {self._folder}")
        self._before = clock.begin_attempt()
        # The process is a little older than its first attempt.
        began = time.time() - sum(self._own_seconds().values())
        self._about: dict[str, Any] = {"began": began, "first": first, "chips": chips}

    def _own_seconds(self) -> dict[str, float]:
        now = self._clock.seconds()
        return {name: value - self._before[name] for name, value in now.items()}

    def write(self, last: int) -> None:
        """`last` is the number of steps that are saved by now."""
        seconds = {name: round(value, 2) for name, value in self._own_seconds().items()}
        record = self._about | {"until": time.time(), "last": last, "seconds": seconds}
        try:
            make_folder(self._folder)
            write_json(self._path, record)
        except OSError as error:
            self._dropped.add(1, str(error))


def goodput(workdir: Path) -> dict[str, Any]:
    """{"goodput": 0.93, "starts": 2, "wall_seconds": ..., "chip_hours": ..., "seconds": {...}}.

    `seconds` has the phases, "lost", the time of recorded steps that a later start did again, and
    "between", the time between the records of two starts. {} where nothing was recorded.
    """
    records = [read_json(path) for path in _records(Path(workdir) / "attempts")]
    if not records:
        return {}
    seconds: dict[str, float] = {
        name: sum(r["seconds"].get(name, 0.0) for r in records) for name in PHASES
    }
    seconds["lost"] = sum(_lost(r, records[i + 1 :]) for i, r in enumerate(records))
    seconds["step"] -= seconds["lost"]
    gaps = itertools.pairwise(records)
    seconds["between"] = sum(max(0.0, after["began"] - r["until"]) for r, after in gaps)
    wall = sum(seconds.values())
    used = sum(r["chips"] * sum(r["seconds"].values()) for r in records)
    return {
        "goodput": seconds["step"] / wall if wall else 0.0,
        "starts": len(records),
        "wall_seconds": wall,
        "chip_hours": used / 3600,
        "seconds": seconds,
    }


def _lost(record: dict[str, Any], later: list[dict[str, Any]]) -> float:
    """Seconds of the steps of `record` that `later` starts did again."""
    firsts = [after["first"] for after in later if "first" in after]
    if not firsts or record.get("last", 0) <= record.get("first", 0):
        return 0.0
    first, last = record["first"], record["last"]
    kept = min(last, max(first, min(firsts)))
    return record["seconds"].get("step", 0.0) * (last - kept) / (last - first)


def _records(folder: Path) -> list[Path]:
    found = [path for path in listed(folder, "*.json") if path.stem.isdigit()]
    return sorted(found, key=lambda path: int(path.stem))
