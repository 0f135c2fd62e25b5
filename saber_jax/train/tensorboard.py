"""Writes TensorBoard files without blocking a run: events that cannot be written are dropped.

The writer thread of tensorboardX dies at the first error, after which adding an event blocks
forever. This module writes the same files with its own thread. After an error it continues with a
new file, because readers stop at a truncated record. Dropped events are counted. For a bucket, the
files are on local disk and stored every few minutes.
"""

import contextlib
import queue
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from saber_jax.runs import buckets, objects
from saber_jax.runs.console import DropCounter

WAITING = 20_000
"""Maximum number of events that wait for a slow disk."""
FLUSH_SECONDS = 30
STORE_SECONDS = 300
CLOSE_SECONDS = 20
"""How long the end of a run waits for a disk that hangs."""
EDGES = 1e-12 * 1.1 ** np.arange(774)
BINS = np.concatenate([-EDGES[::-1], [0.0], EDGES])
"""Edges of histogram bins, the same as in TensorBoard."""


class TensorBoardWriter:
    """Writes events of a run to `folder`; events of earlier starts from step `start` on are
    purged."""

    def __init__(self, folder: Path, start: int):
        self._folder, self._files = folder, 0
        self._local, self._store_due = folder, time.monotonic() + STORE_SECONDS
        if buckets.mounted(folder):
            self._local = Path(tempfile.mkdtemp(prefix="saber_tensorboard_"))
        self._dropped = DropCounter(f"TensorBoard events in {folder}")
        self._waiting: queue.Queue[Event | None] = queue.Queue(WAITING)
        self._add(Event(step=start, file_version="brain.Event:2"))
        self._add(Event(step=start, session_log=SessionLog(status=SessionLog.START)))
        self._thread = threading.Thread(target=self._write, name="tensorboard", daemon=True)
        self._thread.start()

    def scalar(self, step: int, name: str, value: float) -> None:
        self._summary(step, summary.scalar(name, value))

    def text(self, step: int, name: str, text: str) -> None:
        self._summary(step, summary.text(name, text))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self._summary(step, summary.histogram(name, values, BINS))

    def close(self) -> None:
        """Writes the remaining events; gives up after CLOSE_SECONDS."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._dropped.add(self._waiting.qsize(), "the disk does not answer")
        self._dropped.close()

    def _summary(self, step: int, content: Summary) -> None:
        self._add(Event(step=step, wall_time=time.time(), summary=content))

    def _add(self, event: Event) -> None:
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._dropped.add(1, "the disk is too slow")

    def _write(self) -> None:
        writer, unflushed, due = None, 0, time.monotonic()
        while True:
            try:
                event = self._waiting.get(timeout=FLUSH_SECONDS)
                ended = event is None
            except queue.Empty:
                event, ended = None, False
            try:
                if event is not None:
                    writer = writer or self._opened()
                    unflushed += 1
                    writer.write_event(event)
                if writer is not None and (ended or (unflushed and time.monotonic() >= due)):
                    writer.flush()
                    unflushed, due = 0, time.monotonic() + FLUSH_SECONDS
                    if self._local != self._folder:
                        self._store(now=ended)
                if ended and writer is not None:
                    writer.close()
            except OSError as error:
                self._dropped.add(unflushed or 1, str(error))
                writer, unflushed = None, 0
            if ended:
                if self._local != self._folder:
                    shutil.rmtree(self._local, ignore_errors=True)
                return

    def _store(self, *, now: bool) -> None:
        """Copies the files to their bucket, if it is time or `now`; only then it may fail."""
        if not now and time.monotonic() < self._store_due:
            return
        self._store_due = time.monotonic() + STORE_SECONDS
        with contextlib.nullcontext() if now else contextlib.suppress(OSError):
            objects.upload_folder(self._folder, self._local)

    def _opened(self) -> EventsWriter:
        self._local.mkdir(parents=True, exist_ok=True)
        self._files += 1
        return EventsWriter(str(self._local / "events"), f".{self._files:04d}")
