"""The labels of the embedded corpus: balance, chance levels and held-out people."""

import itertools
from collections import Counter

import pytest

from data_prep.corpus import text
from data_prep.corpus.plan import EMOTIONS, MISLEADING, SPLITS, Clip, Sizes, fused, plan

CONFLICTS = [
    tuple(other if place == misled else one for place in range(3))
    for misled in range(3)
    for one in EMOTIONS
    for other in EMOTIONS
    if one != other
]


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return plan(Sizes(), seed=0)


def inconsistent(clips: list[Clip]) -> list[Clip]:
    return [clip for clip in clips if clip.conflict_type != "none"]


def shown(clip: Clip) -> tuple[str, str, str]:
    return clip.face, clip.voice, clip.words


def test_default_sizes_are_the_promised_ones(clips):
    sizes = {"train": 4000, "preference": 600, "validation": 80, "test": 240}
    assert Counter(clip.split for clip in clips) == sizes
    conflicts = Counter(clip.split for clip in inconsistent(clips))
    assert conflicts == {"train": 1200, "preference": 400, "validation": 40, "test": 120}


def test_the_modality_that_contradicts_the_others_is_the_emotion():
    assert fused("happy", "sad", "sad")[:2] == ("sorrow", "masking")
    assert fused("sad", "happy", "sad")[:2] == ("unease", "leakage")
    assert fused("angry", "angry", "happy")[:2] == ("contempt", "sarcasm")
    assert fused("sad", "sad", "sad") == ("sad", "none", 0.0)
    assert fused("happy", "happy", "sad")[2] == 1.0
    assert fused("angry", "sad", "angry")[2] < fused("angry", "happy", "angry")[2] < 1


def test_every_single_modality_leaves_three_equally_likely_emotions():
    for side in range(3):
        for label in EMOTIONS:
            emotions = [fused(*each)[0] for each in CONFLICTS if each[side] == label]
            assert Counter(emotions) == {emotion: 3 for emotion, _ in MISLEADING.values()}


def test_two_modalities_leave_a_doubt_wherever_they_disagree():
    for left_out in range(3):
        answers = {}
        for each in CONFLICTS:
            seen = each[:left_out] + each[left_out + 1 :]
            answers.setdefault(seen, set()).add(fused(*each)[0])
        for (one, other), emotions in answers.items():
            assert len(emotions) == (1 if one == other else 2)


@pytest.mark.parametrize("split", ["train", "preference", "test"])
@pytest.mark.parametrize("modality", ["face", "voice", "words", "gesture", "language"])
def test_one_modality_predicts_the_fused_emotion_no_better_than_chance(clips, split, modality):
    joint = Counter(
        (getattr(c, modality), c.emotion) for c in inconsistent(clips) if c.split == split
    )
    total = sum(joint.values())
    best = sum(
        max(n for (value, _), n in joint.items() if value == wanted)
        for wanted in {value for value, _ in joint}
    )
    # A predictor that knows the table of counts by heart gains from sampling noise alone.
    assert best / total < 1 / 3 + 0.5 / total**0.5 + 0.03


def test_the_three_modalities_determine_the_emotion_and_all_forty_cases_occur(clips):
    emotions = {}
    for clip in clips:
        emotions.setdefault(shown(clip), set()).add((clip.emotion, clip.conflict_type))
    assert len(emotions) == len(EMOTIONS) + len(CONFLICTS) == 40
    assert all(len(found) == 1 for found in emotions.values())


@pytest.mark.parametrize("split", SPLITS)
def test_faces_voices_and_languages_are_balanced(clips, split):
    chosen = [clip for clip in clips if clip.split == split]
    for side in ("face", "voice", "words"):
        counts = Counter(getattr(clip, side) for clip in chosen).values()
        assert max(counts) - min(counts) <= 8
    english = sum(clip.language == "en" for clip in chosen) / len(chosen)
    assert 0.57 < english < 0.67
    people = Counter(clip.identity for clip in chosen)
    if split != "train":  # There 200 people are drawn for twenty clips each.
        assert max(people.values()) < 2 * min(people.values())
    assert len(people) == {"train": 200, "preference": 12, "validation": 4, "test": 8}[split]


@pytest.mark.parametrize("trait", ["identity", "variant", "sentence"])
def test_no_two_splits_share_a_person_a_voice_or_a_sentence(clips, trait):
    def traits(split: str) -> set:
        chosen = [clip for clip in clips if clip.split == split]
        if trait == "sentence":
            return {text.sentence(clip) for clip in chosen}
        return {getattr(clip, trait) for clip in chosen}

    for one, other in itertools.combinations(SPLITS, 2):
        assert not traits(one) & traits(other)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_word_is_said_in_training_and_in_the_test(clips, language):
    def words(split: str) -> set[tuple]:
        chosen = [c for c in clips if (c.split, c.language) == (split, language)]
        return {
            word
            for c in chosen
            for word in (
                ("subject", c.sentence[0]),
                ("verb", c.words, c.sentence[1]),
                ("object", c.sentence[2]),
            )
        }

    assert len(words("train")) == 12 + 4 * 2 + 6
    assert words("test") <= words("train")


def test_labels_are_strings_and_kappa_is_zero_only_without_conflict(clips):
    for clip in clips:
        labels = clip.labels
        assert all(isinstance(value, str) for value in labels.values())
        assert (labels["kappa"] == "0.0") == (labels["conflict_type"] == "none")
        assert 0 <= float(labels["kappa"]) <= 1


def test_another_seed_is_another_plan_and_the_same_seed_the_same():
    sizes = Sizes(train=40, preference=12, validation=4, test=12)
    assert plan(sizes, seed=1) == plan(sizes, seed=1)
    assert plan(sizes, seed=1) != plan(sizes, seed=2)


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="at least one clip"):
        Sizes(train=10, preference=0, test=4)
