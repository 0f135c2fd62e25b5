"""Mines preference pairs: what the SED model concludes when it can only see, or only hear.

    python -m data_prep.preferences --checkpoint runs/tiny/sft --records runs/tiny/records \
        --split preference --out runs/tiny/pairs

Chosen is a record's own six-section target. Rejected is the model's answer with one modality
withheld, kept when it is well formed but concludes what the remaining modality alone suggests: the
error of letting one modality dominate, made by the model itself and not invented.

A pair's kappa, how strongly the modalities disagree, is the record's label; where it has none, 1 if
the model concludes something else from the picture alone than from the sound alone, and 0 if not.

OUT holds decisions.jsonl (every answer and what became of it, appended batch by batch, so a killed
run goes on where it was), pairs.jsonl, summary.json, and manifest.json with the inputs. Several
hosts each ask for a --share; the same command without it then joins them.
"""

import argparse
import collections
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saber_jax.data import sed
from saber_jax.data.records import FIELDS, Record, RecordSource
from saber_jax.data.withhold import MODALITIES, Modality, has_modality, withhold
from saber_jax.flags import Parser
from saber_jax.generate.generator import load_generator, model_fingerprint
from saber_jax.runs import shares
from saber_jax.runs.files import read_json, write_json, write_jsonl
from saber_jax.runs.journal import Journal, batches
from saber_jax.runs.manifest import fingerprint

FEWEST_PAIRS = 8
NAME = "decisions.jsonl"

# The label that says what the modality still present suggests.
SEEN: dict[Modality, str] = {"audio": "face", "video": "voice"}

KEPT = "kept"
KEPT_WITHOUT_LABELS = "kept_without_labels"
REASONS = {
    KEPT: "concludes what the remaining modality suggests, and the record does not",
    KEPT_WITHOUT_LABELS: "concludes something else; no label says what the modality suggests",
    "no_conflict": "the remaining modality suggests the right conclusion; nothing was generated",
    "nothing_to_withhold": "the record lacks that modality; nothing was generated",
    "no_target": "the record itself names no emotion; nothing was generated",
    "unparsable": "at least one of the six sections is missing",
    "no_conclusion": "the reasoning names no known emotion",
    "same_conclusion": "right although the modality was withheld",
    "other_conclusion": "wrong, but not what the remaining modality suggests",
}

PAIR_KEYS = (
    "clip_id",
    "language",
    "chosen",
    "rejected",
    "withheld",
    "conclusion",
    "rejected_conclusion",
    "conflict_type",
    "kappa",
)

Decision = dict[str, Any]


def settled(record: Record, withheld: Modality) -> str | None:
    """Why no answer is needed, or None: then `judge` decides."""
    target = _conclusion(record)
    if not has_modality(record, withheld):
        return "nothing_to_withhold"
    if target is None:
        return "no_target"
    return "no_conflict" if record.labels.get(SEEN[withheld]) == target else None


def judge(record: Record, withheld: Modality, answer: str) -> str:
    """What becomes of an answer given without one modality: a key of REASONS."""
    # Headings, not texts: a section may be empty, as for a clip without speech.
    if not all(sed.heading(field) in answer for field in FIELDS):
        return "unparsable"
    concluded = sed.conclusion(answer)
    if concluded is None:
        return "no_conclusion"
    if concluded == _conclusion(record):
        return "same_conclusion"
    suggested = record.labels.get(SEEN[withheld])
    if suggested is None:
        return KEPT_WITHOUT_LABELS
    return KEPT if concluded == suggested else "other_conclusion"


def decision(record: Record, withheld: Modality, why: str, answer: str | None) -> Decision:
    """One line of decisions.jsonl; kappa and conflict_type are null where no label gives them."""
    kept = why in (KEPT, KEPT_WITHOUT_LABELS)
    kappa = record.labels.get("kappa")
    return {
        "clip_id": record.clip_id,
        "language": record.language,
        "withheld": withheld,
        "why": why,
        "conclusion": _conclusion(record),
        "rejected_conclusion": None if answer is None else sed.conclusion(answer),
        "suggested": record.labels.get(SEEN[withheld]),
        "conflict_type": record.labels.get("conflict_type"),
        "kappa": None if kappa is None else float(kappa),
        "chosen": sed.target_text(record.annotation) if kept else None,
        "rejected": answer,
    }


def mine(
    records: Sequence[Record],
    respond: Callable[[Iterator[list[Record]]], Iterator[list[str]]],
    journal: Journal,
    *,
    batch_size: int,
    share: shares.Share | None = None,
) -> list[Decision]:
    """Decides about every record and modality, going on from what `journal` holds.

    First come the decisions that need no answer, then the others in batches. `respond` answers
    batch after batch. A `share` is some of those batches; where all shares are there, nothing is
    asked for.
    """
    quick, jobs = _divided(records)
    if share:
        quick, jobs = [], [jobs[i] for i in share.indices(len(jobs), batch_size)]
    elif (rows := shares.joined(journal.folder, NAME, len(jobs), batch_size)) is not None:
        write_jsonl(journal.path, quick + rows)
        return quick + rows
    plan = batches(len(jobs), batch_size, first=len(quick))
    done = journal.resume([len(quick), *(stop for _, stop in plan)])
    if len(done) < len(quick):
        journal.append(quick)
        done = quick
    answered = len(done) - len(quick)
    bar = tqdm(total=len(jobs), initial=answered, desc="answers without a modality", unit="answer")
    with bar:
        rest = [part for part in plan if part[0] >= len(done)]
        work = [jobs[start - len(quick) : stop - len(quick)] for start, stop in rest]
        hidden = ([withhold(records[i], modality) for i, modality in part] for part in work)
        for part, answers in zip(work, respond(hidden), strict=True):
            new = [
                decision(records[i], modality, judge(records[i], modality, answer), answer)
                for (i, modality), answer in zip(part, answers, strict=True)
            ]
            journal.append(new)
            done += new
            bar.update(len(new))
    return done


def _divided(records: Sequence[Record]) -> tuple[list[Decision], list[tuple[int, Modality]]]:
    """The decisions that need no answer, and what to ask: (index of a record, what is withheld)."""
    quick: list[Decision] = []
    jobs: list[tuple[int, Modality]] = []
    for index in range(len(records)):
        record = records[index]
        for withheld in MODALITIES:
            if why := settled(record, withheld):
                quick.append(decision(record, withheld, why, None))
            else:
                jobs.append((index, withheld))
    return quick, jobs


def disagreements(decisions: Iterable[Decision]) -> dict[str, float]:
    """kappa of clips that no label gives one: 1.0 where what is concluded without sound and what is
    concluded without picture differ, 0.0 where they agree.

    Clips that were not answered both ways, or concluded nothing in one of them, are left out.
    """
    concluded: dict[str, list[str]] = {}
    for d in decisions:
        if d["kappa"] is None and d["rejected_conclusion"] is not None:
            concluded.setdefault(d["clip_id"], []).append(d["rejected_conclusion"])
    both = {clip: found for clip, found in concluded.items() if len(found) == len(MODALITIES)}
    return {clip: float(len(set(found)) > 1) for clip, found in both.items()}


def pairs_of(decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """Lines of pairs.jsonl: what was kept, with kappa from the labels or else `disagreements`."""
    mined = disagreements(decisions)
    kept = [{key: d[key] for key in PAIR_KEYS} for d in decisions if d["chosen"] is not None]
    return [
        pair | {"kappa": mined.get(pair["clip_id"]) if pair["kappa"] is None else pair["kappa"]}
        for pair in kept
    ]


def summarise(decisions: Iterable[Decision]) -> dict[str, Any]:
    """Counts for summary.json."""
    decisions = list(decisions)
    kept = [d for d in decisions if d["chosen"] is not None]
    count = collections.Counter
    return {
        "pairs": len(kept),
        "answers": sum(d["rejected"] is not None for d in decisions),
        "decisions": _ordered(count(d["why"] for d in decisions), REASONS),
        "pairs_by_withheld": _ordered(count(d["withheld"] for d in kept), MODALITIES),
        "pairs_by_conflict_type": dict(
            sorted(count(d["conflict_type"] or "unlabelled" for d in kept).items())
        ),
        "mined_kappa": dict(sorted(count(map(str, disagreements(decisions).values())).items())),
        "pairs_by_language": dict(sorted(count(d["language"] for d in kept).items())),
    }


def _ordered(counts: collections.Counter, names: Iterable[str]) -> dict[str, int]:
    return {name: counts[name] for name in names if counts[name]}


def _conclusion(record: Record) -> str | None:
    """The label if there is one, else what the record's own reasoning ends on."""
    return record.labels.get("emotion") or sed.conclusion(sed.target_text(record.annotation))


def main(argv: Sequence[str] | None = None) -> int:
    """Mines pairs; returns 0 if there are enough to train on."""
    flags = _flags(argv)
    try:
        source = RecordSource(flags.records, flags.split)
        inputs = {
            "checkpoint": model_fingerprint(flags.checkpoint),
            "records": fingerprint(flags.records, "**/*.array_record*"),
            "split": flags.split,
            "limit": flags.limit,
            "batch_size": flags.batch_size,
            "max_new_tokens": flags.max_new_tokens,
        }
        folder = flags.share.folder(flags.out) if flags.share else flags.out
        journal = Journal(folder, NAME, inputs)
        if (journal.folder / "summary.json").exists():
            return _verdict(read_json(journal.folder / "summary.json"), journal.folder)
        print(f"mining pairs from {len(source)} records of split {flags.split} into {folder}")
        sizes = source.sizes[: flags.limit]
        decisions = mine(
            _First(source, len(sizes)),
            functools.partial(_respond, flags, sizes),
            journal,
            batch_size=flags.batch_size,
            share=flags.share,
        )
        if flags.share:
            print(f"share {flags.share.number} of {flags.share.count} is done: {len(decisions)}")
            return 0
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_jsonl(journal.folder / "pairs.jsonl", pairs_of(decisions))
    summary = summarise(decisions)
    write_json(journal.folder / "summary.json", summary)
    return _verdict(summary, journal.folder)


def _respond(
    flags: argparse.Namespace, sizes: Any, batches: Iterator[list[Record]]
) -> Iterator[list[str]]:
    """Answers of the checkpoint, which is loaded when the first one is asked for."""
    generator = load_generator(
        flags.checkpoint, max_new_tokens=flags.max_new_tokens, batch_size=flags.batch_size
    )
    generator.reserve(sizes)
    yield from generator.respond_batches(batches)


class _First:
    """The first `length` records, still read one at a time."""

    def __init__(self, source: RecordSource, length: int):
        self._source, self._length = source, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        return self._source[index]


def _verdict(summary: dict[str, Any], folder: Path) -> int:
    print(f"{summary['pairs']} pairs from {summary['answers']} answers, in {folder}/pairs.jsonl")
    for why, count in summary["decisions"].items():
        print(f"  {count:6d}  {why}: {REASONS[why]}")
    if summary["pairs"] >= FEWEST_PAIRS:
        return 0
    print(
        f"error: {summary['pairs']} pairs are too few to learn from; at least {FEWEST_PAIRS} are "
        "needed. Many unparsable answers: train SED longer or raise --max_new_tokens. Many other "
        "conclusions: train SED longer. Many without conflict: add clips whose face and voice "
        "disagree to the split. Then use a new --out.",
        file=sys.stderr,
    )
    return 1


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="work directory of SED")
    parser.add_argument("--records", required=True, type=Path, help="what data_prep.build wrote")
    parser.add_argument("--split", default="preference")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--limit", type=int, help="only the first records of the split")
    parser.add_argument("--share", metavar="I/N", help="ask for this part alone")
    flags = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "limit"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(flags, name)}")
    if flags.share:
        try:
            flags.share = shares.Share.parse(flags.share)
        except ValueError as error:
            parser.error(f"--share: {error}")
    return flags


if __name__ == "__main__":
    sys.exit(main())
