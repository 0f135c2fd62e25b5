"""Decodes the clips of a build beside it, on this machine or by the workers of Apache Beam."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.records.clips import DecodeJob, Refusal, decode_job
from saber_jax.data import isolation
from saber_jax.data.frame_sampling import MediaError


def run_jobs(
    jobs: Iterable[DecodeJob],
    workers: int,
    work: Callable[[DecodeJob], Refusal | None] = decode_job,
) -> Iterator[tuple[DecodeJob, Refusal | None]]:
    """Does the jobs in `workers` processes; yields each, in order, with its refusal, if any.

    With 0 workers nothing protects this process, which does all of them itself. Raises OSError when
    a decoded clip could not be written.
    """
    tasks = (functools.partial(work, job) for job in jobs)
    for task, result in isolation.ahead(tasks, workers):
        [job] = task.args
        if isinstance(result, OSError):
            raise result
        yield job, _refusal(job, result) if isinstance(result, MediaError) else result


def _refusal(job: DecodeJob, error: MediaError) -> Refusal:
    return Refusal(file=job.file, reason=error.reason, detail=error.detail)


def run_beam(
    jobs: Sequence[DecodeJob],
    options: Sequence[str],
    work: Callable[[DecodeJob], Refusal | None] = decode_job,
) -> Iterator[tuple[DecodeJob, Refusal | None]]:
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


def _note(job: DecodeJob) -> Path:
    """What a Beam worker leaves in place of `staged` when it refuses a clip."""
    return job.staged.with_suffix(".refused")


def _run_guarded(work: Callable[[DecodeJob], Refusal | None], job: DecodeJob) -> None:
    """Does a job in a process beside Beam's worker, which survives if the decoder crashes."""
    try:
        refusal = isolation.call(work, job)
    except MediaError as error:
        refusal = _refusal(job, error)
    if refusal:
        _note(job).write_text(json.dumps(dataclasses.asdict(refusal)), encoding="utf-8")
    else:
        _note(job).unlink(missing_ok=True)
