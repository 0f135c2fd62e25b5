import pytest

from saber_jax.data import sed
from saber_jax.data.records import FIELDS
from saber_jax.evaluation import saber_test


def _prediction(emotion, face, voice, said, *, speech=("", ""), language="en", kind=None):
    annotation = dict.fromkeys(FIELDS, "x") | {"speech_content": speech[0]}
    answer = annotation | {"speech_content": speech[1], "sentiment_analysis": f"So {said}."}
    response = sed.target_text(answer)
    labels = {"emotion": emotion, "face": face, "voice": voice}
    labels["conflict_type"] = kind or ("none" if face == voice else "masking")
    return {
        "clip_id": f"{emotion}-{face}-{voice}-{said}",
        "language": language,
        "response": response,
        "conclusion": sed.conclusion(response),
        "labels": labels,
        "annotation": annotation,
    }


AGREEING = [
    _prediction("happy", "happy", "happy", "happy"),
    _prediction("sad", "sad", "sad", "sad"),
    _prediction("angry", "angry", "angry", "angry"),
    _prediction("neutral", "neutral", "neutral", "sad"),
]
DIFFERING = [
    _prediction("sorrow", "happy", "sad", "sorrow"),
    _prediction("sorrow", "happy", "sad", "happy"),
    _prediction("sorrow", "happy", "sad", "sad"),
    _prediction("unease", "happy", "neutral", "happy"),
    _prediction("contempt", "happy", "angry", "unknowable", kind="sarcasm"),
]


def test_accuracies_dominance_and_gap_are_the_hand_counted_ones():
    scores = saber_test.score(AGREEING + DIFFERING)
    inconsistent = scores["inconsistent"]
    assert scores["n"] == 9
    assert scores["consistent"]["accuracy"]["value"] == 3 / 4
    assert inconsistent["accuracy"]["value"] == 1 / 5
    assert inconsistent["dominance"]["value"] == 3 / 5
    assert inconsistent["follows_face"]["value"] == 2 / 5
    assert inconsistent["follows_voice"]["value"] == 1 / 5
    assert scores["gap"]["accuracy"]["value"] == pytest.approx(3 / 4 - 1 / 5)
    assert scores["conflict_types"]["masking"]["n"] == 4
    assert scores["conflict_types"]["masking"]["value"] == 1 / 4
    assert scores["conflict_types"]["sarcasm"]["value"] == 0.0


def test_a_right_conclusion_is_not_led_by_the_modality_that_suggests_it_too():
    clips = [_prediction("sad", "sad", "happy", said, kind="leakage") for said in ("sad", "happy")]
    inconsistent = saber_test.score(clips)["inconsistent"]
    assert inconsistent["accuracy"]["value"] == 1 / 2
    assert (inconsistent["dominance"]["value"], inconsistent["follows_face"]["value"]) == (0.5, 0.0)
    assert inconsistent["follows_voice"]["value"] == 1 / 2
    assert "follows_words" not in inconsistent  # Nobody says what they suggest.


@pytest.mark.parametrize(
    ("words", "said", "led"),
    [
        ("positive", "happy", True),
        ("negative", "sad", True),
        ("negative", "angry", True),
        ("neutral", "neutral", True),
        ("fear", "fear", True),
        ("negative", "happy", False),
        ("negative", "contempt", False),  # That is right.
    ],
)
def test_words_mislead_by_their_emotion_or_by_their_valence(words, said, led):
    clip = _prediction("contempt", "neutral", "disgust", said, kind="sarcasm")
    clip |= {"conclusion": said, "labels": clip["labels"] | {"words": words}}
    scores = saber_test.score([clip])["inconsistent"]
    assert scores["follows_words"]["value"] == led
    assert scores["dominance"]["value"] == (led or said == "neutral")


def test_an_unparsable_answer_is_counted_and_wrong_not_dropped():
    broken = AGREEING[0] | {"response": "happy happy", "conclusion": None}
    scores = saber_test.score([*AGREEING[:1], broken])
    assert scores["unparsable"] == 1
    assert scores["accuracy"]["n"] == 2
    assert scores["accuracy"]["value"] == 0.5


def test_an_empty_section_is_not_a_missing_one():
    assert saber_test.is_complete(AGREEING[0]["response"])  # Its speech_content is empty.
    assert not saber_test.is_complete(AGREEING[0]["response"].replace("[speech_content]", ""))


def test_only_consistent_clips_leave_the_other_rates_empty():
    scores = saber_test.score(AGREEING)
    assert scores["inconsistent"]["accuracy"] == {"n": 0, "value": None, "interval": None}
    nothing = {"value": None, "interval": None}
    rates = ("accuracy", "word_error_rate", "character_error_rate")
    assert scores["gap"] == dict.fromkeys(rates, nothing)


def test_word_errors_are_counted_by_split_and_only_where_there_is_speech():
    clips = [
        _prediction(
            "sad", "sad", "sad", "sad", speech=("Don't stop, please now!", "dont stop pleas")
        ),
        _prediction("sad", "sad", "sad", "sad", speech=("", "dogs")),
        _prediction("sorrow", "happy", "sad", "sad", speech=("one two", "one two")),
    ]
    scores = saber_test.score(clips)
    # One substitution and one deletion in four words.
    assert scores["consistent"]["word_error_rate"]["value"] == 0.5
    assert scores["consistent"]["word_error_rate"]["n"] == 1
    assert scores["inconsistent"]["word_error_rate"]["value"] == 0.0
    assert scores["consistent"]["character_error_rate"]["value"] is None
    assert scores["gap"]["word_error_rate"] == {"value": 0.5, "interval": [0.5, 0.5]}
    assert scores["gap"]["character_error_rate"]["value"] is None


def test_character_errors_are_summed_over_chinese_clips():
    clips = [
        _prediction("sad", "sad", "sad", "sad", speech=("我很好。", "我 很坏"), language="zh"),
        _prediction("sad", "sad", "sad", "sad", speech=("你好", "你好"), language="zh"),
    ]
    rate = saber_test.score(clips)["consistent"]["character_error_rate"]
    assert (rate["n"], rate["units"], rate["value"]) == (2, 5, 1 / 5)


def test_ratings_are_averaged_by_section_and_split_and_what_was_not_rated_is_left_out():
    ratings = [dict.fromkeys(FIELDS, 4.0)] * 4 + [dict.fromkeys(FIELDS, 2.0)] * 4
    ratings.append(dict.fromkeys(FIELDS, 5.0) | {"video_desc": None})
    scores = saber_test.score(AGREEING + DIFFERING, ratings)
    assert scores["consistent"]["judge"]["video_desc"]["value"] == 4.0
    assert scores["inconsistent"]["judge"]["video_desc"]["value"] == 2.0
    assert scores["inconsistent"]["judge"]["video_desc"]["n"] == 4
    assert scores["inconsistent"]["judge"]["acoustic_feat"]["value"] == pytest.approx(13 / 5)
    assert scores["inconsistent"]["judge"]["mean"]["n"] == 4
    assert scores["gap"]["judge"]["mean"]["value"] == 2.0


def test_the_confusion_matrix_has_a_column_for_answers_that_name_nothing():
    broken = DIFFERING[0] | {"conclusion": None}
    table = saber_test.confusion([*AGREEING, broken])
    assert table["truth"] == ["angry", "happy", "neutral", "sad", "sorrow"]
    assert table["said"] == [*table["truth"], "none named"]
    assert table["counts"][2] == [0, 0, 0, 1, 0, 0]
    assert table["counts"][4] == [0, 0, 0, 0, 0, 1]


def test_a_clip_without_the_deciding_labels_is_refused_by_name():
    clip = AGREEING[0] | {"labels": {"emotion": "happy", "face": "happy"}}
    with pytest.raises(ValueError, match="happy-happy-happy-happy"):
        saber_test.score([clip])


def test_no_prediction_is_an_error():
    with pytest.raises(ValueError, match="no prediction"):
        saber_test.score([])


@pytest.mark.parametrize(
    ("labels", "agrees"),
    [
        ({"face": "sad", "voice": "sad"}, True),
        ({"face": "sad", "voice": "happy"}, False),
        ({"face": "sad", "voice": "sad", "words": "negative"}, True),
        ({"face": "sad", "voice": "sad", "words": "happy"}, False),
        ({"face": "sad", "voice": "happy", "words": "sad", "conflict_type": "none"}, True),
    ],
)
def test_modalities_agree_by_their_labels_where_no_conflict_type_says_so(labels, agrees):
    assert saber_test.is_consistent(labels) == agrees
