"""Decoding in separate processes, so that a file that crashes a native decoder affects no other."""

import collections
import dataclasses
import functools
import itertools
import json
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from data_prep.records import clips
from data_prep.records.clips import Job, Refusal, decode_job
from saber_jax.data import decode

Task = TypeVar("Task", bound=Callable[[], Any])


def run_jobs(
    jobs: Iterable[Job], workers: int, work: Callable[[Job], Refusal | None] = decode_job
) -> Iterator[tuple[Job, Refusal | None]]:
    """Runs the jobs in `workers` processes; yields each with its refusal, if any.

    A damaged file can crash a native decoder and with it the whole pool. The jobs that may have
    caused the crash are then run one by one, and the others in a new pool. With 0 workers the jobs
    run in this process, which a crash would end.
    """
    remaining = list(jobs)
    if not workers:
        yield from ((job, work(job)) for job in remaining)
        return
    while remaining:
        lost: list[Job] = []
        with _pool(workers) as pool:
            for job, future in [(job, _submit(pool, work, job)) for job in remaining]:
                try:
                    yield job, future.result()
                except BrokenProcessPool:
                    lost.append(job)
        # The pool hands out jobs in order and holds at most one more than it has processes.
        suspects, remaining = lost[: 2 * workers + 1], lost[2 * workers + 1 :]
        for job in suspects:
            yield job, _run_alone(job, work)


def run_ahead(tasks: Iterable[Task], workers: int) -> Iterator[tuple[Task, Any]]:
    """Calls tasks in `workers` processes; yields each, in order, with what it returned, or with the
    MediaError or OSError that it raised.

    At most four results per process wait in memory. A task that crashes the decoder has a
    MediaError; those that were in the pool with it are called again, alone. With 0 workers this
    process calls them itself, unprotected.
    """
    if not workers:
        yield from ((task, _called(task)) for task in tasks)
        return
    waiting: collections.deque[tuple[Task, Future, ProcessPoolExecutor]] = collections.deque()
    tasks, pool = iter(tasks), _pool(workers)
    try:
        while True:
            for task in itertools.islice(tasks, 4 * workers - len(waiting)):
                waiting.append((task, _submit(pool, _called, task), pool))
            if not waiting:
                return
            task, future, its_pool = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                if its_pool is pool:  # One crash breaks all tasks of its pool: replace it once.
                    pool.shutdown()
                    pool = _pool(workers)
                result = _called_alone(task)
            yield task, result
    finally:
        pool.shutdown(cancel_futures=True)


def _called(task: Callable[[], Any]) -> Any:
    try:
        return task()
    except (decode.MediaError, OSError) as error:
        return error


def _called_alone(task: Callable[[], Any]) -> Any:
    with _pool(1) as pool:
        try:
            return _submit(pool, _called, task).result()
        except BrokenProcessPool:
            return decode.MediaError("unreadable", "the decoder crashed")


def run_beam(
    jobs: Sequence[Job], options: Sequence[str], work: Callable[[Job], Refusal | None] = decode_job
) -> Iterator[tuple[Job, Refusal | None]]:
    """Like `run_jobs`, with the workers of Apache Beam, configured by its own `options`.

    They need the clips and the staging directory under the same paths as here.
    """
    import apache_beam as beam  # Takes two seconds.
    from apache_beam.options.pipeline_options import PipelineOptions

    guarded = functools.partial(_run_guarded, work)
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        _ = pipeline | beam.Create(list(jobs)) | beam.Reshuffle() | "decode" >> beam.Map(guarded)
    for job in jobs:
        yield job, Refusal(**json.loads(_note(job).read_bytes())) if _note(job).exists() else None


def _note(job: Job) -> Path:
    """The file that a Beam worker writes instead of `staged` when it refuses a clip."""
    return job.staged.with_suffix(".refused")


def _run_guarded(work: Callable[[Job], Refusal | None], job: Job) -> None:
    """Runs a job in a process next to Beam's worker, so that the worker survives a crash."""
    try:
        refusal = _submit(_beside(), work, job).result()
    except BrokenProcessPool:  # Broken by this job or by one of another thread.
        _beside.cache_clear()
        refusal = _run_alone(job, work)
    if refusal:
        _note(job).write_text(json.dumps(dataclasses.asdict(refusal)), encoding="utf-8")
    else:
        _note(job).unlink(missing_ok=True)


@functools.cache
def _beside() -> ProcessPoolExecutor:
    return _pool(1)


def _run_alone(job: Job, work: Callable[[Job], Refusal | None]) -> Refusal | None:
    with _pool(1) as pool:
        try:
            return _submit(pool, work, job).result()
        except BrokenProcessPool:
            return Refusal(file=job.file, reason="unreadable", detail="the decoder crashed")


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: the caller may have threads. The server imports the decoder once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([clips.__name__])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent)


def _die_with_parent() -> None:
    """Ends this worker with its parent; otherwise it would wait for work forever."""

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _submit(pool: ProcessPoolExecutor, work: Callable, job: Any) -> Future:
    try:
        return pool.submit(work, job)
    except BrokenProcessPool as error:
        failed: Future = Future()
        failed.set_exception(error)
        return failed
