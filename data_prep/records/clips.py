"""Finding clips with their annotations and labels, and decoding them one by one."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing.connection
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from saber_jax.data import decode, records
from saber_jax.runs.files import replacing

EXTENSIONS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".mpeg", ".m4v", ".flv")

REASONS = {
    **decode.REASONS,
    "no_annotation": "the clip has no annotation file of the same name",
    "bad_annotation": "the annotation does not follow the SABER layout",
    "duplicate_id": "another file has the same name",
}
"""Why a clip can be refused; the key goes into refused.jsonl."""

Task = TypeVar("Task", bound=Callable[[], Any])

_CJK = re.compile(r"[\u3400-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A clip that did not become a record."""

    file: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One clip to decode, everything but its media already checked. `staged` is its result."""

    clip_id: str
    split: str
    language: str
    path: Path
    staged: Path
    annotation: Mapping[str, str]
    labels: Mapping[str, str]
    sampling: decode.Sampling


def find_files(directory: Path, extensions: Iterable[str], what: str) -> list[Path]:
    """Files below a directory, sorted. FileNotFoundError if there is no directory or no file."""
    if not directory.is_dir():
        raise FileNotFoundError(f"The {what} directory {directory} does not exist.")
    wanted = tuple(extensions)
    files = [path for path in directory.rglob("*") if path.suffix.lower() in wanted]
    files = sorted(path for path in files if path.is_file())
    if not files:
        raise FileNotFoundError(f"No {what} ({', '.join(wanted)}) in {directory}.")
    return files


def read_labels(path: Path) -> dict[str, dict[str, str]]:
    """labels.jsonl as {clip_id: line}. ValueError names the line that is wrong."""
    allowed = {"clip_id", "split", "language", *records.LABELS}
    labels: dict[str, dict[str, str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict) or "clip_id" not in row:
            raise ValueError(f'{path}, line {number} must be an object with a "clip_id".')
        if unknown := sorted(set(row) - allowed):
            raise ValueError(f"{path}, line {number} has unknown keys {', '.join(unknown)}.")
        language = row.get("language", "en")
        if language not in records.LANGUAGES:
            raise ValueError(f"{path}, line {number} has the unknown language {language!r}.")
        labels[str(row["clip_id"])] = {key: str(value) for key, value in row.items()}
    return labels


def plan(
    clips: Iterable[Path],
    annotations: Iterable[Path],
    labels: Mapping[str, Mapping[str, str]],
    *,
    split: str,
    staging: Path,
    sampling: decode.Sampling,
) -> tuple[list[Job], list[Refusal]]:
    """Pairs clips with annotations and labels; what cannot be paired is refused at no cost."""
    by_stem: dict[str, Path] = {}
    for path in annotations:
        by_stem.setdefault(path.stem, path)
    jobs: list[Job] = []
    refusals: list[Refusal] = []
    seen: dict[str, Path] = {}
    for path in clips:
        first = seen.setdefault(path.stem, path)
        if first != path:
            refusals.append(Refusal(file=path.name, reason="duplicate_id", detail=str(first)))
            continue
        try:
            annotation = _read_annotation(path, by_stem.get(path.stem))
        except _RefusedError as error:
            refusals.append(error.refusal)
            continue
        known = labels.get(path.stem, {})
        job = Job(
            clip_id=path.stem,
            split=known.get("split", split),
            language=known.get("language") or detect_language(annotation),
            path=path,
            staged=staging / f"{_staging_key(path, sampling)}.pickle",
            annotation=annotation,
            labels={key: known[key] for key in records.LABELS if key in known},
            sampling=sampling,
        )
        jobs.append(job)
    return jobs, refusals


class _RefusedError(Exception):
    def __init__(self, refusal: Refusal):
        super().__init__(refusal)
        self.refusal = refusal


def _read_annotation(clip: Path, path: Path | None) -> dict[str, str]:
    if path is None:
        detail = f"expected {clip.stem}.json in the annotations directory"
        raise _RefusedError(Refusal(file=clip.name, reason="no_annotation", detail=detail))
    try:
        return records.parse_annotation(json.loads(path.read_text(encoding="utf-8-sig")))
    except (ValueError, RecursionError) as error:  # Not text, not JSON, or not the layout.
        detail = f"{path.name}: {error}"
        raise _RefusedError(
            Refusal(file=clip.name, reason="bad_annotation", detail=detail)
        ) from error


def detect_language(annotation: Mapping[str, str]) -> str:
    """ "zh" if Chinese characters outnumber Latin words in the descriptions, else "en".

    The transcript is left out: a Chinese annotator may quote English speech.
    """
    text = " ".join(text for field, text in annotation.items() if field != "speech_content")
    return "zh" if len(_CJK.findall(text)) > len(_LATIN.findall(text)) else "en"


def _staging_key(path: Path, sampling: decode.Sampling) -> str:
    """Changes with the file and with the settings, so stale work is never picked up."""
    stat = path.stat()
    facts = (path.name, stat.st_size, stat.st_mtime_ns, dataclasses.astuple(sampling))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def decode_job(job: Job) -> Refusal | None:
    """Decodes one clip into `job.staged` (media features only), or says why not."""
    try:
        clip = decode.decode_clip(job.path, job.sampling)
    except decode.MediaError as error:
        return Refusal(file=job.path.name, reason=error.reason, detail=error.detail)
    except OSError as error:
        return Refusal(file=job.path.name, reason="unreadable", detail=str(error))
    digest = hashlib.sha256(job.path.read_bytes()).hexdigest()
    with replacing(job.staged) as partial, partial.open("wb") as file:
        pickle.dump((clip, digest), file, protocol=pickle.HIGHEST_PROTOCOL)
    return None


def load_staged(job: Job) -> records.Record:
    """The record of a decoded job."""
    with job.staged.open("rb") as file:
        clip, digest = pickle.load(file)
    return records.Record(
        clip_id=job.clip_id,
        language=job.language,
        frames=clip.frames,
        seconds_per_grid=clip.seconds_per_grid,
        audio=clip.audio,
        annotation=job.annotation,
        labels=job.labels,
        provenance={
            "file": job.path.name,
            "sha256": digest,
            "sampling": dataclasses.asdict(job.sampling),
            "source": clip.info,
        },
        audio_in_video=job.sampling.audio_in_video,
    )


def run_jobs(
    jobs: Iterable[Job], workers: int, work: Callable[[Job], Refusal | None] = decode_job
) -> Iterator[tuple[Job, Refusal | None]]:
    """Does the jobs in `workers` processes; yields each with its refusal, if any.

    A damaged file can crash a native decoder and with it the whole pool. The jobs that may have
    done so are then tried alone, the rest goes on in a new pool.
    """
    remaining = list(jobs)
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
    MediaError; those that were in the pool with it are called again, alone.
    """
    if workers == 1:
        yield from ((task, _called(task)) for task in tasks)
        return
    waiting: collections.deque[tuple[Task, Future]] = collections.deque()
    tasks, pool = iter(tasks), _pool(workers)
    try:
        while True:
            for task in itertools.islice(tasks, 4 * workers - len(waiting)):
                waiting.append((task, _submit(pool, _called, task)))
            if not waiting:
                return
            task, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                pool.shutdown()
                pool, result = _pool(workers), _called_alone(task)
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
    """As `run_jobs`, by the workers of Apache Beam under its own `options`.

    They must reach the clips and the staging directory under the paths that they have here.
    """
    import apache_beam as beam  # Takes two seconds.
    from apache_beam.options.pipeline_options import PipelineOptions

    guarded = functools.partial(_run_guarded, work)
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        _ = pipeline | beam.Create(list(jobs)) | beam.Reshuffle() | "decode" >> beam.Map(guarded)
    for job in jobs:
        yield job, Refusal(**json.loads(_note(job).read_bytes())) if _note(job).exists() else None


def _note(job: Job) -> Path:
    """What a Beam worker leaves in place of `staged` when it refuses a clip."""
    return job.staged.with_suffix(".refused")


def _run_guarded(work: Callable[[Job], Refusal | None], job: Job) -> None:
    """Does a job in a process beside Beam's worker, which survives if the decoder crashes."""
    try:
        refusal = _submit(_beside(), work, job).result()
    except BrokenProcessPool:  # By this job or by one of another thread.
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
            return Refusal(file=job.path.name, reason="unreadable", detail="the decoder crashed")


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: the caller may have threads. The server imports this module once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent)


def _die_with_parent() -> None:
    """Without this, the workers of a killed build would wait for work for ever."""

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
