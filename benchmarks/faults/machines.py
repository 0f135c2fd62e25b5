"""Runs that are killed, told to stop, or whose disk fills up; on one host and on several."""

import concurrent.futures
import contextlib
import itertools
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.faults import training
from benchmarks.faults.outcomes import Outcomes, flip
from benchmarks.faults.training import Run, Undisturbed
from launch import processes
from saber_jax.runs import distributed
from saber_jax.train import saved

LANES = 2
"""Runs at a time."""
HEARTBEAT = 10
"""config.heartbeat_seconds of several hosts."""
BOUND = 4 * HEARTBEAT
"""Seconds in which all hosts have to end when one of them is gone: they miss its heartbeats, and
then leave one after the other."""


def side_by_side(
    work: Callable[[Path, int, np.random.Generator], Iterator[str]],
    folder: Path,
    count: int,
    rng: np.random.Generator,
) -> Outcomes:
    """Iterates over `work` in LANES threads, each with a part of `count`. Counts the outcomes, and
    prints those so far if the benchmark is told to stop."""
    shares = [len(range(lane, count, LANES)) for lane in range(LANES)]
    folders = [folder / f"lane{lane}" for lane in range(LANES)]
    lanes = zip(folders, shares, rng.spawn(LANES), strict=True)
    seen: list[str] = []

    def follow(lane: tuple[Path, int, np.random.Generator]) -> None:
        for outcome in work(*lane):
            seen.append(outcome)

    try:
        with concurrent.futures.ThreadPoolExecutor(LANES) as pool:
            list(pool.map(follow, lanes))
    except BaseException:
        print(f"{folder.name}, stopped after {dict(Outcomes(seen))}", flush=True)
        raise
    return Outcomes(seen)


def kills(
    records: Path,
    folder: Path,
    count: int,
    rng: np.random.Generator,
    how: signal.Signals,
    wanted: Undisturbed,
) -> Outcomes:
    """Sends the signal `how` to runs at random moments until `count` signals have hit. A run has to
    continue when it is started again, and to end with the numbers of an undisturbed one."""
    expected = -how if how == signal.SIGKILL else distributed.PREEMPTED

    def lane(folder: Path, count: int, rng: np.random.Generator) -> Iterator[str]:
        done = 0
        for number in itertools.count():
            root, ended = folder / f"run{number}", False
            while not ended:
                if done == count:
                    return
                before, run = training.whole(root), Run(records, root)
                run.process.join(float(rng.uniform(0, 1.2 * wanted.seconds)))
                run.send(how)
                status = run.ended(wanted.patience)
                ended = status == 0
                if ended and training.final(records, root) == wanted.numbers:
                    continue  # It was not hit.
                done += 1
                if status is None:
                    yield "hang"
                elif ended:
                    yield "silent"
                elif status != expected:
                    yield "unnamed"
                else:
                    yield "fine" if training.whole(root) >= before else "lost"

    return side_by_side(lane, folder, count, rng)


@contextlib.contextmanager
def small_disk(folder: Path, limit: str) -> Iterator[Path | None]:
    """Mounts a small tmpfs and yields it; None where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disks(
    records: Path, folder: Path, count: int, rng: np.random.Generator, wanted: Undisturbed
) -> Outcomes:
    """Runs on disks that run out of bytes, every second one of files and folders: metrics and
    TensorBoard are dropped, a save that fails is one sentence, and with room again the run goes on
    from the last whole step.

    Where nothing may be mounted, the largest size of a file is limited instead.
    """

    def lane(folder: Path, count: int, rng: np.random.Generator) -> Iterator[str]:
        for number in range(count):
            share = rng.uniform(0.01, 1.1)
            room = f"size={int(wanted.size * share) >> 10}k"
            if number % 2:
                room = f"nr_inodes={2 + int(wanted.files * share)}"
            with small_disk(folder / f"disk{number}", room) as disk:
                limit = None if disk else int(rng.integers(1, wanted.size // 8))
                root = (disk or folder / f"limited{number}") / "run"
                yield filled(records, root, wanted, disk=disk, limit=limit)

    return side_by_side(lane, folder, count, rng)


def filled(
    records: Path, root: Path, wanted: Undisturbed, *, disk: Path | None, limit: int | None
) -> str:
    first = Run(records, root, largest_file=limit)
    status = first.ended(wanted.patience)
    if status is None:
        return "hang"
    if status == 0:
        same = training.final(records, root) == wanted.numbers
        return "fine" if same else "silent"
    # The log may be on the full disk as well; only what was written to it is judged.
    if disk is None and "too large" not in first.said:
        return "unnamed"
    if disk is not None and "No space left" not in first.said and first.said:
        return "unnamed"
    if disk is not None:
        subprocess.run(["mount", "-o", "remount,size=1g,nr_inodes=100k", str(disk)], check=True)
    again = Run(records, root).ended(wanted.patience)
    done = again == 0 and training.final(records, root) == wanted.numbers
    return "named" if done else "lost"


def hosts(
    members: int, records: Path, folder: Path, count: int, rng: np.random.Generator
) -> Outcomes:
    """`members` processes that train together; one of them is killed, stopped, finds the newest
    step damaged, or has a full disk: the first `count` of these four. All end with a status other
    than 0 within the bound, and go on to the last step when they are started again."""
    counts = Outcomes()
    for fault in (killed_host, stopped_host, damaged_step, full_host)[:count]:
        root = folder / fault.__name__
        try:
            found = fault(records, root, members, rng)
        finally:
            training.end_those_of(root)
        print(f"one of {members} hosts, {fault.__name__}: {found}", flush=True)
        counts[found] += 1
    return counts


def together(records: Path, root: Path, count: int, limit: int | None = None) -> list[Run]:
    """`count` processes of one run. The last cannot write files of more than `limit` bytes."""
    port = processes.free_port()

    def place(index: int) -> dict[str, str]:
        return {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
            # Several processes compile anew every time.
            "XLA_FLAGS": training.UNOPTIMISED,
        }

    changes = {"heartbeat_seconds": HEARTBEAT, "data.batch_rows": count}
    limits = [None] * (count - 1) + [limit]
    return [Run(records, root, changes, place(i), most) for i, most in enumerate(limits)]


def killed_host(records: Path, root: Path, count: int, rng: np.random.Generator) -> str:
    runs = _after_two_steps(records, root, count)
    runs[-1].send(signal.SIGKILL)
    return _all_end_and_go_on(runs, records, root, within=BOUND)


def stopped_host(records: Path, root: Path, count: int, rng: np.random.Generator) -> str:
    """The host stands still, as a virtual machine does while it is moved, and wakes up when the
    others have ended."""
    runs = _after_two_steps(records, root, count)
    runs[-1].send(signal.SIGSTOP)
    others = _statuses(runs[:-1], BOUND)
    runs[-1].send(signal.SIGCONT)
    if None in others:
        return "hang"
    if 0 in others:
        return "silent"
    return _all_end_and_go_on(runs[-1:], records, root, within=BOUND, count=count)


def _after_two_steps(records: Path, root: Path, count: int) -> list[Run]:
    runs, end = together(records, root, count), time.monotonic() + training.PATIENCE
    while training.whole(root) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    return runs


def damaged_step(records: Path, root: Path, count: int, rng: np.random.Generator) -> str:
    if any(run.ended(training.PATIENCE) for run in together(records, root, count)):
        return "lost"
    newest = saved.steps(root / "sft")[-1]
    files = [p for p in (newest / "params").rglob("*") if p.is_file() and p.parent.name == "d"]
    flip(max(files, key=lambda p: p.stat().st_size), rng)
    runs = together(records, root, count)
    statuses = [run.ended(training.PATIENCE) for run in runs]
    said = "".join(run.said for run in runs)
    if None in statuses:
        return "hang"
    if "damaged" not in said or not list((root / "sft/checkpoints").glob("*.damaged*")):
        return "silent"
    if not any(statuses):
        return "named" if training.whole(root) == training.STEPS else "lost"
    return _finished(records, root, count)


def full_host(records: Path, root: Path, count: int, rng: np.random.Generator) -> str:
    runs = together(records, root, count, limit=4096)
    return _all_end_and_go_on(runs, records, root, reason="too large")


def _all_end_and_go_on(
    runs: list[Run],
    records: Path,
    root: Path,
    *,
    within: float = training.PATIENCE,
    reason: str = "",
    count: int | None = None,
) -> str:
    """All `runs` have to end within so many seconds, one has to print `reason`, and `count` new
    ones, by default as many, have to finish."""
    statuses = _statuses(runs, within)
    if None in statuses:
        return "hang"
    if 0 in statuses:
        return "silent"
    if reason not in "".join(run.said for run in runs):
        return "unnamed"
    return _finished(records, root, count or len(runs))


def _statuses(runs: list[Run], within: float) -> list[int | None]:
    """How each run has ended; None for those that needed more than so many seconds."""
    end = time.monotonic() + within
    return [run.ended(max(0.1, end - time.monotonic())) for run in runs]


def _finished(records: Path, root: Path, count: int) -> str:
    statuses = [run.ended(training.PATIENCE) for run in together(records, root, count)]
    return "named" if not any(statuses) and training.whole(root) == training.STEPS else "lost"
