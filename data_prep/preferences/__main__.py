"""Mines preference pairs from a SED model, by one of two methods.

    python -m data_prep.preferences --method sample --samples 10 --temperature 0.8 \
        --checkpoint runs/7b/sft --records runs/7b/records --split preference --out runs/7b/pairs
    python -m data_prep.preferences --method withhold \
        --checkpoint runs/tiny/sft --records runs/tiny/records --out runs/tiny/pairs

`sample` is the paper's method: it samples several answers to each conflicting clip and prefers the
best-scored to the worst-scored (sample.py, score.py). `withhold` prefers the record's annotation to
the model's answer with one modality withheld (withhold.py). docs/cadpo.md says how to choose.

OUT contains every answer with its outcome (answers.jsonl or decisions.jsonl, appended batch by
batch, so that an interrupted run continues), pairs.jsonl, summary.json, and manifest.json with the
inputs. To use several hosts, run each with its --share, and then once without to join the shares.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.preferences import judge, offline, sample, summary, withhold
from data_prep.preferences.score import Scorer
from saber_jax.data.pairs import write_pairs
from saber_jax.data.records import Record, RecordSource
from saber_jax.endpoint import KEY_VARIABLE, Endpoint, EndpointError
from saber_jax.flags import Parser
from saber_jax.generate.decoding import Sampling
from saber_jax.generate.generator import Generator, load_generator, model_fingerprint
from saber_jax.runs import shares
from saber_jax.runs.files import write_json
from saber_jax.runs.journal import Journal
from saber_jax.runs.manifest import fingerprint

FEWEST_PAIRS = 8
METHODS = {"sample": sample, "withhold": withhold}
SCORERS = {"offline": offline.VERSION, "judge": judge.VERSION}


def main(argv: Sequence[str] | None = None) -> int:
    """Mines pairs; returns 0 if there are enough to train on."""
    flags = _flags(argv)
    try:
        return _mine(flags)
    except (ValueError, OSError, EndpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _mine(flags: argparse.Namespace) -> int:
    method = METHODS[flags.method]
    source = RecordSource(flags.records, flags.split)
    records = _FirstRecords(source, flags.limit)
    folder = flags.share.folder(flags.out) if flags.share else flags.out
    journal = Journal(folder, method.NAME, _inputs(flags))
    print(f"mining pairs from {len(records)} records of split {flags.split} into {folder}")
    model = _LazyGenerator(flags, records)
    if flags.method == "sample":
        lines = sample.mine(
            records,
            model.draw,
            _scorer(flags),
            journal,
            batch_size=flags.batch_size,
            concurrency=flags.judge_concurrency if flags.scorer == "judge" else 1,
            all_clips=flags.all_clips,
            share=flags.share,
        )
    else:
        lines = withhold.mine(
            records,
            model.respond,
            journal,
            batch_size=flags.batch_size,
            all_clips=flags.all_clips,
            share=flags.share,
        )
    if flags.share:
        print(f"share {flags.share.number} of {flags.share.count} is done: {len(lines)}")
        return 0
    if flags.method == "sample":
        about, pairs = sample.summarise(
            lines, margin=flags.margin, most=flags.pairs_per_clip, all_clips=flags.all_clips
        )
        about |= {"margin": flags.margin, "scorer": SCORERS[flags.scorer]}
    else:
        about, pairs = withhold.summarise(lines), withhold.pairs_of(lines)
    write_pairs(journal.folder / "pairs.jsonl", pairs)
    write_json(journal.folder / "summary.json", {"method": flags.method} | about)
    return _verdict(about, method.REASONS, flags, journal.folder)


def _inputs(flags: argparse.Namespace) -> dict[str, Any]:
    """What the answers depend on. Margin and pairs per clip only select among existing answers."""
    inputs = {
        "method": flags.method,
        "checkpoint": model_fingerprint(flags.checkpoint),
        "records": fingerprint(flags.records, "**/*.array_record*"),
        "split": flags.split,
        "limit": flags.limit,
        "batch_size": flags.batch_size,
        "max_new_tokens": flags.max_new_tokens,
        "all_clips": flags.all_clips,
    }
    if flags.method == "withhold":
        return inputs
    inputs |= {
        "samples": flags.samples,
        "temperature": flags.temperature,
        "top_p": flags.top_p,
        "seed": flags.seed,
        "scorer": SCORERS[flags.scorer],
    }
    if flags.scorer == "judge":
        inputs |= {"judge": flags.judge_model, "judge_media": flags.judge_media}
    return inputs


class _FirstRecords:
    """The first `limit` records of a split, still read one at a time."""

    def __init__(self, source: RecordSource, limit: int | None):
        self._source = source
        self.sizes = source.sizes[:limit]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Record:
        return self._source[index]

    def outline(self, index: int) -> Record:
        """The record without its pixels, see RecordSource.outline."""
        return self._source.outline(index)


class _LazyGenerator:
    """A checkpoint that is loaded when the first answer is needed."""

    def __init__(self, flags: argparse.Namespace, records: _FirstRecords):
        self._flags, self._records = flags, records

    def respond(self, batches: Iterator[list[Record]]) -> Iterator[list[str]]:
        """The likeliest answer to each record."""
        yield from self._load().respond_batches(batches)

    def draw(self, batches: Iterator[tuple[int, list[Record]]]) -> Iterator[list[list[str]]]:
        """Several answers to each record. They depend on the record's index, not on the host or
        batch, so any number of hosts, and a resumed run, sample the same."""
        flags = self._flags
        yield from self._load().sample_batches(
            batches,
            flags.samples,
            sampling=_sampling(flags),
        )

    def _load(self) -> Generator:
        generator = load_generator(
            self._flags.checkpoint,
            max_new_tokens=self._flags.max_new_tokens,
            batch_size=self._flags.batch_size,
        )
        generator.reserve(self._records.sizes)
        return generator


def _scorer(flags: argparse.Namespace) -> Scorer:
    if flags.scorer == "offline":
        return offline.score
    endpoint = Endpoint(
        url=flags.judge,
        model=flags.judge_model,
        cache=flags.judge_cache or flags.out / "judge",
        concurrency=flags.judge_concurrency,
        requests_per_minute=flags.judge_requests_per_minute,
        most_tokens=flags.judge_most_tokens,
    )
    return judge.JudgeScorer(endpoint, media=flags.judge_media)


def _verdict(
    about: dict[str, Any], reasons: dict[str, str], flags: argparse.Namespace, folder: Path
) -> int:
    print(f"{about['pairs']} pairs from {about['answers']} answers, in {folder}/pairs.jsonl")
    for why, count in about["decisions"].items():
        print(f"  {count:6d}  {why}: {reasons[why]}")
    for name, value in about["about_pairs"].items():
        if value is not None:
            print(f"  {summary.MEANINGS[name].format(value)}")
    if about["pairs"] >= FEWEST_PAIRS:
        return 0
    advice = {
        "sample": "Many unparsable: train SED longer or raise --max_new_tokens. Many ties or below "
        "the margin: raise --temperature or --samples (with a new --out), or lower --margin.",
        "withhold": "Many unparsable answers: train SED longer or raise --max_new_tokens. Many "
        "other conclusions: train SED longer. Then use a new --out.",
    }
    print(
        f"error: {about['pairs']} pairs are too few to train on; at least {FEWEST_PAIRS} are "
        "needed. Many without conflict: add clips whose face and voice disagree to the split. "
        + advice[flags.method],
        file=sys.stderr,
    )
    return 1


def _sampling(flags: argparse.Namespace) -> Sampling:
    return Sampling(temperature=flags.temperature, top_p=flags.top_p, seed=flags.seed)


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="withhold")
    parser.add_argument("--checkpoint", required=True, type=Path, help="work directory of stage 1")
    parser.add_argument("--records", required=True, type=Path, help="what data_prep.build wrote")
    parser.add_argument("--split", default="preference")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--batch_size", type=int, default=64, help="clips answered at a time")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument(
        "--all_clips", action="store_true", help="ask about clips without a conflict too"
    )
    parser.add_argument("--limit", type=int, help="only the first records of the split")
    parser.add_argument("--share", metavar="I/N", help="answer only this part")
    drawn = parser.add_argument_group("--method sample")
    drawn.add_argument("--samples", type=int, default=10, help="answers per clip")
    drawn.add_argument("--temperature", type=float, default=0.8)
    drawn.add_argument("--top_p", type=float, default=1.0)
    drawn.add_argument("--seed", type=int, default=0)
    drawn.add_argument("--margin", type=float, default=0.1, help="minimum difference of scores")
    drawn.add_argument("--pairs_per_clip", type=int, default=1)
    drawn.add_argument("--scorer", choices=SCORERS, default="offline")
    key = f"; the key is read from {KEY_VARIABLE}"
    drawn.add_argument("--judge", metavar="URL", help=f"an OpenAI-compatible endpoint{key}")
    drawn.add_argument("--judge_model", metavar="NAME")
    drawn.add_argument("--judge_media", action="store_true", help="show the judge the clip")
    drawn.add_argument("--judge_cache", type=Path, help="default: OUT/judge")
    drawn.add_argument("--judge_concurrency", type=int, default=8)
    drawn.add_argument("--judge_requests_per_minute", type=float)
    drawn.add_argument("--judge_most_tokens", type=int, help="stop before asking for more")
    flags = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "limit", "pairs_per_clip", "judge_concurrency"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(flags, name)}")
    if flags.method == "sample" and (flags.samples < 2 or flags.temperature <= 0):
        parser.error(
            "a pair needs --samples of at least 2 and a --temperature above 0, got "
            f"{flags.samples} and {flags.temperature:g}"
        )
    try:
        _sampling(flags)
    except ValueError as error:
        parser.error(str(error).rstrip("."))
    if flags.margin < 0:
        parser.error(f"--margin must be at least 0, got {flags.margin:g}")
    if flags.scorer == "judge" and not (flags.judge and flags.judge_model):
        parser.error("--scorer judge needs --judge URL and --judge_model NAME")
    if flags.scorer == "offline" and (flags.judge or flags.judge_model or flags.judge_media):
        parser.error("--judge, --judge_model and --judge_media are for --scorer judge")
    if flags.share:
        try:
            flags.share = shares.Share.parse(flags.share)
        except ValueError as error:
            parser.error(f"--share: {error}")
    return flags


if __name__ == "__main__":
    sys.exit(main())
