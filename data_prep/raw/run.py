"""Runs the data pipeline: from raw videos to checked clips, a test set and instructions.

    python -m data_prep.run --config my.toml                     everything that is not done yet
    python -m data_prep.run --config my.toml --stage measure     one stage alone
    python -m data_prep.run --config my.toml --again annotate    retry failed requests

Every stage writes a folder below `out` (data_prep.raw.shards describes it). You can interrupt the
command at any time; repeated, it continues from the finished shards and the cached answers. Exit
code 0 if everything is done, 1 if not, 3 if clips were dropped because of a failing endpoint
(--again retries them).
"""

import concurrent.futures
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.raw import (
    annotate,
    answers,
    captions,
    consistency,
    export,
    filters,
    ingest,
    instructions,
    measure,
    segment,
    shards,
    split,
    storage,
    transcripts,
)
from data_prep.raw import settings as settings_lib
from data_prep.raw.settings import STAGES, Settings
from data_prep.raw.shards import ShardedStage, Workers
from saber_jax.endpoint import EndpointError
from saber_jax.flags import Parser

TRANSIENT = ("rate_limited", "timeout", "disconnected", "server_error", "malformed")
"""Reasons that a retry may resolve."""

_REASONS = {
    "ingest": ingest.REASONS,
    "segment": segment.REASONS,
    "measure": measure.REASONS,
    "filter": filters.REASONS,
    "annotate": annotate.REASONS,
    "transcripts": transcripts.REASONS,
    "captions": captions.REASONS,
    "consistency": consistency.REASONS,
    "split": split.REASONS,
    "instructions": instructions.REASONS,
    "export": export.REASONS,
}


def stage_of(settings: Settings, name: str) -> ShardedStage:
    """A stage's folder and the inputs of its result."""
    part: Any = getattr(settings, name, None)
    decides: dict[str, Any] = {"sources": [vars(source) for source in settings.sources]}
    if name != "ingest":
        decides = part.of_result() if hasattr(part, "of_result") else dict(vars(part))
    return ShardedStage(
        name=name,
        out=settings.out,
        shards=settings.shards,
        settings=decides,
        reasons=_REASONS[name],
        splits_rows=name == "segment",
    )


def run_stage(settings: Settings, name: str) -> dict[str, Any]:
    """Runs one stage; returns its summary. ValueError if the stage before it is not finished."""
    order = settings.stages
    stage = stage_of(settings, name)
    if name == "ingest":
        return ingest.ingest(stage, settings.sources)
    source = stage_of(settings, order[order.index(name) - 1])
    if not storage.exists(source.file("summary.json")):
        raise ValueError(f"{name} reads {source.folder}, which is not finished; run it first.")
    return _RUN[name](settings, stage, source)


def _segment(settings: Settings, stage: ShardedStage, source: ShardedStage) -> dict[str, Any]:
    # Inside the stage's folder, so that they are deleted with it: they depend on its settings.
    clips = stage.file("clips")
    work = functools.partial(segment.work, settings=settings.segment, clips=clips)
    return shards.run(stage, source, work, _workers(settings))


def _measure(settings: Settings, stage: ShardedStage, source: ShardedStage) -> dict[str, Any]:
    work = functools.partial(measure.work, settings=settings.measure)
    return shards.run(stage, source, work, _workers(settings))


def _filter(settings: Settings, stage: ShardedStage, source: ShardedStage) -> dict[str, Any]:
    return filters.run(stage, source, settings.filter)


def _annotate(settings: Settings, stage: ShardedStage, source: ShardedStage) -> dict[str, Any]:
    work = functools.partial(annotate.work, settings=settings.annotate)
    return answers.run_with(stage, source, work, {"annotate": settings.annotate.endpoint})


def _transcripts(settings: Settings, stage: ShardedStage, source: ShardedStage) -> dict[str, Any]:
    part = settings.transcripts
    if part.recogniser == "endpoint":
        work = functools.partial(transcripts.asked, settings=part)
        done = answers.run_with(stage, source, work, {"transcripts": part.endpoint})
    else:
        work = functools.partial(transcripts.offline, settings=part)
        done = shards.run(stage, source, work, _workers(settings))
    transcripts.report(stage)
    return done


def _captions(settings: Settings, stage: ShardedStage, source: ShardedStage) -> dict[str, Any]:
    part = settings.captions
    work = functools.partial(captions.work, settings=part)
    endpoints = {"caption": part.caption, "judge": part.judge}
    done = answers.run_with(stage, source, work, endpoints)
    captions.report(stage)
    return done


def _consistency(settings: Settings, stage: ShardedStage, source: ShardedStage) -> dict[str, Any]:
    part = settings.consistency
    work = functools.partial(consistency.work, settings=part)
    if part.judge.url:
        return answers.run_with(stage, source, work, {"judge": part.judge})
    for shard in stage.missing():
        for row in source.kept(shard):
            if consistency.needs_judge(row, part):
                raise ValueError(
                    f"{row['clip_id']} has no labels for face and voice, so a judge must say what "
                    "they suggest: set consistency.judge.url and .model."
                )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return shards.run(stage, source, lambda rows: work(rows, {}, pool))


def _split(settings: Settings, stage: ShardedStage, source: ShardedStage) -> dict[str, Any]:
    plan = functools.partial(split.plan, settings=settings.split)
    done = shards.run_whole(stage, source, split.KEYS, plan)
    counts = split.summary(stage.rows())
    for what, count in counts.items():
        print(f"  {count:8d}  {what}")
    if sentence := split.shortfall(counts, settings.split):
        print(sentence)
    return done


def _instructions(settings: Settings, stage: ShardedStage, source: ShardedStage) -> dict[str, Any]:
    plan = functools.partial(instructions.plan, settings=settings.instructions)
    done = shards.run_whole(stage, source, instructions.KEYS, plan)
    instructions.write(stage)
    return done


def _export(settings: Settings, stage: ShardedStage, source: ShardedStage) -> dict[str, Any]:
    if not storage.is_local(settings.out):
        raise ValueError("export writes to a local disk; copy the stage before it there first.")
    folder = storage.join(settings.out, "saber")
    done = export.run(stage, source, folder)
    records = storage.join(settings.out, "records")
    print(f"Next: {shlex.join(export.build_command(folder, records, settings.export.build))}")
    return done


_RUN: dict[str, Callable[[Settings, ShardedStage, ShardedStage], dict[str, Any]]] = {
    "segment": _segment,
    "measure": _measure,
    "filter": _filter,
    "annotate": _annotate,
    "transcripts": _transcripts,
    "captions": _captions,
    "consistency": _consistency,
    "split": _split,
    "instructions": _instructions,
    "export": _export,
}


def _workers(settings: Settings) -> Workers:
    return Workers(processes=settings.processes, beam=settings.beam)


def forget_failures(settings: Settings, name: str) -> int:
    """Deletes shards of a stage that dropped clips because an endpoint failed, and later stages.

    Returns how many clips will be retried; cached answers are not requested again.
    """
    stage, later = stage_of(settings, name), settings.stages[settings.stages.index(name) + 1 :]
    lost = 0
    for shard in range(stage.shards):
        if shard in stage.missing():
            continue
        failed = [item for item in stage.dropped(shard) if item["reason"] in TRANSIENT]
        if failed:
            lost += len(failed)
            storage.delete(stage.path("kept", shard))
    if lost:
        for folder in (stage_of(settings, other).folder for other in later):
            storage.delete(folder)
        storage.delete(stage.file("summary.json"))
    return lost


def check_endpoints(settings: Settings, names: Sequence[str]) -> None:
    """ValueError if a stage has no endpoint. Checked before hours of decoding."""
    if "annotate" in names:
        settings.annotate.endpoint.require("annotate.endpoint")
    if "transcripts" in names and settings.transcripts.recogniser == "endpoint":
        settings.transcripts.endpoint.require("transcripts.endpoint")
    if "captions" in names:
        settings.captions.caption.require("captions.caption")
        settings.captions.judge.require("captions.judge")


def report(summary: dict[str, Any]) -> None:
    """Prints what a stage kept and dropped, and why."""
    print(f"{summary['stage']}: kept {summary['kept']}, dropped {summary['dropped']}", flush=True)
    for reason, count in summary["reasons"].items():
        print(f"  {count:8d}  {reason}: {_REASONS[summary['stage']][reason]}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; see the module docstring."""
    parser = Parser(
        prog="python -m data_prep.run",
        description=__doc__,
    )
    parser.add_argument("--config", type=Path, required=True, help="a TOML file")
    parser.add_argument("--stage", choices=STAGES, help="run only this stage")
    parser.add_argument("--again", choices=STAGES, help="retry what failed, then continue")
    flags = parser.parse_args(argv)
    try:
        settings = settings_lib.load(flags.config)
        for name in (flags.stage, flags.again):
            if name and name not in settings.stages:
                raise ValueError(f"{name} is in `skip` of {flags.config}.")
        if flags.again:
            lost = forget_failures(settings, flags.again)
            print(f"{flags.again}: {lost} clips to be retried")
        summaries = []
        names = [flags.stage] if flags.stage else settings.stages
        check_endpoints(settings, names)
        for name in names:
            summaries.append(run_stage(settings, name))
            report(summaries[-1])
    except (ValueError, OSError, RuntimeError, EndpointError) as error:
        print(f"data_prep.run: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command continues from here.", file=sys.stderr)
        return 130
    return _verdict(summaries)


def _verdict(summaries: Sequence[dict[str, Any]]) -> int:
    troubled = {
        summary["stage"]: sum(summary["reasons"].get(reason, 0) for reason in TRANSIENT)
        for summary in summaries
    }
    for name, count in troubled.items():
        if count:
            print(
                f"{name} dropped {count} clips because the endpoint failed; to retry them: "
                f"--again {name}",
                file=sys.stderr,
            )
    if any(troubled.values()):
        return 3
    if emptied := [summary["stage"] for summary in summaries if not summary["kept"]]:
        print(f"error: no clip is left after {emptied[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
