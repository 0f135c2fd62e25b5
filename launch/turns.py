"""Synchronisation of the hosts of a pod through a shared disk, while they run a chain.

Until training starts, the shared root folder is the only connection between the hosts. They first
meet there, so that a disk that is not shared is noticed before any work is done. Each host
regularly changes a file there as a heartbeat. A host that waits for the result of another one gives
up if that file says that the other one failed, or if it stops changing.

The disk may be a bucket or NFS, where any read or write can fail: NFS returns ESTALE to a reader
whose file is being replaced. A failed read is treated as no change, and a failed write is retried.
Clocks of different hosts are never compared.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from saber_jax.runs.files import make_folder, read_text, write_text

Value = TypeVar("Value")

BEAT_SECONDS = 10
PATIENCE_SECONDS = 300
# How long a disk may be unreadable before a waiting host gives up. While it cannot be read, missing
# heartbeats of other hosts do not count.
DISK_SECONDS = 1800
# Hosts need not start at once: machines boot, images are pulled, environments are made.
MEETING_SECONDS = 600
MEETINGS_KEPT = 20
RETRY_SECONDS = 1.0

# For commands that a host runs alone: these make its TPUs a separate slice
# (https://cloud.google.com/tpu/docs/run-in-container and jax's "Running multiple JAX processes"),
# so that it does not wait for the rest of the pod.
ALONE = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}
CHIP_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
JOINING = (
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    *("TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES"),
    *("MEGASCALE_SLICE_ID", "MEGASCALE_PORT"),
)


def alone(environ: dict[str, str], chips: int) -> dict[str, str]:
    """`environ` for a command that only this host runs, on its `chips` TPU chips if it has any."""
    kept = {name: value for name, value in environ.items() if name not in JOINING}
    if chips:
        kept |= ALONE | {"TPU_CHIPS_PER_PROCESS_BOUNDS": CHIP_BOUNDS[chips]}
        # libtpu finds what JOINING names in the TPU VM's metadata as well. It can do without
        # metadata only where a variable says what the chips are.
        if "TPU_ACCELERATOR_TYPE" in kept:
            kept["TPU_SKIP_MDS_QUERY"] = "1"
    return kept


def meet(
    folder: Path,
    index: int,
    count: int,
    *,
    patience: float = MEETING_SECONDS,
    every: float = 1.0,
) -> list[int]:
    """Returns when hosts 0 .. `count` - 1 have seen each other in `folder`; else, after `patience`
    seconds, the numbers of the hosts that this one misses.

    The first host writes a word that nobody used before and the others repeat it, so files that an
    earlier start left there mean nothing. Raises OSError when the disk cannot be written to for
    `patience` seconds.
    """
    deadline = time.monotonic() + patience
    _insist(lambda: make_folder(folder), deadline, every)
    call = folder / "meeting"

    def write(path: Path, text: str) -> None:
        _insist(lambda: _write(path, text), deadline, every)

    if index == 0:
        while (before := _read(call)) is None and time.monotonic() < deadline:
            time.sleep(every)
        # The word, then the words of earlier meetings: a slow host may still be about to read that
        # one of them ended well when the next meeting begins.
        earlier = (before or "").split()[1 : 1 + MEETINGS_KEPT]
        word, missing = uuid.uuid4().hex, set(range(1, count))
        write(call, " ".join([word, *earlier]))
        while missing := {i for i in missing if _read(folder / f"meeting_{i}") != word}:
            if time.monotonic() > deadline:
                return sorted(missing)
            time.sleep(every)
        write(call, " ".join([word, word, *earlier]))
        return []
    repeated: set[str] = set()
    while time.monotonic() < deadline:
        word, *met = (_read(call) or "").split() or [""]
        if repeated & set(met):
            return []
        if word and word not in met and word not in repeated:
            write(folder / f"meeting_{index}", word)
            repeated.add(word)
        time.sleep(every)
    return [0]


@contextlib.contextmanager
def beacon(path: Path) -> Iterator[None]:
    """Writes heartbeats to `path` while the context is open, and finally how it ended."""
    ended = threading.Event()
    # A unique name, because process ids are the same in several containers.
    name = uuid.uuid4().hex

    def beat() -> None:
        number = 0
        while True:
            # The next heartbeat tries again.
            with contextlib.suppress(OSError):
                _write(path, f"working {name} {number}")
            number += 1
            if ended.wait(BEAT_SECONDS):
                return

    with contextlib.suppress(OSError):
        make_folder(path.parent)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    last_word = "failed"
    try:
        yield
        last_word = "done"
    finally:
        ended.set()
        thread.join()
        # If this cannot be written, the others notice the missing heartbeats later.
        with contextlib.suppress(OSError):
            _insist(
                lambda: _write(path, f"{last_word} {name}"), time.monotonic() + 2 * BEAT_SECONDS
            )


def wait(
    done: Callable[[], bool],
    path: Path,
    *,
    patience: float = PATIENCE_SECONDS,
    every: float = 2.0,
    disk_patience: float = DISK_SECONDS,
) -> bool:
    """True when `done`; False when the beacon at `path` fails, or is silent for `patience` seconds.

    Only changes of the file count, so neither clocks that differ nor what an earlier run left there
    can mislead. An OSError of `done`, or a ValueError over half a file, means not yet. While the
    disk cannot be read the other host is not silent; after `disk_patience` seconds of that this
    raises OSError.
    """
    heard, silent, unreadable = _read(path), 0.0, 0.0
    before = time.monotonic()
    while True:
        with contextlib.suppress(OSError, ValueError):
            if done():
                return True
        now = _read(path)
        passed, before = time.monotonic() - before, time.monotonic()
        if now is None:
            unreadable += passed
            if unreadable > disk_patience:
                raise OSError(
                    f"{path} could not be read for {unreadable:.0f} s, so nobody knows whether the "
                    "other hosts work. Look at the disk or the mount of this host."
                )
        elif now != heard:
            heard, silent, unreadable = now, 0.0, 0.0
            if now.startswith("failed"):
                # Its result may have been seen to arrive a moment before or after this word.
                return done()
        else:
            silent, unreadable = silent + passed, 0.0
            if silent > patience:
                return False
        time.sleep(every)


def insist(do: Callable[[], Value], patience: float = DISK_SECONDS) -> Value:
    """What `do` returns, retried while the disk fails; after `patience` seconds raises its OSError.

    For operations whose failure would lose hours of work.
    """
    result: list[Value] = []
    _insist(lambda: result.append(do()), time.monotonic() + patience, RETRY_SECONDS)
    return result[0]


def _insist(do: Callable[[], None], deadline: float, every: float = 1.0) -> None:
    """Repeats `do` until it succeeds. Raises its OSError if it still fails at `deadline`."""
    while True:
        try:
            return do()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(every)


def _write(path: Path, text: str) -> None:
    write_text(path, f"{text}\n")


def _read(path: Path) -> str | None:
    """What `_write` wrote; "" without a file; None if it cannot be read at the moment, or only in
    part, which happens on disks without atomic replacement."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError):
        return None
    return text.removesuffix("\n") if text.endswith("\n") else None
