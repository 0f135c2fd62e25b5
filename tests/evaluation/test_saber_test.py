import numpy as np
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
    assert scores["gap"]["value"] == pytest.approx(3 / 4 - 1 / 5)
    assert scores["conflict_types"]["masking"]["n"] == 4
    assert scores["conflict_types"]["masking"]["value"] == 1 / 4
    assert scores["conflict_types"]["sarcasm"]["value"] == 0.0


def test_an_unparsable_answer_is_counted_and_wrong_not_dropped():
    broken = AGREEING[0] | {"response": "happy happy", "conclusion": None}
    scores = saber_test.score([*AGREEING[:1], broken])
    assert scores["unparsable"] == 1
    assert scores["accuracy"]["n"] == 2
    assert scores["accuracy"]["value"] == 0.5


def test_an_empty_section_is_not_a_missing_one():
    assert saber_test.is_complete(AGREEING[0]["response"])  # Its speech_content is empty.
    assert not saber_test.is_complete(AGREEING[0]["response"].replace("[speech_content]", ""))


def test_intervals_are_repeatable_hold_the_value_and_shrink_with_more_clips():
    few = saber_test.rate(np.arange(20) % 2 == 0)
    many = saber_test.rate(np.arange(2000) % 2 == 0)
    assert few == saber_test.rate(np.arange(20) % 2 == 0)
    assert few["interval"][0] < few["value"] < few["interval"][1]
    # 1.96 standard errors of a proportion of one half.
    assert many["interval"][1] - many["value"] == pytest.approx(1.96 * 0.5 / 2000**0.5, abs=3e-3)
    assert many["interval"][1] < few["interval"][1]


def test_a_paired_gain_without_any_change_has_no_width():
    hits = np.array([True, False, True])
    assert saber_test.paired_gain(hits, hits) == {"n": 3, "value": 0.0, "interval": [0.0, 0.0]}
    assert saber_test.paired_gain(hits, ~hits)["value"] == pytest.approx(-1 / 3)


def test_only_consistent_clips_leave_the_other_rates_empty():
    scores = saber_test.score(AGREEING)
    assert scores["inconsistent"]["accuracy"] == {"n": 0, "value": None, "interval": None}
    assert scores["gap"] == {"value": None, "interval": None}


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("a", "a", 0)],
)
def test_edit_distance(a, b, distance):
    assert saber_test.edit_distance(a, b) == distance


def test_word_errors_ignore_case_marks_and_sound_events():
    speech = ("Don't <laughter> stop, please now!", "dont stop pleas")
    scores = saber_test.score([_prediction("sad", "sad", "sad", "sad", speech=speech)])
    # One substitution and one deletion in four words.
    assert scores["speech"]["word_error_rate"] == {"n": 1, "units": 4, "value": 0.5}
    assert scores["speech"]["character_error_rate"]["value"] is None


def test_character_errors_are_summed_over_chinese_clips():
    clips = [
        _prediction("sad", "sad", "sad", "sad", speech=("我很好。", "我 很坏"), language="zh"),
        _prediction("sad", "sad", "sad", "sad", speech=("你好", "你好"), language="zh"),
    ]
    rate = saber_test.score(clips)["speech"]["character_error_rate"]
    assert rate == {"n": 2, "units": 5, "value": 1 / 5}


def test_a_clip_without_the_deciding_labels_is_refused_by_name():
    clip = AGREEING[0] | {"labels": {"emotion": "happy", "face": "happy"}}
    with pytest.raises(ValueError, match="happy-happy-happy-happy"):
        saber_test.score([clip])


def test_no_prediction_is_an_error():
    with pytest.raises(ValueError, match="no prediction"):
        saber_test.score([])
