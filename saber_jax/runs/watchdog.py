"""A watchdog that ends a run without progress and reports the state of every host.

A host that hangs, in a collective that another host never joins or on a disk that does not respond,
still sends heartbeats. A thread on every host therefore measures how long its main thread has been
in one phase of one step. If that takes too long on any host, all hosts write the stacks of all
their threads to stderr and to WORKDIR/stacks/host_N.txt, name the host that is behind the others,
and exit with status STALLED, also if the disk is what hangs. The next start resumes.

The hosts communicate through the key-value store of jax.distributed in the first host's process.
They also use it to report the durations of their steps and of their waits for input.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from saber_jax.runs import files, private
from saber_jax.runs.phases import PHASES, PhaseClock

STALLED = 70
"""Exit status of a run that was ended because it made no progress (EX_SOFTWARE)."""

MEDIANS = 20
# The limit for phases of unknown duration: compiling, restoring and saving tens of gigabytes.
LONG_SECONDS = 3600
EVERY_SECONDS = 5.0
# How long a host waits for the stacks of the others.
STACKS_SECONDS = 15.0
# How long a host waits for its own to be written to the work directory.
FILE_SECONDS = 5.0
LAST_SECONDS = 1.0
# A host that cannot even report leaves after this time: longer than all of the above together.
LEAVE_SECONDS = 60.0


class SharedStore:
    """Short texts that all hosts can read, by key. In one process it is a dict."""

    def __init__(self):
        self._client = private.key_value_store()
        self._own: dict[str, str] = {}

    def put(self, folder: str, host: int, text: str) -> None:
        self._own[f"{folder}/{host}"] = text
        if self._client is not None:
            self._client.key_value_set(f"saber/{folder}/{host}", text, allow_overwrite=True)

    def read(self, folder: str) -> dict[int, str]:
        """{host: text}"""
        found = [(k, v) for k, v in self._own.items() if k.startswith(f"{folder}/")]
        if self._client is not None:
            found = self._client.key_value_dir_get(f"saber/{folder}/")
        return {int(key.rpartition("/")[2]): text for key, text in found}


@dataclasses.dataclass(frozen=True)
class Progress:
    """The last report of a host: its phase and the `seconds` in it, and the medians of its step and
    input wait durations, 0 before the first complete step."""

    step: int
    phase: str
    seconds: float
    step_seconds: float = 0.0
    input_wait: float = 0.0

    @property
    def order(self) -> tuple[int, int]:
        """Lower is further behind."""
        return self.step, PHASES.index(self.phase)


class Watchdog:
    """Watches `clock`. `least_seconds` is the minimum time in one phase that counts as a stall,
    even if steps are fast; with 0 nothing is watched, but hosts still report their times."""

    def __init__(
        self,
        workdir: str | Path,
        *,
        least_seconds: float,
        every: float = EVERY_SECONDS,
        leave: Callable[[int], object] = os._exit,
    ):
        self.clock = PhaseClock()
        self._folder = Path(workdir) / "stacks"
        self._least, self._every, self._leave = least_seconds, every, leave
        self._host, self._count = jax.process_index(), jax.process_count()
        self._store = SharedStore()
        self._hosts: dict[int, Progress] = {}
        self._ended = threading.Event()
        self._paused = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join(timeout=2 * self._every)

    def metrics(self) -> dict[str, float]:
        """hosts/step_seconds and hosts/input_wait of the slowest host, hosts/slowest_input its
        number. {} with one process, and on hosts other than the first."""
        told = {host: p for host, p in self._hosts.items() if p.step_seconds}
        if self._count == 1 or not told:
            return {}
        starved = max(told, key=lambda host: told[host].input_wait)
        return {
            "hosts/step_seconds": max(p.step_seconds for p in told.values()),
            "hosts/input_wait": told[starved].input_wait,
            "hosts/slowest_input": float(starved),
        }

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self._every):
            now = time.monotonic()
            # If the whole machine was suspended, this is not a stall.
            if now - before > 10 * self._every:
                self._paused = now
            before = now
            try:
                self._tell()
                alarms = self._store.read("alarm")
            except Exception as error:  # The first host, which keeps the store, may be gone.
                if self._ended.is_set():
                    return
                print(f"watchdog: the other hosts cannot be asked: {error}", file=sys.stderr)
                alarms = {}
            reason = self._stall() or next(iter(alarms.values()), "")
            if reason and not self._ended.is_set():
                self._alarm(reason)
                return

    def _tell(self) -> None:
        phase, step, seconds = self.clock.now()
        progress = Progress(step, phase, seconds, *(self.clock.medians() or ()))
        self._store.put("progress", self._host, json.dumps(dataclasses.asdict(progress)))
        if self._host == 0:
            self._hosts = self._read_progress()

    def _read_progress(self) -> dict[int, Progress]:
        told = self._store.read("progress")
        return {host: Progress(**json.loads(text)) for host, text in told.items()}

    def _limit(self, phase: str) -> float:
        medians = self.clock.medians()
        if phase in ("input", "step") and medians is not None:
            return max(self._least, MEDIANS * medians[0])
        return max(self._least, LONG_SECONDS)

    def _stall(self) -> str:
        """Why this host counts as stalled; "" if it does not."""
        phase, step, seconds = self.clock.now()
        limit = self._limit(phase)
        seconds = min(seconds, time.monotonic() - self._paused)
        if not self._least or seconds < limit:
            return ""
        medians = self.clock.medians()
        usual = f", where a whole step takes {medians[0]:.1f} s" if medians else ""
        return (
            f"host {self._host} has been in phase {phase!r} of step {step} for {seconds:.0f} s"
            f"{usual}; the limit is {limit:.0f} s (config.stall_seconds)"
        )

    def _alarm(self, reason: str) -> None:
        """Writes the stacks of all hosts, names the slowest host, and exits."""
        # What is printed may go to a file on the disk that hangs.
        unreported = threading.Timer(LEAVE_SECONDS, self._leave, (STALLED,))
        unreported.daemon = True
        unreported.start()
        with contextlib.suppress(Exception):
            self._store.put("alarm", self._host, reason)
        where = self._keep_stacks(self._print_stacks())
        with contextlib.suppress(Exception):
            self._store.put("stacks", self._host, "written")
        # The watchdogs of these hosts do not respond either.
        silent = self._wait_for("stacks", list(range(self._count)))
        print(f"watchdog: no progress: {reason}.", file=sys.stderr)
        print(f"watchdog: {self._slowest(silent)}", file=sys.stderr)
        print(
            f"watchdog: stacks of every thread are above and {where}. Exit status {STALLED}; the "
            "same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        # The store is in the first host's process, and hosts that read it fail when it is gone, so
        # the first host exits last.
        others = [host for host in range(self._count) if host != 0 and host not in silent]
        if self._host == 0 and others:
            self._wait_for("left", others)
            time.sleep(LAST_SECONDS)
        else:
            with contextlib.suppress(Exception):
                self._store.put("left", self._host, "yes")
        unreported.cancel()
        self._leave(STALLED)

    def _print_stacks(self) -> str:
        """Prints the stacks of all threads and returns them."""
        # faulthandler keeps Python's lock while it writes: on a disk that hangs, everything would.
        try:
            with tempfile.TemporaryFile("w+") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                stacks = file.read()
        except OSError as error:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            return f"They are only on stderr: {error}\n"
        print(stacks, file=sys.stderr, flush=True)
        return stacks

    def _keep_stacks(self, stacks: str) -> str:
        """Writes the stacks to the work directory and says where they are. The disk may be what
        hangs, and a thread that waits for it cannot be ended, so it is left behind."""
        path = self._folder / f"host_{self._host}.txt"
        failed = []

        def write() -> None:
            try:
                files.make_folder(self._folder)
                files.write_text(path, stacks)
            except Exception as error:
                failed.append(f"it cannot be written: {error}")

        writing = threading.Thread(target=write, daemon=True, name="stacks")
        writing.start()
        writing.join(FILE_SECONDS)
        if writing.is_alive():
            failed.append(f"its disk did not answer for {FILE_SECONDS:g} s")
        return f"not in {path}, because {failed[0]}" if failed else f"in {self._folder}"

    def _wait_for(self, folder: str, hosts: list[int]) -> list[int]:
        """The `hosts` that did not write to `folder` in time."""
        missing, deadline = hosts, time.monotonic() + STACKS_SECONDS
        with contextlib.suppress(Exception):
            while missing and time.monotonic() < deadline:
                there = self._store.read(folder)
                missing = [host for host in hosts if host not in there]
                time.sleep(0.2 if missing else 0)
        return missing

    def _slowest(self, silent: list[int]) -> str:
        try:
            hosts = self._read_progress()
        except Exception as error:
            return f"where the other hosts stand is not known: {error}"
        if silent:
            return f"the slowest: host {', '.join(map(str, silent))}, not even its watchdog answers"
        last = min(p.order for p in hosts.values())
        behind = [host for host, p in hosts.items() if p.order == last]
        if len(behind) == len(hosts) > 1:
            return f"all {len(hosts)} hosts are in phase {PHASES[last[1]]!r} of step {last[0]}"
        names = ", ".join(map(str, behind[:8]))
        return f"the slowest: host {names}, in phase {PHASES[last[1]]!r} of step {last[0]}"
