"""Loader processes that outlive a SIGTERM.

A machine that is taken back, and a session that is ended, send SIGTERM to every process. The run
itself saves and ends then (runs/distributed.py), for which it still needs batches; it ends its
loader processes without signals they could ignore.
"""

import contextlib
import signal
from collections.abc import Iterator

import grain


def in_processes(dataset: grain.IterDataset, count: int) -> grain.IterDataset:
    """`dataset`, whose elements `count` processes make that ignore SIGTERM."""
    options = grain.MultiprocessingOptions(num_workers=count)
    return dataset.mp_prefetch(options, ignore_sigterm)


def ignore_sigterm(index: int, count: int) -> None:
    """Grain calls this in each process, as `index` of `count`."""
    del index, count
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def sigterm_held() -> Iterator[None]:
    """Processes started inside are born without hearing SIGTERM, as it takes them seconds to reach
    `ignore_sigterm`. One that comes to this process meanwhile is heard at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
