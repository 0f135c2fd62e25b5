"""Runs commands side by side, each on cores of its own.

A tiny network has too little work for two threads, and preparing data and compiling use one core
anyway, so two chains on one core each should get more done than two in turn on both.
"""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

from saber_jax.runs.distributed import PREEMPTED

PROGRESS = re.compile(r"(\[\d+/\d+\] |All \d+ steps|error: )")
"""Lines of a command that are shown on the console too; all others are in its log."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command that takes --cores, and the file that its output is appended to."""

    name: str
    command: tuple[str, ...]
    log: Path


class Runner:
    """Runs jobs, `at_once` at a time. A job that fails does not stop the others."""

    def __init__(self, at_once: int):
        self._cores: SimpleQueue[tuple[str, ...]] = SimpleQueue()
        for cores in shares(at_once):
            self._cores.put(cores)
        self._at_once = at_once
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> None:
        """Returns when all have succeeded, and exits otherwise. SIGTERM and Ctrl-C are passed on
        to the commands, and end this when they have ended."""
        before = {
            kind: signal.signal(kind, lambda *_: self._stop())
            for kind in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            with ThreadPoolExecutor(self._at_once) as pool:
                statuses = list(pool.map(self._run, jobs))
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
        if self._stopped:
            stopped()
        failed = [
            f"{job.name} failed with status {status}, see {job.log}"
            for job, status in zip(jobs, statuses, strict=True)
            if status
        ]
        if failed:
            print(*failed, "The same command goes on from here.", sep="\n", file=sys.stderr)
            sys.exit(1)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _run(self, job: Job) -> int:
        cores = self._cores.get()
        try:
            return self._run_on(job, cores)
        finally:
            self._cores.put(cores)

    def _run_on(self, job: Job, cores: Sequence[str]) -> int:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self._stopped:
                return PREEMPTED
            process = subprocess.Popen(
                [sys.executable, *job.command[1:], "--cores", *cores],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # So that Ctrl-C in a terminal reaches this process only, which passes it on once.
                start_new_session=True,
            )
            self._running.add(process)
        assert process.stdout is not None
        print(f"{job.name}: on cores {', '.join(cores)}, all output in {job.log}", flush=True)
        with process.stdout, job.log.open("a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if PROGRESS.match(line):
                    print(f"{job.name}: {line}", end="", flush=True)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status


def stopped() -> NoReturn:
    """Ends this process after SIGTERM or Ctrl-C."""
    print("Stopped as asked. The same command goes on from here.", file=sys.stderr)
    sys.exit(PREEMPTED)


def shares(count: int) -> list[tuple[str, ...]]:
    """The cores of this process in `count` parts. With more parts than cores, some share one."""
    cores = sorted(_cores())
    return [
        tuple(map(str, cores[part::count] or [cores[part % len(cores)]])) for part in range(count)
    ]


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
