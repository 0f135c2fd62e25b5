"""How the hosts of a pod take turns in a chain: some work, others wait, and nobody waits for ever.

The work directory is on a disk that all hosts share; until training starts it is all they share.
They begin by meeting there, so that a disk which is not shared shows before any work is done. Each
shows signs of life in a file there. Who waits for a host's result gives up when that file says that
the host failed, or stops changing.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

BEAT_SECONDS = 10
PATIENCE_SECONDS = 300
# Hosts need not start at once: machines boot, images are pulled, environments are made.
MEETING_SECONDS = 600

# A host that works alone must not wait for the rest of its pod: these make its TPUs a slice of
# their own (https://cloud.google.com/tpu/docs/run-in-container and jax's "Running multiple JAX
# processes"), and keep it from joining the others.
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
    seconds, the numbers of those that this one misses.

    The first host calls out a word that nobody used before and the others repeat it, so what an
    earlier start left there means nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    call, deadline = folder / "meeting", time.monotonic() + patience
    if index == 0:
        word, missing = uuid.uuid4().hex, set(range(1, count))
        _write(call, word)
        while missing := {i for i in missing if _read(folder / f"meeting_{i}") != word}:
            if time.monotonic() > deadline:
                return sorted(missing)
            time.sleep(every)
        _write(call, f"{word} met")
        return []
    repeated: set[str] = set()
    while time.monotonic() < deadline:
        word, _, met = _read(call).partition(" ")
        if met and word in repeated:
            return []
        if word and not met and word not in repeated:
            _write(folder / f"meeting_{index}", word)
            repeated.add(word)
        time.sleep(every)
    return [0]


@contextlib.contextmanager
def beacon(path: Path) -> Iterator[None]:
    """Signs of life in `path` while the context is open; its last word is how it ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while True:
            _write(path, f"working {os.getpid()} {number}")
            number += 1
            if ended.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    last_word = "failed"
    try:
        yield
        last_word = "done"
    finally:
        ended.set()
        thread.join()
        _write(path, f"{last_word} {os.getpid()} {time.time()}")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def wait(
    done: Callable[[], bool],
    path: Path,
    *,
    patience: float = PATIENCE_SECONDS,
    every: float = 2.0,
) -> bool:
    """True when `done`; False when the beacon at `path` fails, or is silent for `patience` seconds.

    Only changes of the file count, so neither clocks that differ nor what an earlier run left there
    can mislead.
    """
    heard, since = _read(path), time.monotonic()
    while not done():
        now = _read(path)
        if now != heard:
            heard, since = now, time.monotonic()
            # Its result may have been seen to arrive a moment before or after this word.
            if now.startswith("failed"):
                return done()
        if time.monotonic() - since > patience:
            return False
        time.sleep(every)
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
