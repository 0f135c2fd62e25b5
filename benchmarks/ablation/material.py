"""What an arm of the ablation is trained on, made from the records or the pairs of the others.

    python -m benchmarks.ablation.material label --root runs/ablation/seed_0 --out DIR

`label` and `reason` are the training records with another target: the emotion word alone, or the
reasoning with the evidence behind it. `random` are the pairs with another rejected answer: the
annotation of a random clip of the same language and another emotion, which is right in form and
wrong in everything else.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.records import dataset
from saber_jax.data import sed, tokenizer
from saber_jax.data.pairs import write_pairs
from saber_jax.data.records import FIELDS, Record, RecordSource
from saber_jax.flags import Parser
from saber_jax.runs.files import read_json, read_jsonl, replacing_folder, write_json

REASONING = FIELDS[-1]


def label(record: Record) -> str:
    """The target of label-only SFT, under the heading that scores are read from."""
    return sed.target_text({REASONING: _verdict(record)}, (REASONING,))


def reason(record: Record) -> str:
    """The six sections with the reasoning first."""
    return sed.target_text(record.annotation, (REASONING, *FIELDS[:-1]))


TARGETS = {"label": label, "reason": reason}


def _verdict(record: Record) -> str:
    """The last sentence of the reasoning, which names the emotion and nothing else."""
    mark = {"en": "Emotion: ", "zh": "情绪："}[record.language]
    return mark + record.annotation[REASONING].rpartition(mark)[2]


def retarget(records: Path, out: Path, kind: str) -> None:
    """Writes the training records with the targets of `kind`, and the same vocabulary."""
    source = RecordSource(records, "train")

    def load(index: int) -> Record:
        return dataclasses.replace(source[index], answer=TARGETS[kind](source[index]))

    vocabulary = tokenizer.load_beside(records).path
    with replacing_folder(out) as partial:
        dataset.write(partial, {"train": range(len(source))}, load)
        tokenizer.copy(vocabulary, partial)


def random_negatives(
    pairs: list[dict[str, Any]], annotations: dict[str, dict[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """`pairs` with other rejected answers. `annotations` has, by clip, its language, its emotion
    and its target; equal inputs give equal draws."""
    rng = np.random.default_rng([seed, len(pairs)])
    clips = list(annotations.values())
    drawn = []
    for pair in pairs:
        own = annotations[pair["clip_id"]]
        others = [
            clip
            for clip in clips
            if clip["language"] == own["language"] and clip["emotion"] != own["emotion"]
        ]
        other = others[rng.integers(len(others))]
        changed = {"rejected": other["target"], "rejected_conclusion": other["emotion"]}
        # Nothing was withheld: the answer is that of another clip.
        drawn.append(pair | changed | {"withheld": ""})
    return drawn


def _annotations(records: Path, split: str) -> dict[str, dict[str, Any]]:
    source = RecordSource(records, split)
    outlines = (source.outline(index) for index in range(len(source)))
    return {
        record.clip_id: {
            "language": record.language,
            "emotion": record.labels["emotion"],
            "target": sed.target_text(record.annotation),
        }
        for record in outlines
    }


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("kind", choices=(*TARGETS, "random"))
    parser.add_argument("--root", required=True, type=Path, help="of one seed of the ablation")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    flags: argparse.Namespace = parser.parse_args()
    if flags.kind in TARGETS:
        retarget(flags.root / "records", flags.out, flags.kind)
        return
    pairs = read_jsonl(flags.root / "pairs" / "pairs.jsonl")
    annotations = _annotations(flags.root / "records", "preference")
    summary = read_json(flags.root / "pairs" / "summary.json")
    with replacing_folder(flags.out) as partial:
        write_pairs(partial / "pairs.jsonl", random_negatives(pairs, annotations, flags.seed))
        write_json(partial / "summary.json", {"method": "random", "pairs": summary["pairs"]})


if __name__ == "__main__":
    main()
