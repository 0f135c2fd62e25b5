"""Several processes of one run: how they join, stop together and fail together.

On a TPU pod every host runs the same command, and jax finds the others. Elsewhere, for example for
several processes on one machine as in the tests, set three variables:

    JAX_COORDINATOR_ADDRESS=host:port  JAX_NUM_PROCESSES=2  JAX_PROCESS_ID=0

After a failure all processes exit with a non-zero status. A process that raises exits at once. If a
process disappears, the others exit after `HEARTBEAT_SECONDS` without a heartbeat, because
collectives would wait for it forever. The next start resumes.
"""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from saber_jax.runs import private
from saber_jax.runs.console import warn

HEARTBEAT_SECONDS = 60
# Time for the slowest host's disk and network when all start at once.
JOIN_SECONDS = 600
PREEMPTED = os.EX_TEMPFAIL
"""75, the exit status of a run that saved and stopped after SIGTERM and can be resumed."""

_questions = itertools.count(1)
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Preempted(Exception):
    """The run received SIGTERM; what it had to save is saved."""


def place() -> tuple[int, int]:
    """(index, count) of this process, without touching an accelerator.

    Raises ValueError when only some of the three variables are set.
    """
    given = [name for name in _EXPLICIT if os.environ.get(name)]
    if given and len(given) < len(_EXPLICIT):
        missing = [name for name in _EXPLICIT if name not in given]
        raise ValueError(
            f"{', '.join(given)} set but not {', '.join(missing)}. Set all three to join several "
            "processes, or none."
        )
    if given:
        return int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
    cluster = private.tpu_cluster()
    return (cluster.get_process_id(), cluster.get_process_count()) if cluster else (0, 1)


def initialize(*, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
    """Joins the other processes, if there are any. Call it before jax initialises devices."""
    index, count = place()
    if count == 1:
        return
    explicit = bool(os.environ.get(_EXPLICIT[0]))
    jax.distributed.initialize(
        num_processes=count if explicit else None,
        process_id=index if explicit else None,
        cluster_detection_method="deactivate" if explicit else None,
        initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=heartbeat_seconds,
    )


def barrier(name: str) -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def meet_to_save(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier between the hosts that save a step, but not for a host whose own part failed.

    Orbax lets that host wait for the others before it raises the error, while they wait for its
    part: for ten minutes nobody would know. Here it raises the error at once.
    """
    if (error := sys.exception()) is not None:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def from_first(data: bytes) -> bytes:
    """The first process's `data`, in every process."""
    if jax.process_count() == 1:
        return data
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    mine = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        mine[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """An exception inside ends this process at once. It does not wait for the others, which are in
    a collective and will notice. With a single process it does nothing."""
    try:
        yield
    except BaseException as error:
        together = isinstance(error, SystemExit) and error.code in (None, 0, PREEMPTED)
        if jax.process_count() == 1 or together:
            raise
        with contextlib.suppress(OSError):  # A full disk may hold the log too.
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            elif isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            os._exit(error.code)
        os._exit(1)


@contextlib.contextmanager
def ending_early() -> Iterator[None]:
    """SIGTERM inside ends this process at once with PREEMPTED: there is nothing to save yet, and
    files are written atomically. A `Preemption` inside replaces it.

    With several processes, jax's own listener receives the signal. They have to leave together, so
    they go on to the next place that asks `told_to_stop`.
    """
    if jax.process_count() > 1:
        yield
        return

    def handler(*_) -> None:
        """Does nothing: `watch` ends the process, because a handler would wait for a
        compilation."""

    woken, waking = socket.socketpair()
    waking.setblocking(False)

    def watch() -> None:
        while signals := woken.recv(1):
            if signals[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler:
                warn(
                    "stopped before the first step, as SIGTERM asks. The same command begins again."
                )
                os._exit(PREEMPTED)

    threading.Thread(target=watch, name="SIGTERM", daemon=True).start()
    before = signal.signal(signal.SIGTERM, handler)
    descriptor = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, before)
        waking.close()


def told_to_stop() -> bool:
    """Whether one of several processes received SIGTERM.

    The processes agree on a call that returns True in all of them, so that none is left in a
    collective. All of them have to make the same calls, once for each step or batch.
    """
    return multihost_utils.reached_preemption_sync_point(next(_questions))


class Preemption:
    """Whether any process of this run received SIGTERM while the context is open. Preempted cloud
    machines and evicted pods get this signal half a minute in advance."""

    def __init__(self):
        self._asked = False

    def __enter__(self) -> "Preemption":
        # Several processes have jax's own listener, which agrees with the others on a step.
        self._before = None
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self) -> bool:
        """Whether to stop here, with the same answer in every process; see `told_to_stop`."""
        return self._asked or told_to_stop()

    def _ask(self, *_) -> None:
        self._asked = True
