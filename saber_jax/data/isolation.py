"""Decoding in a process of its own, so that a bad file costs itself and nothing else.

    clip = isolation.call(decode.decode_clip, path, sampling)   one call
    isolation.thread_worker(seconds=3600).call(cut, path)       one call, with other limits
    for task, result in isolation.ahead(tasks, workers): ...    many, in order

FFmpeg and Pillow are native code that reads files from anywhere: a file may crash them, keep them
busy for ever, or make them ask for all memory. A worker is a fresh interpreter that is kept for the
next file. (A fork would copy the caller's threads and locks; multiprocessing's own workers would
import the command that was started, and jax with it.) A worker ends by itself: SIGALRM ends a call
of more than SECONDS whatever native code is doing, memory beyond MEMORY is refused to it, and it
finds its pipe closed when the process that started it is gone.
"""

import collections
import functools
import itertools
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from saber_jax.data.frame_sampling import MediaError

SECONDS = 600
"""The longest that one call may take, in wall time: a minute of 4K video on a busy machine fits."""
MEMORY = 4 << 30
"""Bytes of a worker's data: twice what the largest picture that is decoded takes."""
AHEAD = 4
"""Results of each worker that wait to be taken."""

T = TypeVar("T")
Task = TypeVar("Task", bound=Callable[[], Any])

_SERVE = "from saber_jax.data import isolation; isolation.serve({}, seconds={}, memory={})"


class Worker:
    """A process that makes calls, one at a time; another one is started when it has died."""

    def __init__(self, *, seconds: float = SECONDS, memory: int = MEMORY):
        self._seconds, self._memory = seconds, memory
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None
        self._ending = None

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """What `function(*args)` returns or raises there. All of it must be picklable.

        Raises MediaError when the call crashed the process, took too long or too much memory.
        """
        pipe = self._ready()
        pipe.send((function, args))
        try:
            returned, value = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise MediaError("unreadable", self._death()) from None
        if returned:
            return value
        raise value

    def stop(self) -> None:
        """Ends the process, also in the middle of a call of another thread."""
        if self._process is not None:
            self._process.kill()

    def _ready(self) -> Connection:
        if self._process is not None and self._process.poll() is None and self._pipe is not None:
            return self._pipe
        if self._ending is not None:
            self._ending()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            code = _SERVE.format(theirs.fileno(), self._seconds, self._memory)
            path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
            self._pipe = Connection(ours.detach())
        self._ending = weakref.finalize(self, _end, self._process, self._pipe)
        try:
            self._pipe.recv()
        except (EOFError, ConnectionResetError):
            status = self._process.wait()
            raise RuntimeError(
                f"The process that decodes media ended with status {status} as it started; what it "
                "said is above."
            ) from None
        return self._pipe

    def _death(self) -> str:
        assert self._process is not None, "a call started it"
        if self._process.wait() == -signal.SIGALRM:
            return f"decoding took longer than {self._seconds:g} s"
        return "the decoder crashed"


def _end(process: subprocess.Popen, pipe: Connection) -> None:
    process.kill()
    process.wait()
    pipe.close()


class _ThreadWorkers(threading.local):
    def __init__(self):
        self.workers: dict[tuple[float, int], Worker] = {}


_thread = _ThreadWorkers()


def thread_worker(*, seconds: float = SECONDS, memory: int = MEMORY) -> Worker:
    """The worker of this thread that has these limits. It is kept for the thread's next call."""
    limits = (seconds, memory)
    if limits not in _thread.workers:
        _thread.workers[limits] = Worker(seconds=seconds, memory=memory)
    return _thread.workers[limits]


def call(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in the worker of this thread. Raises as `Worker.call` does."""
    return thread_worker().call(function, *args)


def ahead(tasks: Iterable[Task], workers: int) -> Iterator[tuple[Task, Any]]:
    """Calls tasks in `workers` processes; yields each, in order, with what it returned, or with the
    MediaError or OSError that it raised.

    At most AHEAD results per process wait in memory. With 0 workers this process makes the calls
    itself, unprotected.
    """
    if not workers:
        yield from ((task, _outcome(task)) for task in tasks)
        return
    made = [Worker() for _ in range(workers)]
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in made:
        idle.put(worker)

    def run(task: Task) -> Any:
        worker = idle.get()
        try:
            return _outcome(functools.partial(worker.call, task))
        finally:
            idle.put(worker)

    waiting: collections.deque[tuple[Task, Future]] = collections.deque()
    tasks, pool = iter(tasks), ThreadPoolExecutor(workers)
    try:
        while True:
            for task in itertools.islice(tasks, AHEAD * workers - len(waiting)):
                waiting.append((task, pool.submit(run, task)))
            if not waiting:
                return
            task, future = waiting.popleft()
            yield task, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in made:
            worker.stop()
        pool.shutdown()


def _outcome(task: Callable[[], Any]) -> Any:
    try:
        return task()
    except (MediaError, OSError) as error:
        return error


def serve(descriptor: int, *, seconds: float, memory: int) -> None:
    """What a worker does: it answers every (function, args) that comes through a socket with
    (True, what it returned) or (False, what it raised)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends us.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    with Connection(descriptor) as pipe:
        pipe.send("ready")
        while True:
            try:
                function, args = pipe.recv()
            except (EOFError, ConnectionResetError):
                return
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                answer = (True, function(*args))
            except MemoryError:
                detail = f"decoding takes more than {memory / 2**30:g} GiB of memory"
                answer = (False, MediaError("unreadable", detail))
            except Exception as error:
                error.add_note(f"In the process that decodes:\n{traceback.format_exc()}")
                answer = (False, error)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(answer)
