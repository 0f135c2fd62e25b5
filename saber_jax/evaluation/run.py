"""Answers a benchmark's clips with a checkpoint and scores the answers.

    python -m saber_jax.evaluation.run --benchmark saber_test --checkpoint runs/cadpo \
        --data runs/records --split test --out runs/cadpo_scores

OUT holds predictions.jsonl (appended batch by batch, so a killed run goes on where it was),
scores.json, and manifest.json with the inputs.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saber_jax.data import sed
from saber_jax.data.journal import Journal, batches, fingerprint, read_json, write_json
from saber_jax.data.records import Record, RecordSource
from saber_jax.evaluation import saber_test
from saber_jax.generate import load_generator, model_fingerprint

BENCHMARKS = {"saber_test": saber_test.score}


def predict(
    records: Sequence[Record],
    respond: Callable[[Iterator[list[Record]]], Iterator[list[str]]],
    journal: Journal,
    *,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Answers all records, going on from what `journal` holds."""
    plan = batches(len(records), batch_size)
    done = journal.resume([stop for _, stop in plan])
    rest = [range(start, stop) for start, stop in plan if start >= len(done)]
    with tqdm(total=len(records), initial=len(done), desc="answers", unit="clip") as bar:
        parts = ([records[i] for i in part] for part in rest)
        for part, answers in zip(rest, respond(parts), strict=True):
            new = [prediction(records[i], answer) for i, answer in zip(part, answers, strict=True)]
            journal.append(new)
            done += new
            bar.update(len(new))
    return done


def prediction(record: Record, answer: str) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    return {
        "clip_id": record.clip_id,
        "language": record.language,
        "response": answer,
        "conclusion": sed.conclusion(answer),
        "labels": dict(record.labels),
        "annotation": dict(record.annotation),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Writes predictions and scores; returns the exit code."""
    flags = _flags(argv)
    try:
        inputs = {
            "benchmark": flags.benchmark,
            "checkpoint": model_fingerprint(flags.checkpoint),
            "data": fingerprint(flags.data, "**/*.array_record*"),
            "split": flags.split,
            "batch_size": flags.batch_size,
            "max_new_tokens": flags.max_new_tokens,
        }
        journal = Journal(flags.out, "predictions.jsonl", inputs)
        finished = journal.folder / "scores.json"
        if not finished.exists():
            source = RecordSource(flags.data, flags.split)
            print(f"{flags.benchmark}: {len(source)} clips of split {flags.split}, to {flags.out}")
            generator = load_generator(
                flags.checkpoint, max_new_tokens=flags.max_new_tokens, batch_size=flags.batch_size
            )
            generator.reserve(source.sizes)
            predictions = predict(
                source, generator.respond_batches, journal, batch_size=flags.batch_size
            )
            write_json(finished, BENCHMARKS[flags.benchmark](predictions))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _show(read_json(finished))
    print(f"scores in {finished}")
    return 0


def _show(scores: dict[str, Any], indent: str = "") -> None:
    """Rates with their intervals, one a line."""
    for name, value in scores.items():
        if not isinstance(value, dict):
            print(f"{indent}{name}: {value}")
        elif "value" not in value:
            print(f"{indent}{name}")
            _show(value, indent + "  ")
        elif value["value"] is not None:
            low_high = value.get("interval")
            interval = f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""
            count = f", n={value['n']}" if "n" in value else ""
            print(f"{indent}{name}: {value['value']:.3f}{interval}{count}")


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score a checkpoint on a benchmark.")
    parser.add_argument("--benchmark", required=True, choices=sorted(BENCHMARKS))
    parser.add_argument("--checkpoint", required=True, type=Path, help="work directory of a run")
    parser.add_argument("--data", required=True, type=Path, help="what data_prep.build wrote")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    flags = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(flags, name)}")
    return flags


if __name__ == "__main__":
    sys.exit(main())
