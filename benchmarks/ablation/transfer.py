"""Clips from elsewhere that every arm is evaluated on too: `--transfer DIR`.

DIR holds records with a label for each modality, made by `python -m data_prep.build`. No arm trains
on them. They are checked before anything is trained.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import sft
from saber_jax.data import emotions, media
from saber_jax.data.examples import measure_record
from saber_jax.data.records import Record, RecordSource
from saber_jax.data.tokenizer import Tokenizer, load_tokenizer
from saber_jax.evaluation import saber_test

LABELS = ("emotion", *saber_test.MODALITIES)
MOST_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One split of records that are not of the embedded corpus."""

    records: Path
    split: str = "test"

    @functools.cached_property
    def source(self) -> RecordSource:
        """Raises FileNotFoundError without records, ValueError without the split."""
        return RecordSource(self.records, self.split)

    def scores_of(self, root: Path, arm: str) -> Path:
        """Where an arm's scores and predictions are; records that change get another folder."""
        return root / "transfer" / f"{self.split}_{self.source.fingerprint}" / arm

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What the clips are: where from, how many, and how many of them are unlike the recipe's.

        Raises ValueError if a clip lacks what a score needs.
        """
        outlines = [self.source.outline(index) for index in range(len(self.source))]
        _refuse_unlabelled(self.records, outlines)
        labels = [emotions.canonical_labels(record.labels) for record in outlines]
        agree = sum(map(saber_test.is_consistent, labels))
        folder = self.records.resolve()
        recipe = sft.get_config("tiny")
        return {
            "records": f"{folder.parent.name}/{folder.name}",
            "split": self.split,
            "consistent": agree,
            "conflicting": len(outlines) - agree,
            "too_large": too_large(outlines, load_tokenizer(self.records), recipe),
            "sampled_otherwise": sampled_otherwise(outlines, recipe),
        }


def _refuse_unlabelled(records: Path, outlines: Sequence[Record]) -> None:
    if not outlines:
        raise ValueError(f"There is no clip in {records}.")
    lacking = {}
    for record in outlines:
        missing = [f"label {name!r}" for name in LABELS if not record.labels.get(name)]
        if "speech_content" not in record.annotation:
            missing.append("the section speech_content")
        if missing:
            lacking[record.clip_id] = ", ".join(missing)
    if lacking:
        raise ValueError(
            f"{len(lacking)} of {len(outlines)} clips in {records} lack what scores need: "
            f"{named(lacking)}. Add it to labels.jsonl, or to the annotations, and build the "
            "records again."
        )


def too_large(
    outlines: Iterable[Record], tokenizer: Tokenizer, recipe: ConfigDict
) -> dict[str, str]:
    """{clip: why} of the clips that training with `recipe` would leave out.

    They are answered nevertheless, because generation has room for any clip, but the network has
    learnt from none of their size.
    """
    data, found = recipe.data, {}
    for record in outlines:
        prompt, _ = measure_record(record, tokenizer, responses=())
        height, width = record.frames.shape[1:3]
        sizes = {
            "frame_patches": height * width // media.PATCH**2,
            "patches": prompt.patches,
            "chunks": prompt.chunks,
            "length": prompt.text + recipe.generation.max_new_tokens,
        }
        over = [
            f"{name} {size} > {data[name]}" for name, size in sizes.items() if size > data[name]
        ]
        if over:
            found[record.clip_id] = ", ".join(over)
    return found


def sampled_otherwise(outlines: Iterable[Record], recipe: ConfigDict) -> dict[str, str]:
    """{clip: how} of the clips that were decoded with other settings than those of `recipe`."""
    usual = dict(zip(recipe.sampling[::2], recipe.sampling[1::2], strict=True))
    found = {}
    for record in outlines:
        own = record.provenance.get("sampling", {})
        names = {flag.removeprefix("--"): float(value) for flag, value in usual.items()}
        other = [
            f"{name} {own[name]:g}, not {value:g}"
            for name, value in names.items()
            if name in own and own[name] != value
        ]
        if other:
            found[record.clip_id] = "; ".join(other)
    return found


def remarks(about: Mapping[str, Any]) -> list[str]:
    """What a reader of the scores has to know about the clips, a sentence each."""
    total = about["consistent"] + about["conflicting"]
    sentences = {
        "too_large": "are larger than training with the tiny recipe takes, and were answered all "
        "the same",
        "sampled_otherwise": "were decoded with other settings than those of the tiny recipe "
        f"({' '.join(sft.get_config('tiny').sampling)})",
    }
    return [
        f"{len(about[kind])} of {total} clips {says}: {named(about[kind])}."
        for kind, says in sentences.items()
        if about[kind]
    ]


def named(clips: Mapping[str, str]) -> str:
    """The first clips with what is said of them, and how many more there are."""
    first = [f"{clip} ({what})" for clip, what in list(clips.items())[:MOST_NAMED]]
    more = len(clips) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
