"""Answers a benchmark's clips with a checkpoint and scores the answers.

    python -m saber_jax.evaluation.run --benchmark saber_test --checkpoint runs/tiny/cadpo \
        --data runs/tiny/records --split test --out runs/tiny/cadpo_scores
    python -m saber_jax.evaluation.run --benchmark emobench_m --predictions results/ --out scores

OUT contains predictions.jsonl (appended batch by batch, so that an interrupted run continues),
scores.json, probes/ with --probes, and manifest.json with the inputs. docs/evaluation.md describes
the layouts of the benchmarks and the scores.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saber_jax.data import texts
from saber_jax.endpoint import KEY_VARIABLE, Endpoint, EndpointError
from saber_jax.evaluation import probes
from saber_jax.evaluation.benchmarks import BENCHMARKS, Benchmark, digest
from saber_jax.evaluation.judge import Judge
from saber_jax.evaluation.predict import BenchmarkClips, Row, SpelledOut, predict
from saber_jax.flags import Parser
from saber_jax.generate.generator import Generator, load_generator, model_fingerprint
from saber_jax.runs import shares
from saber_jax.runs.files import exists, read_jsonl, write_json, write_jsonl
from saber_jax.runs.journal import Journal
from saber_jax.train import checkpoint

LISTED = 20
"""How many lines of a list are printed; scores.json has all."""


class LazyGenerator:
    """A checkpoint that is loaded when the first answer is missing."""

    def __init__(self, flags: argparse.Namespace):
        self._flags = flags
        self._generator: Generator | None = None

    def answer(self, clips: BenchmarkClips, folder: Path, inputs: dict[str, Any]) -> list[Row]:
        """The rows of `folder`/predictions.jsonl, made where they are missing."""
        batch_size = self._flags.batch_size
        journal = Journal(folder, "predictions.jsonl", inputs)
        if exists(journal.path) and len(rows := read_jsonl(journal.path)) == len(clips.records):
            return rows
        rows = shares.joined(folder, journal.path.name, len(clips.records), batch_size)
        if rows is not None:
            write_jsonl(journal.path, rows)
            return rows
        print(f"{inputs['benchmark']}: {len(clips.records)} clips, to {folder}", flush=True)
        if self._generator is None:
            self._generator = load_generator(
                self._flags.checkpoint,
                max_new_tokens=self._flags.max_new_tokens,
                batch_size=batch_size,
            )
        self._generator.reserve(getattr(clips.records, "sizes", ()))
        respond = self._generator.respond_batches
        return predict(clips, respond, journal, batch_size=batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes predictions and scores; returns the exit code."""
    flags = _flags(argv)
    benchmark = BENCHMARKS[flags.benchmark]
    judge = _judge(flags)
    try:
        if flags.predictions:
            rows, probed = _made_elsewhere(benchmark, flags), {}
        else:
            rows, probed = _answered(benchmark, flags)
        if flags.share:
            print(f"share {flags.share.number} of {flags.share.count} is done: {len(rows)} clips")
            return 0
        scores = benchmark.score(rows, judge)
        if probed:
            scores["probes"] = probes.score(rows, probed)
        scores["unreadable"] = [f"{r['clip_id']}: {r['error']}" for r in rows if "error" in r]
        scores["unanswered"] = [r["clip_id"] for r in rows if "unanswered" in r]
        finished = flags.out / "scores.json"
        write_json(finished, scores)
    except (ValueError, OSError, KeyError, EndpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not flags.brief:
        show(scores)
    print(f"scores in {finished}")
    return _report_gaps(scores, len(rows), flags.predictions)


def _report_gaps(scores: dict[str, Any], clips: int, predictions: Path | None) -> int:
    """Says which clips only count as empty answers; returns the exit code."""
    unread, unanswered = scores["unreadable"], scores["unanswered"]
    if unread:
        print(f"error: {len(unread)} of {clips} clips could not be read", file=sys.stderr)
    if unanswered:
        print(
            f"error: {len(unanswered)} of {clips} clips have no answer in {predictions} and count "
            f"as empty answers: {texts.listed(unanswered)}",
            file=sys.stderr,
        )
    return 1 if unread or unanswered else 0


def _answered(
    benchmark: Benchmark, flags: argparse.Namespace
) -> tuple[list[Row], dict[str, list[Row]]]:
    """Rows of all clips, and of all clips under each probe."""
    about = checkpoint.read_model_file(flags.checkpoint)
    inputs = {
        "benchmark": flags.benchmark,
        "checkpoint": model_fingerprint(flags.checkpoint),
        "data": benchmark.data(flags.data),
        "split": flags.split,
        "batch_size": flags.batch_size,
        "max_new_tokens": flags.max_new_tokens,
    }
    settings = about.get("provenance", {}).get("sampling")
    clips = benchmark.clips(flags.data, flags.split, settings)
    if flags.spell_out:
        inputs["spell_out"] = True
        clips = dataclasses.replace(clips, records=SpelledOut(clips.records))
    generator = LazyGenerator(flags)

    def answer(asked: BenchmarkClips, folder: Path, inputs: dict[str, Any]) -> list[Row]:
        """All of its answers, or a share's."""
        if flags.share:
            asked = asked.part(flags.share.indices(len(asked.records), flags.batch_size))
            folder = flags.share.folder(folder)
        return generator.answer(asked, folder, inputs)

    rows = answer(clips, flags.out, inputs)
    donors = probes.donors(_without_answers(clips)) if flags.probes else []
    probed = {}
    for probe in probes.PROBES if flags.probes else ():
        changed = BenchmarkClips(records=probes.Probed(clips.records, probe, donors), row=clips.row)
        probed[probe] = answer(changed, flags.out / "probes" / probe, inputs | {"probe": probe})
    return rows, probed


def _without_answers(clips: BenchmarkClips) -> list[Row]:
    """A row of every clip, made without reading media."""
    records = clips.records
    outline = getattr(records, "outline", records.__getitem__)
    return [clips.row(i, outline(i), "") for i in range(len(records))]


def _made_elsewhere(benchmark: Benchmark, flags: argparse.Namespace) -> list[Row]:
    """Rows of --predictions, written down beside their scores as a run of ours leaves them."""
    rows = benchmark.made_elsewhere(flags.predictions, flags.data, flags.split)
    inputs = {"benchmark": flags.benchmark, "predictions": digest(flags.predictions)}
    write_jsonl(Journal(flags.out, "predictions.jsonl", inputs).path, rows)
    return rows


def _judge(flags: argparse.Namespace) -> Judge | None:
    if not flags.judge:
        return None
    cache = flags.judge_cache or flags.out / "judge"
    endpoint = Endpoint(
        url=flags.judge,
        model=flags.judge_model,
        cache=cache,
        concurrency=flags.judge_concurrency,
        retries=flags.judge_retries,
        requests_per_minute=flags.judge_requests_per_minute,
        most_tokens=flags.judge_most_tokens,
    )
    return Judge(endpoint)


def show(scores: dict[str, Any], indent: str = "") -> None:
    """Scores with their intervals, one a line."""
    for name, value in scores.items():
        if isinstance(value, list):
            for line in value[:LISTED]:
                print(f"{indent}{name}: {line}")
            if len(value) > LISTED:
                print(f"{indent}{name}: and {len(value) - LISTED} more")
        elif not isinstance(value, dict):
            print(f"{indent}{name}: {value}")
        elif "value" not in value and "counts" not in value:
            print(f"{indent}{name}")
            show(value, indent + "  ")
        elif value.get("value") is not None:
            low_high = value.get("interval")
            interval = f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""
            count = f", n={value['n']}" if "n" in value else ""
            print(f"{indent}{name}: {value['value']:.3f}{interval}{count}")


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--benchmark", required=True, choices=sorted(BENCHMARKS))
    parser.add_argument("--checkpoint", type=Path, help="work directory of a run")
    parser.add_argument("--data", type=Path, help="records, or the benchmark's own folder")
    parser.add_argument("--split", default="test", help="of records")
    parser.add_argument("--predictions", type=Path, help="score these instead of a checkpoint")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--probes", action="store_true", help="saber_test: also mute, blank, swap")
    parser.add_argument(
        "--spell_out",
        action="store_true",
        help="saber_test: name the sections and emotions, for a model not trained on SED",
    )
    parser.add_argument("--share", metavar="I/N", help="answer only this part, see runs/shares.py")
    parser.add_argument("--brief", action="store_true", help="do not print the scores")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    key = f"; the key is read from {KEY_VARIABLE}"
    parser.add_argument("--judge", metavar="URL", help=f"an OpenAI-compatible endpoint{key}")
    parser.add_argument("--judge_model", metavar="NAME")
    parser.add_argument("--judge_cache", type=Path, help="default: OUT/judge")
    parser.add_argument("--judge_concurrency", type=int, default=8)
    parser.add_argument("--judge_retries", type=int, default=5)
    parser.add_argument("--judge_requests_per_minute", type=float)
    parser.add_argument("--judge_most_tokens", type=int, help="stop before asking for more")
    flags = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "judge_concurrency"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(flags, name)}")
    if bool(flags.predictions) == bool(flags.checkpoint):
        parser.error("give either --checkpoint or --predictions")
    if flags.checkpoint and not flags.data:
        parser.error("--checkpoint needs --data: the clips to answer")
    if bool(flags.judge) != bool(flags.judge_model):
        parser.error("--judge and --judge_model go together")
    if flags.share:
        try:
            flags.share = shares.Share.parse(flags.share)
        except ValueError as error:
            parser.error(f"--share: {error}")
    if flags.share and flags.predictions:
        parser.error("--share is for a checkpoint, whose answers take long, not for --predictions")
    if flags.spell_out and (flags.benchmark != "saber_test" or flags.predictions):
        parser.error("--spell_out is for a checkpoint and --benchmark saber_test")
    if flags.probes and (flags.benchmark != "saber_test" or flags.predictions):
        parser.error("--probes need a checkpoint and --benchmark saber_test")
    return flags


if __name__ == "__main__":
    sys.exit(main())
