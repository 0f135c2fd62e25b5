"""The labels of the embedded corpus: balance, chance levels and held-out people."""

from collections import Counter

import pytest

from data_prep.corpus.plan import CONFLICTS, SPLITS, Clip, Sizes, plan


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return plan(Sizes(), seed=0)


def inconsistent(clips: list[Clip]) -> list[Clip]:
    return [clip for clip in clips if clip.face != clip.voice]


def test_default_sizes_are_the_promised_ones(clips):
    assert Counter(clip.split for clip in clips) == {"train": 1100, "preference": 500, "test": 240}
    conflicts = Counter(clip.split for clip in inconsistent(clips))
    assert conflicts == {"train": 275, "preference": 500, "test": 120}


def test_every_single_modality_leaves_three_equally_likely_emotions():
    for side in (0, 1):
        for label in {pair[side] for pair in CONFLICTS}:
            emotions = [fused for pair, (fused, _) in CONFLICTS.items() if pair[side] == label]
            assert sorted(emotions) == ["contempt", "sorrow", "unease"]


@pytest.mark.parametrize("split", SPLITS)
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


def test_face_and_voice_together_determine_the_emotion(clips):
    emotions = {}
    for clip in clips:
        emotions.setdefault((clip.face, clip.voice), set()).add((clip.emotion, clip.conflict_type))
    assert len(emotions) == 16
    assert all(len(found) == 1 for found in emotions.values())


def test_words_agree_with_a_consistent_emotion_or_are_neutral(clips):
    agreeing = {"happy": "positive", "sad": "negative", "angry": "negative", "neutral": "neutral"}
    for clip in clips:
        if clip.face == clip.voice:
            assert clip.words in (agreeing[clip.face], "neutral")


@pytest.mark.parametrize("split", SPLITS)
def test_faces_voices_and_languages_are_balanced(clips, split):
    chosen = [clip for clip in clips if clip.split == split]
    for side in ("face", "voice"):
        counts = Counter(getattr(clip, side) for clip in chosen).values()
        assert max(counts) - min(counts) <= 4
    english = sum(clip.language == "en" for clip in chosen) / len(chosen)
    assert 0.63 < english < 0.70
    people = Counter(clip.identity for clip in chosen).values()
    assert max(people) < 1.5 * min(people)


def test_test_people_appear_nowhere_else(clips):
    for trait in ("identity", "variant"):
        seen = {getattr(clip, trait) for clip in clips if clip.split != "test"}
        assert not seen & {getattr(clip, trait) for clip in clips if clip.split == "test"}


def test_labels_are_strings_and_kappa_is_zero_only_without_conflict(clips):
    for clip in clips:
        labels = clip.labels
        assert all(isinstance(value, str) for value in labels.values())
        assert (labels["kappa"] == "0.0") == (labels["conflict_type"] == "none")
        assert 0 <= float(labels["kappa"]) <= 1


def test_another_seed_is_another_plan_and_the_same_seed_the_same():
    sizes = Sizes(train=40, preference=12, test=12)
    assert plan(sizes, seed=1) == plan(sizes, seed=1)
    assert plan(sizes, seed=1) != plan(sizes, seed=2)


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="at least one clip"):
        Sizes(train=10, preference=0, test=4)
