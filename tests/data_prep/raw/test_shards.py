"""Stages, shards, and what is left when work is interrupted."""

import concurrent.futures
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fsspec")

from data_prep.raw import measure, shards, storage
from data_prep.raw.shards import Dropped, Outcome, Row, ShardedStage, Workers
from tests import media_files

SHARDS = 4


def make_stage(name: str, out, **settings) -> ShardedStage:
    reasons = {"odd": "the number is odd"}
    return ShardedStage(name=name, out=str(out), shards=SHARDS, settings=settings, reasons=reasons)


def make_source(out, count: int = 20) -> ShardedStage:
    source = make_stage("source", out)
    source.claim("")
    for shard in range(SHARDS):
        rows = [{"clip_id": f"c{i}", "n": i} for i in range(shard, count, SHARDS)]
        source.write(shard, rows, rows)
    source.summarise()
    return source


def drop_odd(rows: list[Row]) -> Iterator[Outcome]:
    for row in rows:
        if row["n"] % 2:
            yield Dropped(row=row, reason="odd", detail=str(row["n"]))
        else:
            yield {**row, "seen": True}


@pytest.mark.parametrize("where", ["disk", "memory://shards"])
def test_every_row_is_kept_or_dropped_and_counted(tmp_path, where):
    out = tmp_path if where == "disk" else f"{where}/{tmp_path.name}"
    source = make_source(out)
    stage = make_stage("even", out)
    summary = shards.run(stage, source, drop_odd)
    assert summary == {"stage": "even", "kept": 10, "dropped": 10, "reasons": {"odd": 10}}
    assert storage.read_json(stage.file("summary.json")) == summary
    assert sorted(row["n"] for row in stage.rows()) == list(range(0, 20, 2))
    assert stage.dropped(1)[0]["row"]["n"] == int(stage.dropped(1)[0]["detail"])


def test_a_second_run_works_on_nothing(tmp_path):
    source = make_source(tmp_path)
    stage = make_stage("even", tmp_path)
    first = shards.run(stage, source, drop_odd)
    assert shards.run(stage, source, lambda rows: pytest.fail("worked again")) == first


def test_an_interrupted_run_goes_on_from_its_finished_shards(tmp_path):
    source = make_source(tmp_path)
    stage = make_stage("even", tmp_path)
    done = []

    def fails_late(rows: list[Row]) -> Iterator[Outcome]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(rows)
        yield from drop_odd(rows)

    with pytest.raises(KeyboardInterrupt):
        shards.run(stage, source, fails_late)
    assert len(stage.missing()) == 2
    rest = []
    shards.run(stage, source, lambda rows: rest.append(rows) or drop_odd(rows))
    assert len(rest) == 2
    assert len(list(stage.rows())) == 10


def test_a_shard_that_another_one_stopped_does_not_hide_why(tmp_path):
    stopped = threading.Event()

    def work(rows: list[Row]) -> Iterator[Outcome]:
        if rows[0]["n"] == 0:  # As if a request had been cancelled.
            raise concurrent.futures.CancelledError
        assert stopped.wait(60)
        raise OSError("the disk is full")
        yield

    source, stage = make_source(tmp_path), make_stage("even", tmp_path)
    with pytest.raises(OSError, match="the disk is full"):
        shards.run(stage, source, work, at_once=2, stopped=stopped)


@pytest.mark.parametrize(
    ("work", "complaint"),
    [
        (lambda rows: rows[1:], "lost"),
        (lambda rows: [*rows, rows[0]], "doubled"),
        (lambda rows: [Dropped(row=row, reason="tired") for row in rows], "no reason 'tired'"),
    ],
)
def test_work_that_loses_or_doubles_rows_is_stopped(tmp_path, work, complaint):
    source = make_source(tmp_path)
    stage = make_stage("even", tmp_path)
    with pytest.raises((RuntimeError, KeyError), match=complaint):
        shards.run(stage, source, work)
    assert len(stage.missing()) == SHARDS


def test_other_settings_here_or_before_are_refused(tmp_path):
    source = make_source(tmp_path)
    shards.run(make_stage("even", tmp_path, limit=1), source, drop_odd)
    with pytest.raises(ValueError, match=r"settings\.limit: 1 there, 2 here"):
        shards.run(make_stage("even", tmp_path, limit=2), source, drop_odd)
    other = make_stage("source", tmp_path, seed=1)
    storage.write_json(other.file("manifest.json"), {"settings": {"seed": 1}})
    with pytest.raises(ValueError, match="after"):
        shards.run(make_stage("even", tmp_path, limit=1), other, drop_odd)


def test_work_on_all_rows_at_once_leaves_rows_in_their_shards(tmp_path):
    source = make_source(tmp_path)
    stage = make_stage("even", tmp_path)

    def plan(rows: list[Row]):
        assert all(set(row) == {"n"} for row in rows)
        most = max(row["n"] for row in rows)
        return lambda row: row if row["n"] > most - 10 else Dropped(row=row, reason="odd")

    shards.run_whole(stage, source, ("n",), plan)
    assert sorted(row["n"] for row in stage.rows()) == list(range(10, 20))
    for shard in range(SHARDS):
        assert {row["n"] % SHARDS for row in stage.kept(shard)} <= {shard}


def test_beam_does_the_missing_shards_in_several_processes(tmp_path):
    source = make_source(tmp_path)
    stage = make_stage("even", tmp_path)
    stage.claim(source.fingerprint())
    rows = source.kept(2)
    stage.write(2, rows, drop_odd(rows))
    marks = tmp_path / "marks"

    # Inside, so that it travels to the workers by value: they cannot import a test.
    def work(rows: list[Row]) -> Iterator[Outcome]:
        for row in rows:
            with open(marks, "a") as file:
                file.write(f"{row['clip_id']} {os.getpid()}\n")
            yield Dropped(row=row, reason="odd") if row["n"] % 2 else row

    summary = shards.run(stage, source, work, Workers(processes=2))
    assert (summary["kept"], summary["dropped"]) == (10, 10)
    worked = dict(line.split() for line in marks.read_text().splitlines())
    assert set(worked) == {f"c{i}" for i in range(20) if i % SHARDS != 2}
    assert str(os.getpid()) not in worked.values()


CLUSTERS = {
    "DataflowRunner": (
        "--project=saber-jax",
        "--region=europe-west4",
        "--temp_location=gs://saber-bucket/temp",
        "--staging_location=gs://saber-bucket/staging",
    ),
    "FlinkRunner": ("--flink_master=host:8081", "--environment_config=saber-jax:prep"),
    "SparkRunner": ("--spark_master_url=spark://host:7077",),
}


@pytest.mark.parametrize("runner", CLUSTERS)
def test_a_pipeline_for_a_cluster_is_built_with_its_options(tmp_path, runner, monkeypatch):
    """Built and not run: there is no cluster here, nor a bucket whose policy Beam could look up."""
    from apache_beam.options.pipeline_options import GoogleCloudOptions

    monkeypatch.setattr(GoogleCloudOptions, "_warn_if_soft_delete_policy_enabled", lambda *_: None)
    options = (f"--runner={runner}", *CLUSTERS[runner])
    assert Workers(processes=8, beam=options).options() == list(options)
    source = make_source(tmp_path)
    job = shards.ShardJob(make_stage("even", tmp_path), source, drop_odd)
    made = shards.pipeline(job, [0, 1], Workers(beam=options))
    assert type(made.runner).__name__ == runner
    names = [t.unique_name for t in made.to_runner_api().components.transforms.values()]
    assert "even" in names and any("Reshuffle" in name for name in names)


def test_what_a_cluster_is_sent_runs_in_a_process_that_has_seen_nothing_of_it(tmp_path):
    """The pipeline's portable form, which every runner but the direct one gets, carries it all."""
    source = make_source(tmp_path, count=0)
    film = media_files.write_clip(
        tmp_path / "a.mp4",
        frames=np.asarray(media_files.gray_frames(12)),
        audio=media_files.tone(1.0),
        codecs=("libx264", "aac"),
        pixels="yuv420p",
    )
    for shard, file in enumerate([film, tmp_path / "lost.mp4"]):
        row = {"clip_id": file.stem, "file": str(file), "provenance": []}
        source.write(shard, [row], [row])
    stage = ShardedStage(
        name="measure", out=str(tmp_path), shards=SHARDS, settings={}, reasons=measure.REASONS
    )
    stage.claim(source.fingerprint())
    work = functools.partial(measure.work, settings=measure.MeasureSettings())
    job = shards.ShardJob(stage, source, work)
    options = ("--runner=FlinkRunner", *CLUSTERS["FlinkRunner"])
    made = shards.pipeline(job, range(SHARDS), Workers(beam=options))
    (tmp_path / "pipeline.pb").write_bytes(made.to_runner_api().SerializeToString())
    runs = f"""
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners import DirectRunner
proto = beam_runner_api_pb2.Pipeline()
proto.ParseFromString(open({str(tmp_path / "pipeline.pb")!r}, "rb").read())
runner = DirectRunner()
beam.Pipeline.from_runner_api(proto, runner, PipelineOptions()).run().wait_until_finish()
"""
    subprocess.run([sys.executable, "-c", runs], check=True, cwd=Path(__file__).parents[3])
    assert stage.summarise()["reasons"] == {"unreadable": 1}
    [row] = stage.rows()
    assert row["clip_id"] == "a" and row["measures"]["seconds"] == pytest.approx(1.0, abs=0.1)
