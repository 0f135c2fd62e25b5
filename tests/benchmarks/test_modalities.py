"""Single modalities are at chance where they conflict, and a corpus that leaks is found out."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from benchmarks import modalities
from data_prep.corpus.plan import Sizes, plan
from tests import synthetic

CLIPS = plan(Sizes(train=480, preference=72, validation=72, test=144), seed=0)
LABELS = [clip.labels for clip in CLIPS]
SPLITS = [clip.split for clip in CLIPS]


def recorded(labels: list[dict[str, str]]) -> modalities.Features:
    """What a clear recording would show: every label and some noise."""
    rng = np.random.default_rng(0)
    exact = modalities.of_labels(labels)
    noisy = {name: rows + rng.normal(0, 0.2, rows.shape) for name, rows in exact.items()}
    names = {"picture": "face", "sound": "voice", "words": "meaning"}
    return exact | {name: noisy[of] for name, of in names.items()}


def measured(labels: list[dict[str, str]]) -> Mapping[str, Mapping[str, Mapping]]:
    return modalities.measure(recorded(labels), labels, SPLITS, quick=True)


@pytest.fixture(scope="module")
def scores():
    return measured(LABELS)


def test_conflicts_of_the_embedded_corpus_are_at_chance_from_one_modality(scores):
    assert modalities.above_chance(scores) == []
    assert scores["test"]["inconsistent"]["chance"] == pytest.approx(1 / 3, abs=0.02)


def test_all_labels_together_settle_every_clip(scores):
    for split in scores.values():
        for sort in split.values():
            assert sort["truth"]["value"] == 1.0


def test_one_modality_is_enough_where_all_agree(scores):
    agreeing = scores["test"]["consistent"]
    assert min(agreeing[name]["value"] for name in ("picture", "sound", "face", "voice")) > 0.95


def test_words_that_give_a_conflict_away_are_named():
    told = {"contempt": "happy", "sorrow": "sad", "unease": "neutral"}
    leaky = [labels | {"words": told.get(labels["emotion"], "neutral")} for labels in LABELS]
    found = modalities.above_chance(measured(leaky))
    assert {"test: words", "test: meaning", "preference: words"} <= set(found)
    assert not any("picture" in name or "voice" in name for name in found)


def test_a_table_has_a_line_for_every_split_and_sort(scores):
    lines = modalities.table(scores).splitlines()
    assert len(lines) == 2 + 8
    assert len({line.count("|") for line in lines}) == 1


def test_too_few_clips_to_learn_from_are_refused():
    few = [{"emotion": e, "face": e, "voice": e, "words": e} for e in ("happy", "sad")]
    with pytest.raises(ValueError, match="1 consistent clips of its rarest"):
        modalities.measure(recorded(few), few, ["train", "train"], quick=True)


def test_pictures_and_sounds_of_records_become_rows_of_one_length():
    labels = LABELS[0]
    records = [dataclasses.replace(synthetic.record(i), labels=labels) for i in range(4)]
    found = modalities.features(records, np.ones(4, bool))
    assert {len(rows) for rows in found.values()} == {4}
    assert found["picture"].shape == (4, 2 * modalities.SIDE**2)
    assert np.isfinite(np.concatenate([found["picture"], found["sound"]], axis=1)).all()


def test_clips_without_the_label_of_a_modality_are_refused():
    with pytest.raises(ValueError, match="no label face, voice, words"):
        modalities.of_labels([LABELS[0], {"emotion": "happy"}])
