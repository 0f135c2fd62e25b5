"""Stages of the data pipeline: rows in shards, and work that is done once per shard.

A stage writes a folder. Shard k of a stage is made from shard k of the one before it, and is
finished when both of its files exist:

    OUT/measure/manifest.json                  settings of the stage, fingerprint of its inputs
                dropped-00003-of-00016.jsonl   {"clip_id", "reason", "detail", "row"} a line
                kept-00003-of-00016.jsonl      a row a line; written last
                summary.json                   counts by reason, once all shards are finished

A row is one clip: clip_id, file, corpus, video (the source it was cut from), speaker, language,
split, labels, and what the stages add to it (measures, annotation, checks, ...). `provenance` lists
{"fields", "tool", "model", "prompt", "parameters"}, one entry per group of fields made together.

An interrupted stage continues from its finished shards. Every row of a shard is kept or dropped
exactly once; anything else is an error in the stage's code and stops it.
"""

import collections
import concurrent.futures
import dataclasses
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from data_prep.raw import storage
from saber_jax.runs import manifest

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped:
    """A row that a stage drops. `reason` is a key of the stage's REASONS."""

    row: Row
    reason: str
    detail: str = ""


Outcome = Row | Dropped
ShardWork = Callable[[list[Row]], Iterable[Outcome]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """What runs the shards: this process, `processes` of Beam's direct runner, or a Beam cluster.

    `beam` are Beam's own options, such as ("--runner=DataflowRunner", "--project=..."); with any,
    `processes` is ignored, and the folders must be accessible from the cluster.
    """

    processes: int = 1
    beam: tuple[str, ...] = ()

    def options(self) -> list[str]:
        if self.beam:
            return list(self.beam)
        return [
            "--runner=DirectRunner",
            "--direct_running_mode=multi_processing",
            f"--direct_num_workers={self.processes}",
            # Otherwise every worker logs its start in detail.
            "--default_sdk_harness_log_level=ERROR",
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedStage:
    """One folder of shards. `reasons` maps each reason for dropping to a description.

    With `splits_rows` a row may become several; otherwise every row comes out exactly once.
    """

    name: str
    out: str
    shards: int
    settings: dict[str, Any]
    reasons: dict[str, str]
    splits_rows: bool = False

    @property
    def folder(self) -> str:
        return storage.join(self.out, self.name)

    def path(self, what: str, shard: int) -> str:
        return storage.join(self.folder, f"{what}-{shard:05d}-of-{self.shards:05d}.jsonl")

    def file(self, name: str) -> str:
        return storage.join(self.folder, name)

    def kept(self, shard: int) -> list[Row]:
        return storage.read_lines(self.path("kept", shard))

    def dropped(self, shard: int) -> list[dict[str, Any]]:
        return storage.read_lines(self.path("dropped", shard))

    def rows(self) -> Iterator[Row]:
        """The kept rows of all shards, one shard in memory at a time."""
        for shard in range(self.shards):
            yield from self.kept(shard)

    def checked(self, check: str) -> Iterator[tuple[Row, dict[str, Any]]]:
        """(row, row["checks"][check]) of kept and dropped rows that have this check."""
        for shard in range(self.shards):
            for row in (*self.kept(shard), *(item["row"] for item in self.dropped(shard))):
                if found := row.get("checks", {}).get(check):
                    yield row, found

    def fingerprint(self) -> str:
        """Changes with the settings of this stage and of every one before it."""
        return manifest.digest(storage.read_json(self.file("manifest.json")))

    def claim(self, after: str, inputs: Mapping[str, Any] | None = None) -> None:
        """Writes the manifest; ValueError if the folder was made from other inputs or settings.

        `after` is the fingerprint of the stage before; `inputs` is what else the stage reads.
        """
        ours = {"settings": self.settings, "shards": self.shards, "after": after}
        if inputs:
            ours["inputs"] = inputs
        ours = json.loads(json.dumps(ours))  # So that tuples and lists compare equal.
        path = self.file("manifest.json")
        if not storage.exists(path):
            storage.write_json(path, ours)
            return
        manifest.check(
            storage.read_json(path),
            ours,
            what=f"{self.folder} was made from other inputs or settings",
            remedy="Delete it and the later stages to make it again, or choose another `out`.",
        )

    def missing(self) -> list[int]:
        there = storage.names(self.folder)
        return [
            shard
            for shard in range(self.shards)
            if self.path("kept", shard).rsplit("/", 1)[1] not in there
        ]

    def write(self, shard: int, rows: Sequence[Row], outcomes: Iterable[Outcome]) -> None:
        """Writes one shard after checking that no row was lost or duplicated."""
        kept: list[Row] = []
        dropped: list[dict[str, Any]] = []
        for outcome in outcomes:
            if not isinstance(outcome, Dropped):
                kept.append(outcome)
                continue
            if outcome.reason not in self.reasons:
                raise KeyError(f"{self.name} has no reason {outcome.reason!r}.")
            dropped.append(
                {
                    "clip_id": outcome.row["clip_id"],
                    "reason": outcome.reason,
                    "detail": outcome.detail,
                    "row": outcome.row,
                }
            )
        if not self.splits_rows:
            came = collections.Counter(row["clip_id"] for row in rows)
            went = collections.Counter(item["clip_id"] for item in [*kept, *dropped])
            if came != went:
                lost, doubled = sorted(came - went), sorted(went - came)
                raise RuntimeError(
                    f"Stage {self.name}, shard {shard}: lost {lost[:5]}, doubled {doubled[:5]}."
                )
        storage.write_lines(self.path("dropped", shard), dropped)
        storage.write_lines(self.path("kept", shard), kept)

    def summarise(self) -> dict[str, Any]:
        """Counts over all shards; also written to summary.json."""
        kept, reasons = 0, collections.Counter()
        for shard in range(self.shards):
            kept += len(self.kept(shard))
            reasons.update(item["reason"] for item in self.dropped(shard))
        summary = {
            "stage": self.name,
            "kept": kept,
            "dropped": sum(reasons.values()),
            "reasons": {name: reasons[name] for name in self.reasons if reasons[name]},
        }
        storage.write_json(self.file("summary.json"), summary)
        return summary


def run(
    stage: ShardedStage,
    source: ShardedStage,
    work: ShardWork,
    workers: Workers = Workers(),
    *,
    at_once: int = 1,
    stopped: threading.Event | None = None,
) -> dict[str, Any]:
    """Makes the unfinished shards of `stage` from those of `source`; returns the summary.

    Threads of this process work on `at_once` shards, for work that mostly waits. If the run ends
    early, `stopped` is set, which has to make `work` end with CancelledError.
    """
    stage.claim(source.fingerprint())
    todo = stage.missing()
    job = ShardJob(stage, source, work)
    if todo:
        print(f"{stage.name}: {len(todo)} of {stage.shards} shards to do", flush=True)
    if workers.processes > 1 or workers.beam:
        _run_beam(job, todo, workers)
    else:
        _run_here(job, todo, at_once, stopped or threading.Event())
    return stage.summarise()


def run_whole(
    stage: ShardedStage,
    source: ShardedStage,
    keys: Sequence[str],
    plan: Callable[[list[Row]], Callable[[Row], Outcome]],
) -> dict[str, Any]:
    """Like `run`, for stages that need all rows before they can decide about one.

    `plan` gets every row, reduced to `keys` so that all fit into memory, and returns a function
    that decides about one whole row.
    """
    stage.claim(source.fingerprint())
    if todo := stage.missing():
        decide = plan([{key: row[key] for key in keys} for row in source.rows()])
        for shard in tqdm(todo, desc=stage.name, unit="shard"):
            rows = source.kept(shard)
            stage.write(shard, rows, map(decide, rows))
    return stage.summarise()


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """Makes one shard. Picklable, so that it can be sent to Beam's workers."""

    stage: ShardedStage
    source: ShardedStage
    work: ShardWork

    def __call__(self, shard: int) -> int:
        rows = self.source.kept(shard)
        self.stage.write(shard, rows, self.work(rows))
        return shard


def _run_here(job: ShardJob, todo: Sequence[int], at_once: int, stopped: threading.Event) -> None:
    cancelled = concurrent.futures.CancelledError
    futures: list[concurrent.futures.Future[int]] = []
    with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
        try:
            for shard in todo:
                futures.append(threads.submit(job, shard))
            finished = concurrent.futures.as_completed(futures)
            for future in tqdm(finished, total=len(todo), desc=job.stage.name, unit="shard"):
                future.result()
        except BaseException as error:
            stopped.set()
            for future in futures:
                future.cancel()
            if isinstance(error, cancelled):  # Another shard has stopped this one and says why.
                for future in futures:
                    if not future.cancelled() and not isinstance(future.exception(), cancelled):
                        future.result()
            raise


def _run_beam(job: ShardJob, todo: Sequence[int], workers: Workers) -> None:
    if not todo:
        return
    finished = threading.Event()
    watch = threading.Thread(target=_watch, args=(job.stage, len(todo), finished), daemon=True)
    watch.start()
    try:
        pipeline(job, todo, workers).run().wait_until_finish()
    finally:
        finished.set()
        watch.join()
    if left := job.stage.missing():
        raise RuntimeError(
            f"{job.stage.name}: Beam ended without {len(left)} shards; run the command again."
        )


def pipeline(job: ShardJob, todo: Sequence[int], workers: Workers) -> Any:
    """A beam.Pipeline that makes the shards `todo`, not yet run."""
    # Takes two seconds to import, and the other stages do not need it.
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    made = beam.Pipeline(options=PipelineOptions(workers.options()))
    shards = made | "shards" >> beam.Create(list(todo))
    _ = shards | beam.Reshuffle() | job.stage.name >> beam.Map(job)
    return made


def _watch(stage: ShardedStage, todo: int, finished: threading.Event) -> None:
    """A progress bar that counts the files that the workers write."""
    with tqdm(total=todo, desc=stage.name, unit="shard", file=sys.stderr) as bar:
        while not finished.wait(1.0):
            bar.update(todo - len(stage.missing()) - bar.n)
        bar.update(todo - len(stage.missing()) - bar.n)
