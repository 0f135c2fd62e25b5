"""Loader processes that ignore SIGTERM.

When a machine is preempted or a session ends, every process gets SIGTERM. The run then saves and
exits (runs/distributed.py), for which it still needs batches. It ends its loader processes itself.
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
    """Blocks SIGTERM for processes that are started inside, because they need seconds to reach
    `ignore_sigterm`. A SIGTERM to this process in the meantime is delivered at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
