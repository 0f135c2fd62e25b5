import pytest

from saber_jax.data import emotions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Emotion: contempt", "contempt"),
        ("Happy face, ANGRY voice. Emotion: Contempt.", "contempt"),
        ("She is surprised, and a sense of sadness prevails.", "sad"),
        ("The overall emotion is anger, although he smiles happily.", "angry"),
        ("unhappy, fearless, joyless, surprisingly", None),
        ("表情开心，情绪：轻蔑。", "contempt"),
        ("情绪:sad", "sad"),
        ("face happy 情绪：不安", "unease"),
        ("他很高兴，其实难过", "sad"),
        ("A surprise, then fear", "fear"),
        ("", None),
        ("nothing known", None),
    ],
)
def test_the_last_word_for_an_emotion_counts_in_every_form(text, expected):
    assert emotions.last_named(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He is sad. He is not happy.", "sad"),
        ("sad; he does not seem happy", "sad"),
        ("sad; she isn't really angry", "sad"),
        ("sad, without any joy", "sad"),
        ("not only sad", "sad"),
        ("She says no. She is sad", "sad"),
        ("悲伤，并不开心", "sad"),
        ("悲伤，没有恐惧", "sad"),
        ("她不太高兴", None),
        ("非常开心", "happy"),
        ("不仅愤怒", "angry"),
    ],
)
def test_what_is_denied_is_not_named(text, expected):
    assert emotions.last_named(text) == expected


def test_a_label_of_our_own_emotions_is_known_in_every_form():
    assert emotions.canonical("Joy") == emotions.canonical("高兴") == "happy"
    assert emotions.canonical("boredom") == "boredom"
    labels = {"emotion": "sadness", "words": "positive", "speaker": "joy", "kappa": "1.0"}
    assert emotions.canonical_labels(labels) == labels | {"emotion": "sad"}


def test_labels_beyond_ours_are_found_beside_ours():
    labels = emotions.in_labels(
        [{"emotion": "boredom", "face": "joy", "words": "negative"}, {"voice": "Bored"}]
    )
    assert labels == ["Bored", "boredom", "happy"]
    assert emotions.last_named("She is BORED.", labels) == "Bored"
    assert emotions.last_named("她笑得很开心。", labels) == "happy"
    assert emotions.last_named("pleasant surprise", ["pleasant surprise"]) == "pleasant surprise"
